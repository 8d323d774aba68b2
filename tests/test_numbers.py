"""Results in README.md and docs/ are in raw files: benchmark/sources.txt says where, or why a number needs none.

A line of it is `NUMBER | median GLOB | PATTERN`: the median of the numbers that follow PATTERN, a regular expression,
the last one in each file below benchmark/ that matches GLOB; or `NUMBER | - | REASON`. The test finds numbers with a
decimal point or a thousands separator, and times in minutes, outside code, formulas, generated pages and tables.
"""

import re
import statistics
from pathlib import Path

import pytest

from benchmark import presets, records

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
LINES = (ROOT / "benchmark" / "sources.txt").read_text().splitlines()
SOURCES = [tuple(line.split(" | ", 2)) for line in LINES if line and not line.startswith("#")]
NUMBER = r"\d+ min(?: \d+ s)?|\d+(?:,\d{3})*\.\d+|\d{1,3}(?:,\d{3})+"
NO_RESULTS = (r"<!-- Below this line.*|<!-- results: .*?<!-- end -->|^( *)```.*?^\1```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|https?://\S+"
              r"|arXiv [\d.]+")  # fmt: skip
FUNCTIONS = {"median": statistics.median, "mean": statistics.mean, "min": min, "max": max}


def find_numbers(text):
    """The numbers of a page."""
    return re.findall(rf"(?<![\w.,-])(?:{NUMBER})", re.sub(NO_RESULTS, "", text, flags=re.DOTALL | re.MULTILINE))


def parse(number):
    """The value of a number, minutes for times, and the largest error of its rounding."""
    if "min" in number:
        minutes, seconds = re.match(r"(\d+) min(?: (\d+))?", number).groups()
        return int(minutes) + int(seconds or 0) / 60, 0.5 / 60 if seconds else 0.5
    digits = number.replace(",", "")
    zeros = len(digits) - len(digits.rstrip("0"))
    return float(digits), 0.5 * 10.0 ** (-len(digits.partition(".")[2]) if "." in digits else zeros)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_number_has_a_source(page):
    assert set(find_numbers(page.read_text())) <= {number for number, *_ in SOURCES}


def test_every_source_is_used():
    used = {number for page in PAGES for number in find_numbers(page.read_text())}
    assert [number for number, *_ in SOURCES if number not in used] == []


@pytest.mark.parametrize("number, source, pattern", [row for row in SOURCES if row[1] != "-"])
def test_raw_files_have_the_number(number, source, pattern):
    function, glob = source.split()
    files = sorted((ROOT / "benchmark").glob(glob))
    found = [re.findall(rf"{pattern}\s*({NUMBER}|\d+)", file.read_text()) for file in files]
    expected, error = parse(number)
    assert abs(FUNCTIONS[function]([parse(matches[-1])[0] for matches in found]) - expected) <= error * 1.0001


RUNS = records.read_lines(ROOT / presets.FILE)


@pytest.mark.parametrize("row, preset", [
    ("`--preset tuned`", "tuned"), ("`python ppo_ballbot.py`", "balanced"), ("`--preset robust`", "robust"),
])  # fmt: skip
def test_the_readme_has_the_results_of_the_final_policies(row, preset):
    finals = [run["final"] for run in RUNS if (run["experiment"], run["value"]) == (preset, "")]
    returns, falls = [run["episodic_return"] for run in finals], sum(run["falls"] * 100 for run in finals)
    median, lowest, highest = (f"{f(returns):.1f}" for f in (statistics.median, min, max))
    (line,) = (line for line in PAGES[0].read_text().splitlines() if line.startswith(f"| {row}"))
    assert f"| median {median} ({lowest} to {highest}) | {falls:.0f} of {100 * len(finals)}" in line
    assert f"{lowest} to {highest}" in (ROOT / "docs" / "results.md").read_text()


def test_the_tables_have_each_run():
    assert presets.format_table(RUNS) in (ROOT / "benchmark" / "tables.md").read_text()


def test_numbers_are_found():
    text = "105.5 (`7.5`), some 12 minutes, 1 min 28 s, [895,000](x_1.5) of arXiv 1506.02438 $0.5$ 2 of 3"
    assert find_numbers(text) == ["105.5", "12 min", "1 min 28 s", "895,000"]
    assert parse("895,000") == (895_000, 500) and parse("1 min 30 s")[0] == 1.5 and parse("98.0")[1] == 0.05
