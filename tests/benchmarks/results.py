"""What the benchmarks found, in one JSON file, a table a benchmark; one that runs again replaces its rows."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[2] / "docs" / "performance.json"
Row = dict[str, Any]


class Results:
    """Rows by table; those of a table are replaced from the first :meth:`add` on that has the same ``setting``."""

    def __init__(self, path: Path = PATH) -> None:
        self.path = path
        self.tables: dict[str, list[Row]] = json.loads(path.read_text()) if path.exists() else {}
        self._fresh: set[tuple[str, str, str]] = set()

    def add(self, table: str, row: Row) -> None:
        """Add a row; rows of an earlier session with the same ``setting`` and ``how`` go."""
        key = table, str(row.get("setting")), str(row.get("how"))
        if key not in self._fresh:
            self._fresh.add(key)
            rows = self.tables.get(table, [])
            self.tables[table] = [r for r in rows if (str(r.get("setting")), str(r.get("how"))) != key[1:]]
        self.tables.setdefault(table, []).append(row)
        self.save()

    def save(self) -> None:
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.tables, indent=1) + "\n")
        os.replace(scratch, self.path)


@cache
def results() -> Results:
    """Those of this session."""
    return Results()
