"""MkDocs: README.md is the first page, and links from docs/ to the rest of the repository work in the book."""

import re
import subprocess
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
SHOWN = "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "assets", "benchmark"


def on_files(files, config):
    """Add the files of the repository that pages link to."""
    listed = subprocess.run(["git", "ls-files", "-z", *SHOWN], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """In the book the pages of docs/ are beside the repository's other files."""
    if page.file.src_uri == "README.md":
        return markdown.replace("](docs/", "](")
    if "/" in page.file.src_uri:  # benchmark/...
        return markdown.replace("](../docs/", "](../")
    return re.sub(r"\]\(\.\./(?!\.)", "](", markdown)
