"""The training text, present wherever Python is: the source of its own standard library, as bytes."""

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_EXCLUDED = frozenset(("site-packages", "dist-packages", "test", "tests"))
_HELD_OUT = 20  # every 20th file is for validation


def read_standard_library() -> tuple[Tensor, Tensor]:
    """The bytes of its modules, in the order of their paths: for training, and for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if _EXCLUDED.isdisjoint(path.relative_to(root).parts))
    if not paths:
        raise FileNotFoundError(f"no Python source in {root}: this Python comes without its standard library's text")
    files = [path.read_bytes() for path in paths]
    held_out = files[::_HELD_OUT]
    del files[::_HELD_OUT]
    training, validation = (
        torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in (files, held_out)
    )
    return training, validation


def training_batch(text: Tensor, step: int, *, seed: int, size: int, length: int) -> Tensor:
    """The batch of ``step``: ``size`` windows at random. Pure in seed and step: there is no generator to save."""
    starts = np.random.default_rng((seed, step)).integers(len(text) - length, size=size)
    return _windows(text, starts.tolist(), length)


def validation_batches(text: Tensor, count: int, *, size: int, length: int) -> list[Tensor]:
    """``count`` batches of windows spread evenly over ``text``."""
    starts = np.linspace(0, len(text) - length - 1, count * size).astype(int)
    return [_windows(text, part.tolist(), length) for part in np.split(starts, count)]


def _windows(text: Tensor, starts: Iterable[int], length: int) -> Tensor:
    """``[len(starts), length + 1]``: the inputs and, one further, the targets."""
    return torch.stack([text[start : start + length + 1] for start in starts]).long()
