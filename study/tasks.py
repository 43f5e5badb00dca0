"""What a task offers, and where each is."""

import importlib
from typing import Protocol, cast

from config import Config
from torch import Tensor, nn


class Task(Protocol):
    """Data and a model for it.

    Attributes:
        tokens: of a whole sequence.
        layers: of the model.
        protect: first tokens that every layer keeps.
    """

    tokens: int
    layers: int
    protect: int

    def model(self, seed: int) -> nn.Module:
        """A new model, its weights drawn from ``seed``."""

    def loss(self, model: nn.Module, seed: int, step: int, length: int) -> Tensor:
        """The training loss of the batch of ``step``, a pure function of the arguments, over ``length`` tokens."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What the held-out data says of a model in eval mode."""


def make_task(config: Config, device: str) -> Task:
    """The task of a run, from the module of its name."""
    return cast(Task, importlib.import_module(config.task).make(config, device))
