"""``make gpu``: everything that only a GPU can show, in eight minutes, into docs/gpu.json and docs/gpu.md.

It needs torch and what tests need, no network, and nothing is built. A part that is done is not done again: after a
cut, run it anew. ``--dry`` runs every part on the CPU at tiny sizes, to show that it would run.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_parts
import torch
import transformers  # noqa: F401 (its version is a part of the figures' identity)
from gpu_page import page

DOCS = Path(__file__).parents[2] / "docs"
SECONDS = 8 * 60

# In the order that tells most soonest.
PARTS: dict[str, Callable[[bool], Any]] = {
    "tests": gpu_parts.cuda_tests,
    "kernels": gpu_parts.kernels,
    "llama, eager": lambda dry: gpu_parts.steps("llama", False, dry),
    "llama, compiled": lambda dry: gpu_parts.steps("llama", True, dry),
    "sanitizer": gpu_parts.sanitizer,
    "vit, eager": lambda dry: gpu_parts.steps("vit", False, dry),
    "dit, eager": lambda dry: gpu_parts.steps("dit", False, dry),
    "CUDA graphs": gpu_parts.walk,
    "vit, compiled": lambda dry: gpu_parts.steps("vit", True, dry),
    "dit, compiled": lambda dry: gpu_parts.steps("dit", True, dry),
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done yet; the exit code is 1 if a part failed, 75 if time ran out before the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument(
        "--out", type=Path, help="where gpu.json and gpu.md go (default: docs; dry: nowhere that stays)"
    )
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("there is no GPU here; --dry runs every part on the CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        return _run(options.out or (Path(scratch) if options.dry else DOCS), options.dry)


def _run(out: Path, dry: bool) -> int:
    path, identity = out / "gpu.json", gpu_parts.identity()
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if done.get("identity") != identity:  # Another card, or other versions: figures of one run stand together.
        done = {"identity": identity, "parts": {}}
    until, code = time.monotonic() + SECONDS, 0
    for name, part in PARTS.items():
        if "error" not in done["parts"].get(name, {"error": ""}):
            print(f"{name}: done before")
            continue
        if time.monotonic() > until:
            print(f"{name}: no time left; run it again to go on from here")
            return 75
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            done["parts"][name] = {"result": part(dry)}
        except Exception:
            done["parts"][name] = {"error": traceback.format_exc().splitlines()[-12:]}
            code = 1
        print(f"{name}: {'failed' if 'error' in done['parts'][name] else 'done'}, {time.monotonic() - start:.0f} s")
        _write(path, json.dumps(done, indent=1) + "\n")
        _write(path.with_suffix(".md"), page(done))
    return code


def _write(path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


if __name__ == "__main__":
    sys.exit(main())
