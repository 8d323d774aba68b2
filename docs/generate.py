"""Writes what docs/ takes from the code: `python docs/generate.py`. A test fails if a page is outdated.

The part of environment.md below MARK is the docstring of BallbotEnv; that of flags.md is made from the Args of the
scripts and their presets.
"""

import inspect
import sys
from dataclasses import fields
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import ballbot_env
import ppo_ballbot
import ppo_ballbot_gpu
import ppo_ballbot_schedules
from ballbot_utils.flags import format_flags, read_flag_comments

MARK = "<!-- Below this line python docs/generate.py writes. -->\n"
PRESETS = {
    "aggressive": "the guide's; fast and unstable, because its entropy bonus makes the action noise grow to the end",
    "conservative": "the guide's; slow and stable: it meets the targets 1.5 million steps after the defaults; one seed "
    "of five ends below 100, because it falls at the speed where the torque of the wheels is exhausted",
    "balanced": "the guide's, and the defaults",
    "paper": "Stable-Baselines3's values where the guide has none, and the paper's wheels",
    "tuned": "the fastest reliable configuration ([how it was found](../benchmark/how_tuned_was_found.md))",
    "robust": "`tuned` for a robot that is pushed and differs from the model; it replaces",
}


def environment() -> str:
    return inspect.getdoc(ballbot_env.BallbotEnv) + "\n"


def row(args: object, name: str, comment: str) -> str:
    value, flag = getattr(args, name), name.replace("_", "-")
    usage = f"`--{flag}` / `--no-{flag}`" if value is True else f"`--{flag}`"
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, int):
        value = f"{value:_}" if value >= 10_000 else value
    elif isinstance(value, dict):
        value = " ".join(f"{key} {each:g}" for key, each in value.items())
    return f"| {usage} | {'' if value == () else value} | {comment.replace('<', '&lt;')} |"


def table(args: object, comments: dict[str, str]) -> list[str]:
    return ["| flag | default | meaning |", "| --- | --- | --- |", *(row(args, *item) for item in comments.items()), ""]


def differences(script) -> dict[str, str]:
    """Comments of the flags that ppo_ballbot.py lacks or has with another default or comment."""
    old, new = ppo_ballbot.Args(), script.Args()
    known, own = (
        {name: text for section in read_flag_comments(type(args)).values() for name, text in section.items()}
        for args in (old, new)
    )
    names = [field.name for field in fields(new) if field.name != "exp_name"]
    return {n: own[n] for n in names if own[n] != known.get(n) or getattr(new, n) != getattr(old, n)}


def flags() -> str:
    lines = []
    for section, comments in read_flag_comments(ppo_ballbot.Args).items():
        lines += [f"## {section}", "", *table(ppo_ballbot.Args(), comments)]
    lines += ["## Presets", "", "| `--preset` | values |", "| --- | --- |"]
    for name, about in PRESETS.items():
        base = ppo_ballbot.PRESETS["tuned"] if name == "robust" else {}
        values = {key: value for key, value in ppo_ballbot.PRESETS[name].items() if base.get(key) != value}
        lines.append(f"| `{name}` | {about}: `{format_flags(values)}` |")
    lines += ["", "## ppo_ballbot_schedules.py", "", "Learning rate, entropy and clip coefficient follow schedules. "
              "`--anneal-lr` does not exist here. These flags differ:", "",
              *table(ppo_ballbot_schedules.Args(), differences(ppo_ballbot_schedules)),
              "![Every schedule](../benchmark/schedules.png)", "",
              "## ppo_ballbot_gpu.py", "", "These flags differ:", "",
              *table(ppo_ballbot_gpu.Args(), differences(ppo_ballbot_gpu)),
              "The presets `tuned` and `robust` have, in addition: "
              f"`{format_flags(ppo_ballbot_gpu.LARGE_BATCH)}`."]  # fmt: skip
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """The full text of each page that is partly generated."""
    generated = {DOCS / "environment.md": environment(), DOCS / "flags.md": flags()}
    return {path: path.read_text().partition(MARK)[0] + MARK + "\n" + text for path, text in generated.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
