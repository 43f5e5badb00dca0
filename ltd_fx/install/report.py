"""What was rewritten and what was found: the answers of ``ltd_fx.summary`` and ``ltd_fx.verify``."""

from dataclasses import dataclass
from typing import Any

from ltd_fx.learn import CallSite, Proof
from ltd_fx.runtime import Aligned


@dataclass(frozen=True)
class VerifyReport:
    """The proofs of all routed layers, in order (``sites``); ``str()`` is a table."""

    sites: list[Proof]

    @property
    def ok(self) -> bool:
        """Whether every site is proven or tested."""
        return all(site.right for site in self.sites)

    def __str__(self) -> str:
        width = max(len(site.name) for site in self.sites)
        lines = []
        for site in self.sites:
            error = "" if site.error is None else f"{site.error:.1e}"
            lines.append(f"{site.name:{width}}  {site.status:14}  {error:7}  {site.reason}".rstrip())
        right = sum(site.right for site in self.sites)
        return "\n".join([*lines, f"{right} of {len(self.sites)} routed layers proven or tested"])


@dataclass(frozen=True)
class RewriteReport:
    """All target layers of a transformed model, in order (``sites``), and whether routing pays, where ``warm_up``
    measured it (``note``, else empty); ``str()`` is a table.
    """

    sites: list[CallSite]
    note: str = ""

    def __str__(self) -> str:
        header = ("layer", "class", "tokens", "aligned", "why")
        rows = [header]
        for site in self.sites:
            aligned = ", ".join(f"{name}{_dims(dims)}" for name, dims in site.aligned.items()) if site.routed else ""
            rows.append((site.name, site.layer_class, site._tokens(), aligned, site._why()))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        routed = sum(site.routed for site in self.sites)
        return "\n".join([*lines, f"{routed} of {len(self.sites)} layers routed", *filter(None, [self.note])])


def _dims(entry: Any) -> str:
    if isinstance(entry, str):
        return f" by {entry}"
    if isinstance(entry, Aligned):
        prefix = " + others" if entry.prefix is None else f" {entry.prefix:+}" if entry.prefix else ""
        return f"[{', '.join(map(str, entry.dims))}{prefix}]"
    items = (_dims(item) if isinstance(item, tuple) else "-" if item is None else str(item) for item in entry)
    return f"[{', '.join(items)}]"
