"""The table in ``docs/versions.md``, from the JSON files that the plugin wrote; the exit code says if any failed."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from compat import PACKAGES

PAGE = Path(__file__).parents[2] / "docs" / "versions.md"
START, END = "<!-- versions: written by make matrix -->\n", "<!-- /versions -->\n"


def result(outcomes: dict[str, Any]) -> str:
    """How many tests passed, then what failed and what was left out, by package."""
    parts = [f"{sum(outcomes['passed'].values())} passed"]
    parts += [f"{len(lines)} of {package} failed" for package, lines in outcomes["failed"].items()]
    for package, lines in outcomes["skipped"].items():
        parts.append(f"{len(lines)} of {package} left out ({lines[0].partition(': ')[2]})")
    return "; ".join(parts)


def table(runs: list[dict[str, Any]]) -> str:
    columns = ["python", *PACKAGES]
    rows = [[run["versions"][column].partition("+")[0] for column in columns] + [result(run)] for run in runs]
    lines = [[*columns, "result"], ["---"] * (len(columns) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(paths: list[str]) -> int:
    runs = [json.loads(Path(path).read_text()) for path in paths]
    marked = f"(?s){re.escape(START)}.*?{re.escape(END)}"
    text, number = re.subn(marked, lambda _: START + table(runs) + END, PAGE.read_text())
    assert number == 1
    PAGE.write_text(text)
    return int(any(lines for run in runs for lines in run["failed"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
