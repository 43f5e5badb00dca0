"""What one run is: a TOML file in ``runs/``; with ``extends``, only what differs from another one."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parent / "runs"


@dataclass(frozen=True)
class Schedule:
    """How many tokens the routed layers keep.

    Attributes:
        least: kept at the start, as a share of the sequence.
        until: share of the steps after which all are kept; ``None``: ``least`` until the end.
        multiple_of: granularity of the reserved length, in tokens.
        routes: first and last layer of each; ``None``: each layer but the first and the last draws for itself.
        lr_by: ``"steps"`` or ``"layer tokens"`` (``ltd_fx.LayerTokenLR``).
    """

    least: float
    until: float | None = None
    multiple_of: int = 1
    routes: list[tuple[int, int]] | None = None
    lr_by: str = "steps"

    def routed(self, layers: int) -> int:
        """How many of a model's layers see fewer tokens."""
        if self.routes is None:
            return layers - 2
        return sum(last % layers - first % layers + 1 for first, last in self.routes)


@dataclass(frozen=True)
class Truncation:
    """Sequence-length warm-up: the first tokens of each sequence, linearly more of them.

    Attributes:
        least: share of the sequence at the start.
        until: share of the steps after which sequences are whole.
        multiple_of: granularity, in tokens.
    """

    least: float
    until: float
    multiple_of: int = 1

    def length_at(self, step: int, steps: int, whole: int) -> int:
        """Tokens of a sequence of ``whole`` tokens that are used at ``step`` of ``steps``."""
        share = self.least + (1 - self.least) * min(step / (self.until * steps), 1.0)
        return min(int(share * whole) // self.multiple_of * self.multiple_of, whole)


@dataclass(frozen=True)
class Config:
    """One run, but for its seed.

    Attributes:
        name: ``task/arm``, the file's place in ``runs/``.
        task: the module with the data and the model.
        steps: optimizer steps.
        batch: sequences a step.
        lr: peak learning rate of AdamW.
        warmup: share of the steps (or layer tokens) of linear warm-up; a cosine follows.
        last_lr: share of the peak learning rate that the cosine ends at.
        evaluations: how often the held-out data is looked at, equally spaced, the last at the end.
        average: decay of the average of the weights that is evaluated; 0: the weights themselves.
        settings: what else the task takes, sizes of the model among it.
        schedule: token dropping; ``None``: dense.
        truncation: sequence-length warm-up; ``None``: whole sequences.
    """

    name: str
    task: str
    steps: int
    batch: int
    lr: float
    warmup: float
    evaluations: int
    last_lr: float = 0.1
    average: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None
    truncation: Truncation | None = None

    def evaluated(self) -> list[int]:
        """The steps after which held-out data is looked at."""
        return [round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations)]


def load(name: str) -> Config:
    """The run ``task/arm`` of ``runs/``."""
    values = _read(RUNS / f"{name}.toml")
    for key, kind in (("schedule", Schedule), ("truncation", Truncation)):
        if key in values:
            values[key] = kind(**values[key])
    return Config(name=name, **values)


def _read(path: Path) -> dict[str, Any]:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    base = values.pop("extends", None)
    return values if base is None else _read(path.parent / base) | values
