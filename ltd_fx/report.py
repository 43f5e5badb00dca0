"""What was rewritten: the answer of ``ltd_fx.summary``."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class CallSite:
    """One layer of a stack, as transformed.

    Attributes:
        name: fully qualified name.
        layer_class: name of its class.
        stack: fully qualified name of the parent it shares with the rest of its stack.
        routed: whether it sees a subset of the tokens in training.
        reason: why, or why not.
        aligned: per argument, the dimensions gathered with the tokens, or the name of the function that gathers it.
        graph: the rewritten graph that the layer runs; of a dense layer ``None``.

    """

    name: str
    layer_class: str
    stack: str
    routed: bool
    reason: str
    aligned: Mapping[str, tuple[int, ...] | str]
    graph: fx.Graph | None


@dataclass(frozen=True)
class RewriteReport:
    """All target layers of a transformed model, in order; ``str()`` is a table.

    ``graph`` is the model's rewritten graph of call sites where one was captured: from ``example_inputs``, or the
    ``fx.GraphModule``'s own.
    """

    sites: list[CallSite]
    graph: fx.Graph | None = None

    def __str__(self) -> str:
        header = ("layer", "class", "tokens", "aligned", "why")
        rows = [header]
        for site in self.sites:
            aligned = ", ".join(f"{name}{_dims(dims)}" for name, dims in site.aligned.items()) if site.routed else ""
            rows.append((site.name, site.layer_class, "routed" if site.routed else "dense", aligned, site.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        routed = sum(site.routed for site in self.sites)
        return "\n".join([*lines, f"{routed} of {len(self.sites)} layers routed"])


def _dims(dims: tuple[int, ...] | str) -> str:
    return f" by {dims}" if isinstance(dims, str) else f"[{', '.join(map(str, dims))}]"
