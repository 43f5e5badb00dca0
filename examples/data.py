"""The text of the example: the source of Python's own standard library, as bytes. Nothing to download."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def standard_library(share_held_out: float = 0.05) -> tuple[Tensor, Tensor]:
    """Training and validation text as uint8; every n-th file is held out, so both have all kinds of modules."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    every = round(1 / share_held_out)
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(files):
        texts[i % every == 0].append(path.read_bytes())
    train, valid = (torch.frombuffer(bytearray(b"\n".join(text)), dtype=torch.uint8) for text in texts)
    return train, valid


def batch(text: Tensor, size: int, length: int, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """``size`` random windows and their next bytes, each ``[size, length]`` int64: a pure function of the arguments."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    starts = torch.randint(len(text) - length, (size, 1), generator=generator)
    window = text[starts + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]
