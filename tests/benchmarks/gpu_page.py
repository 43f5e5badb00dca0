"""``docs/gpu.md`` from ``docs/gpu.json``."""

from collections.abc import Iterator
from typing import Any

from report import interval, table


def page(found: dict[str, Any]) -> str:
    """The page, a section a part; what failed or was left out is said in its place."""
    said = ", ".join(f"{name} {value}" for name, value in found["identity"].items() if value)
    lines = ["# On a GPU", "", f"Made by `make gpu` from `docs/gpu.json`: {said}.", ""]
    for name, part in found["parts"].items():
        lines += [f"## {name[0].upper()}{name[1:]}", *_section(name, part), ""]
    return "\n".join(lines)


def _section(name: str, part: dict[str, Any]) -> Iterator[str]:
    if "error" in part:
        yield from ("Failed:", "", "```", *part["error"], "```")
        return
    result = part["result"]
    if name == "kernels":
        columns = [column for column in result[0] if column != "shape"]
        rows = [(row["shape"], *(f"{row[column]:.1f}" for column in columns)) for row in result]
        yield table(("microseconds", *columns), rows)
    elif isinstance(result, list):
        yield table(
            ("", "milliseconds a step", "realised efficiency", "peak, MiB", "launches"),
            (
                (
                    row["variant"],
                    interval(row["ms"]),
                    interval(row.get("efficiency")),
                    f"{row['peak_mib']:.0f}" if "peak_mib" in row else "",
                    row.get("launches", ""),
                )
                for row in result
            ),
        )
    elif name == "CUDA graphs":
        yield (
            f"Lengths {result['lengths']}, three steps each: {result['first']:.1f} s while graphs are made, "
            f"{result['then']:.2f} s then."
        )
    else:
        runs = {name: result} if "tail" in result or "skipped" in result else result
        for what, run in runs.items():
            yield run["skipped"] if "skipped" in run else f"{what}: {run['tail'][-1] if run['tail'] else run['code']}"
            yield from (f"- {line}" for line in run.get("failed", ()))
