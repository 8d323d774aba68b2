"""README and the book: up to date with the code, no broken links, and their Python runs."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmark/*.md"), *ROOT.glob("assets/*.md")])
IN_BLOCKS = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)


def test_pages_from_the_code_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert len(generate.pages()) == 2
    for path, text in generate.pages().items():
        assert path.read_text() == text, f"{path.name} is outdated: run python docs/generate.py"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and len(text.encode()) <= 10_000


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if f": {page.name}\n" not in navigation] == []


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", IN_BLOCKS.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", IN_BLOCKS.sub("", page.read_text())):
        if not link.startswith(("http://", "https://")):
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            assert path.exists() and path.resolve().is_relative_to(ROOT), link
            assert not anchor or anchor in anchors(path), link


def test_the_code_of_the_algorithm_is_that_of_the_script():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "algorithm.md").read_text(), re.DOTALL)
    source = (ROOT / "ppo_ballbot.py").read_text()
    assert len(blocks) >= 7 and [block for block in blocks if block not in source] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", ["environment", "randomization", "customizing", "libraries"])
def test_python_runs(page, monkeypatch):
    """The blocks at the left margin, in turn. Stable-Baselines3's runs in tests/test_use.py."""
    monkeypatch.chdir(ROOT)
    names = {}
    for block in re.findall(
        r"^```python\n(\S.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE
    ):
        if "stable_baselines3" not in block:
            exec(block, names)
    assert "env" in names or "envs" in names


def test_errors_of_the_faq_exist():
    """Each quoted error is in the code, apart from values, which the page shows as …"""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("ballbot_utils/**/*.py")]
    code = " ".join(re.sub(r"\"\s+f?\"", "", path.read_text()) for path in sources)  # strings over several lines
    quoted = re.findall(r"\*\*`(.*?)`\*\*", (ROOT / "docs" / "faq.md").read_text(), re.DOTALL)
    assert len(quoted) > 25
    for text in quoted:
        parts = filter(None, (part.strip() for part in text.replace("\n", " ").split("…")))
        assert re.search(".{1,120}?".join(map(re.escape, parts)), code), text
