"""What becomes of every model of the zoo: right, with its error, or refused, with the reason.

``python -m zoo.table docs/models.md`` (from ``tests/``) writes the table of the documentation.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import ltd_fx

from . import ENTRIES
from .entry import Entry

_HEAD = """# Which models are routed right

Every row is a small model with random weights, transformed with `example_inputs` and without code about its layers.
*Tested*: every routed layer equals the dense layer with attention to the dropped tokens blocked; the error is the
largest difference of the kept rows relative to the largest value (`ltd_fx.verify`, see there how it is found).
*Proven*: that, and by token flow, from the layer's operations; where only tested, the reason is why not proven.
*Refused*: `transform` raises `LTDError` with this reason, and the model is untouched.

*Learnt*: what told which of a layer's sizes follow the tokens: one forward at symbolic sizes; or, of a model that runs
at one length only, the layer's own forward at symbolic sizes or a guess; or forwards at other sizes, where it does
not run on symbols. Of a known class, it is the pattern.

Made by `python -m zoo.table ../docs/models.md` in `tests/`.

"""


class Row(NamedTuple):
    """``error`` is None where the model is refused, for ``reason``, which else says why layers are not proven."""

    entry: Entry
    layers: str
    error: float | None
    reason: str
    learnt: str = ""


def examine(entry: Entry) -> Row:
    """Transform the entry's model, and verify it at full size."""
    model, inputs = entry.build().train(), entry.inputs()
    try:
        ltd_fx.transform(model, layers=entry.layers, example_inputs=inputs, **entry.options)
    except ltd_fx.LTDError as error:
        return Row(entry, "", None, str(error).removeprefix("ltd_fx: "))
    report = ltd_fx.verify(model, inputs)
    assert report.ok, str(report)
    model(**inputs) if isinstance(inputs, dict) else model(*inputs)  # one training forward, routed
    classes = Counter(site.layer_class for site in report.sites)
    proofs = [site.proof for site in ltd_fx.summary(model).sites if site.proof is not None]
    reasons = [proof.reason for proof in proofs if proof.status == "tested"]
    learnt = ", ".join(dict.fromkeys(proof.learnt for proof in proofs))
    return Row(entry, ", ".join(classes), max(site.error or 0.0 for site in report.sites), "".join(reasons[:1]), learnt)


def _line(row: Row) -> str:
    options = ", ".join(f"`{name}={value!r}`" for name, value in row.entry.options.items())
    word = "tested" if row.reason else "proven"
    result = f"{word}, {row.error:.0e}" if row.error is not None else "refused"
    # Where the user's line is, is of this machine.
    reason = re.sub(r" \(/.*?\)", "", row.reason.split("; leave it out")[0]).replace("|", "\\|").replace("\n", " ")
    return f"| {row.entry.library} | {row.entry.name} | {row.layers} | {options} | {result} | {row.learnt} | {reason} |"


def main(path: str) -> None:
    """Write the table to ``path``."""
    warnings.simplefilter("ignore")
    rows = [examine(entry) for entry in ENTRIES]
    right = sum(row.error is not None for row in rows)
    libraries = len({entry.library for entry in ENTRIES})
    proven = sum(row.error is not None and not row.reason for row in rows)
    counts = (
        f"{right} of {len(rows)} routed right, of which {proven} proven and {right - proven} tested; "
        f"{len(rows) - right} refused; {libraries} libraries.\n"
    )
    head = "| library | model | routed layers | options | result | learnt | reason |\n|---|---|---|---|---|---|---|\n"
    Path(path).write_text(_HEAD + counts + "\n" + head + "\n".join(map(_line, rows)) + "\n")
    print(counts)


if __name__ == "__main__":
    main(sys.argv[1])
