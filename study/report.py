"""``docs/learning.md``'s tables and its pictures, from the JSON files alone: ``python study/report.py [PAGE]``."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from all import SWEEP
from claims import CLAIMS
from files import HERE
from intervals import of_mean
from matplotlib.figure import Figure
from outcomes import Result, at_the_end, results

PAGE = HERE.parent / "docs" / "learning.md"
REPEATS = HERE / "repeats"  # runs done once more, on a fresh clone
METRICS = {
    "text": {"loss": "loss, nats a byte", "python": "Python", "prose": "prose"},
    "hot": {"loss": "loss, nats a byte", "python": "Python", "prose": "prose"},
    "letters": {"loss": "loss", "accuracy": "accuracy, %"},
    "digits": {"loss": "loss", "accuracy": "accuracy, %"},
    "diffusion": {
        "frechet": "Fréchet distance",
        "accuracy": "taken for their class, %",
        "frechet_guided": "Fréchet distance, guided",
        "accuracy_guided": "taken for their class, guided, %",
    },
}


def claims() -> str:
    rows = []
    for claim in CLAIMS:
        effects = claim.effects()
        said = [f"{of_mean(effects) if len(effects) > 1 else f'{effects[0]:+.2f}'} {claim.unit}"] if effects else [""]
        rows.append((claim.text, f"**{claim.verdict()}**", *said, len(effects)))
    return table(("claim", "verdict", "effect, 95% interval", "seeds"), rows)


def arms(task: str) -> str:
    metrics = METRICS[task]
    dense = results().get(f"{task}/dense", {})
    rows = []
    for name, runs in results().items():
        if name.startswith(f"{task}/") and name not in SWEEP and dense:
            tokens, seconds = (
                mean(at_the_end(run, cost) for run in runs.values())
                / mean(at_the_end(run, cost) for run in dense.values())
                for cost in ("layer_tokens", "seconds")
            )
            values = (spread([at_the_end(run, metric) for run in runs.values()]) for metric in metrics)
            steps = next(iter(runs.values()))["config"]["steps"]
            rows.append((name.partition("/")[2], len(runs), steps, f"{tokens:.1%}", f"{seconds:.1%}", *values))
    head = ("arm", "seeds", "steps", "layer tokens of dense", "CPU seconds of dense", *metrics.values())
    return table(head, sorted(rows, key=lambda row: row[0] != "dense"))


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g}"
    interval = of_mean(values)
    return f"{interval.mean:.4g} ± {interval.high - interval.mean:.2g}"


def sweep() -> str:
    tried = SWEEP | {"text/dense": 0, "hot/dense": 0}
    runs = [results()[name][seed] for name, seed in tried.items() if name in results()]
    rows = sorted((run["config"]["steps"], run["config"]["lr"], f"{at_the_end(run, 'loss'):.4f}") for run in runs)
    return table(("steps", "learning rate", "held-out loss, dense"), rows)


def cost() -> str:
    runs = [run for by_seed in results().values() for run in by_seed.values()]
    rows = []
    for task in METRICS:
        own = [run for run in runs if run["config"]["name"].startswith(f"{task}/")]
        if own:
            hours = sum(at_the_end(run, "seconds") for run in own) / 3600
            parameters = own[0]["parameters"] / 1e6
            machines = {
                f"{m['device']}, torch {m['torch']}, {m['threads']} thread" for m in (run["machine"] for run in own)
            }
            rows.append((task, f"{parameters:.2f} million", len(own), f"{hours:.2f}", "; ".join(sorted(machines))))
    return table(("task", "parameters", "runs", "CPU hours of training", "machine"), rows)


def repeats() -> str:
    rows = []
    for name, runs in results(REPEATS).items():
        for seed, again in runs.items():
            first = results()[name][seed]
            same = learnt(first) == learnt(again)
            rows.append((name, seed, again["evaluations"][-1]["step"], "to the bit" if same else "no"))
    return table(("run", "seed", "steps", "same numbers at every evaluation"), rows)


def learnt(result: Result) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result["evaluations"]]


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, row)) for row in rows]
    top = list(map(str, head))
    return "\n".join("| " + " | ".join(row) + " |" for row in (top, ["---"] * len(top), *lines))


def curves(task: str, metric: str, path: Path) -> None:
    """The metric against steps, layer tokens and seconds, means over seeds."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for name, runs in results().items():
        if not name.startswith(f"{task}/") or name in SWEEP:
            continue
        rows = [run["evaluations"] for run in runs.values()]
        values = [mean(row[metric] for row in at) for at in zip(*rows, strict=True)]
        for axes, cost in zip(panels, ("step", "layer_tokens", "seconds"), strict=True):
            axes.plot(
                [mean(row[cost] for row in at) for at in zip(*rows, strict=True)], values, label=name.partition("/")[2]
            )
    for axes, label in zip(panels, ("steps", "layer tokens", "CPU seconds"), strict=True):
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(METRICS[task][metric])
    panels[0].legend()
    figure.savefig(path, dpi=100)


def main(page: Path = PAGE) -> None:
    text = page.read_text(encoding="utf-8")
    made = {"claims": claims, "sweep": sweep, "cost": cost, "repeats": repeats}
    made |= {task: lambda task=task: arms(task) for task in METRICS}
    for name, make in made.items():
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text, count = re.subn(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
        assert count == 1, f"{page} has no place for {name}"
    page.write_text(text, encoding="utf-8")
    for task, metric in (("text", "loss"), ("diffusion", "frechet")):
        if f"{task}/dense" in results():
            curves(task, metric, page.with_name(f"learning-{task}.png"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
