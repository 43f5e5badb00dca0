"""Files that are there whole, or as they were before."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"  # a JSON file a run; its checkpoint, too, while it is under way
SCRATCH = HERE.parent / "runs" / "study"  # images, logs


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Have ``save`` write a file, and then put it in its place; several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save(scratch)
    os.replace(scratch, path)
