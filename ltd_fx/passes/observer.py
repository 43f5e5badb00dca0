"""What there is to see of the passes, and to switch off: the environment variable ``LTD_FX_PASSES``.

It is read at each rewrite (layers alike share one of their graph), and has words with commas between them:

- ``time``: a line on standard error for each pass, with what it changed and the milliseconds it took;
- ``dump=FOLDER``: the graph before the first pass and after each, as ``FOLDER/0003-2-align.txt`` (rewrite 3, pass 2);
- ``-check``, ``-span``: without that pass. A rewrite without ``check`` may be wrong where it would have been refused;
  one without ``span`` is right, but each layer of a route gathers and scatters.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import fx

from ltd_fx.errors import LTDError

_VARIABLE = "LTD_FX_PASSES"
_OPTIONAL = ("check", "span")  # Without the others no layer is routed, or it is routed wrong.
_rewrites = itertools.count()


def skipped_passes() -> frozenset[str]:
    """The passes that a rewrite leaves out now.

    Raises:
        LTDError: ``LTD_FX_PASSES`` has an unknown word.
    """
    return _read(os.environ.get(_VARIABLE, ""))[2]


class PassObserver:
    """Runs passes over one graph as ``LTD_FX_PASSES`` says.

    Raises:
        LTDError: it has an unknown word.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph, self._done = graph, 0
        self._timed, self._folder, self._skipped = _read(os.environ.get(_VARIABLE, ""))
        self._rewrite = next(_rewrites) if self._folder else 0
        self._dump("before")

    def run(self, name: str, run: Callable[[fx.Graph], int]) -> None:
        """Run a pass, and lint what it changed."""
        if name in self._skipped:
            return
        start = time.perf_counter()
        changed = run(self._graph)
        if changed:
            self._graph.lint()
        if self._timed:
            took = 1000 * (time.perf_counter() - start)
            print(f"ltd_fx: {name:8} {changed:4} changed {took:9.2f} ms", file=sys.stderr)
        self._done += 1
        self._dump(name)

    def _dump(self, name: str) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._rewrite:04}-{self._done}-{name}.txt"
            path.write_text("\n".join(node.format_node() or "" for node in self._graph.nodes) + "\n")


def _read(words: str) -> tuple[bool, Path | None, frozenset[str]]:
    """Whether to time, where to dump, and which passes to skip."""
    timed, folder, skipped = False, None, set[str]()
    for word in filter(None, map(str.strip, words.split(","))):
        if word == "time":
            timed = True
        elif word.startswith("dump=") and word != "dump=":
            folder = Path(word.removeprefix("dump="))
        elif word.startswith("-") and word[1:] in _OPTIONAL:
            skipped.add(word[1:])
        else:
            known = ", ".join(("time", "dump=FOLDER", *(f"-{name}" for name in _OPTIONAL)))
            raise LTDError(f"ltd_fx: {_VARIABLE} has the word {word!r}; it knows {known}")
    return timed, folder, frozenset(skipped)
