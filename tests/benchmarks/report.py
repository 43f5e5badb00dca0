"""Put the results into docs/performance.md, between the markers of each table, and draw docs/performance.png.

python tests/benchmarks/report.py
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from results import PATH, Results, Row

PAGE = PATH.with_suffix(".md")


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(header), ["---"] * len(list(header)), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(values: list[float] | None, digits: int = 2) -> str:
    return "" if values is None else "{:.{n}f} ({:.{n}f} to {:.{n}f})".format(*values, n=digits)


def speed(rows: list[Row]) -> str:
    shown = ("dense", "ideal", "routed")
    header = ("setting", "", "rounds", *(f"{variant}, CPU seconds" for variant in shown))
    return table(
        (*header, "time saved", "operations saved, planned"),
        (
            (
                *setting,
                of["routed"]["rounds"],
                *(interval([of[variant]["cpu_s"][i] for i in (1, 0, 2)]) for variant in shown),
                f"{of['routed']['saved'][0]:.1%}",
                f"{of['routed']['planned']:.1%}",
            )
            for setting, of in by_setting(rows)
        ),
    )


def efficiency(rows: list[Row]) -> str:
    others = [v for v in dict.fromkeys(row["variant"] for row in rows) if v not in ("dense", "ideal", "routed")]
    return table(
        ("setting", "", "routed", "routed, by wall time", *others),
        (
            (
                *setting,
                interval(of["routed"]["efficiency_cpu"]),
                interval(of["routed"]["efficiency_wall"]),
                *(interval(of[variant]["efficiency_cpu"] if variant in of else None) for variant in others),
            )
            for setting, of in by_setting(rows)
        ),
    )


def by_setting(rows: list[Row]) -> list[tuple[tuple[str, str], dict[str, Row]]]:
    """((setting, how), rows by variant): compiled first, then by name."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["setting"], row["how"]), {})[row["variant"]] = row
    return sorted(found.items(), key=lambda item: item[0][::-1])


def static(rows: list[Row]) -> str:
    return table(
        ("setting", "by CPU time", "by wall time"),
        ((row["setting"], interval(row["cpu"], 3), interval(row["wall"], 3)) for row in rows),
    )


def memory(rows: list[Row]) -> str:
    return table(
        ("setting", "", "variant", "peak, MiB", "of the ideal", "saved for the backward, MiB", "of the ideal"),
        (
            (
                row["setting"],
                row["how"],
                row["variant"],
                f"{row['peak'] / 2**20:.1f}",
                f"{row['ratios'][0]:.3f}",
                f"{row['saved'] / 2**20:.1f}",
                f"{row['ratios'][1]:.3f}",
            )
            for row in rows
        ),
    )


def traffic(rows: list[Row]) -> str:
    return table(
        ("setting", "", "variant", "forward, B·k·d", "backward, B·k·d", "kernels forward", "backward"),
        (
            (
                row["setting"],
                row["how"],
                row["variant"],
                *(f"{value:+.2f}" for value in row["elements"]),
                *(f"{value:+}" for value in row["kernels"]),
            )
            for row in rows
        ),
    )


def walk(rows: list[Row]) -> str:
    return table(
        ("walk", "backend", "variant", "graphs", "CPU seconds of compilation", "then eager"),
        (
            (r["setting"], r["how"], r["variant"], r["graphs"], f"{r['seconds']:.1f}", "yes" if r["eager"] else "")
            for r in rows
        ),
    )


def depth(rows: list[Row]) -> str:
    return table(
        ("compiled", "layers", "dense, CPU seconds", "routed, CPU seconds"),
        ((r["how"], r["setting"], f"{r['dense']:.1f}", f"{r['routed']:.1f}") for r in rows),
    )


def parts(rows: list[Row]) -> str:
    return table(
        ("", "torch itself, CPU seconds", "C++ compilers", "both"),
        ((r["how"], *(f"{s:.1f}" for s in (r["torch"], r["compilers"], r["torch"] + r["compilers"]))) for r in rows),
    )


def pause(rows: list[Row]) -> str:
    kinds = ("warm_up", "first", "steps", "evaluations")
    return table(
        (
            "",
            "graphs",
            "in warm_up, s",
            "first evaluation and step, s",
            "longest later step, s",
            "longest later evaluation, s",
        ),
        ((r["setting"], r["graphs"], *(f"{r[kind]:.2f}" for kind in kinds)) for r in rows),
    )


def dispatch(rows: list[Row]) -> str:
    variants = ("dense", "hand-written", "routed")
    return table(
        ("model", "rounds", *variants, "routed over hand-written"),
        (
            (r["setting"], r["rounds"], *(interval(r[variant], 0) for variant in variants), interval(r["ratio"]))
            for r in rows
        ),
    )


def growth(rows: list[Row]) -> str:
    return table(
        ("S", "d", "B", "layers", "routing, ms", "copies, ms", "layers, ms", "share"),
        (
            (
                *r["setting"],
                f"{r['route_ms']:.2f}",
                f"{r['copies_ms']:.2f}",
                f"{r['layer_ms']:.0f}",
                f"{r['share']:.2%}",
            )
            for r in rows
        ),
    )


def growth_fit(rows: list[Row]) -> str:
    (row,) = rows
    return (
        f"Fitted: {row['ms']:.2f} ms and {row['ns_an_element']:.2f} ns an element of B·S·d·layers, both directions; "
        f"no measurement is more than {row['worst']:.0%} off."
    )


# by its place in the page: the results it is made of, and how
TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    f.__name__: (f.__name__, f)
    for f in (speed, static, memory, traffic, walk, depth, parts, pause, dispatch, growth, growth_fit)
} | {"efficiency": ("speed", efficiency)}


def draw(results: Results) -> None:
    """Realised efficiency of the compiled settings, with its intervals."""
    from matplotlib.figure import Figure

    rows = [r for r in results.tables["speed"] if r["how"] == "compiled" and "efficiency_cpu" in r]
    settings = sorted({r["setting"] for r in rows})
    variants = [v for v in dict.fromkeys(r["variant"] for r in rows) if v != "ideal"]
    figure = Figure(figsize=(9, 0.6 + 0.6 * len(settings)), layout="constrained")
    axes = figure.subplots()
    for j, variant in enumerate(variants):
        mine = [r for r in rows if r["variant"] == variant]
        y = [settings.index(r["setting"]) + (j - len(variants) / 2) / (len(variants) + 1) for r in mine]
        middle, low, high = zip(*(r["efficiency_cpu"] for r in mine), strict=True)
        errors = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar(middle, y, xerr=errors, fmt="o", capsize=2, label=variant)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(settings)), settings)
    axes.invert_yaxis()
    axes.set_xlabel("realised efficiency by CPU time: time saved over what the ideal saves (90% interval)")
    axes.legend(fontsize="small")
    figure.savefig(PATH.with_suffix(".png"), dpi=120)


def main() -> None:
    results = Results()
    page = PAGE.read_text()
    for name, (source, write) in TABLES.items():
        if source not in results.tables:
            continue
        text = write(results.tables[source])
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.S
        )
        assert count == 1, f"{PAGE} has no place for {name}"
    PAGE.write_text(page)
    if "speed" in results.tables:
        draw(results)


if __name__ == "__main__":
    main()
