"""Tiny, randomly initialised models of several libraries, each with the inputs of one training forward."""

from . import decoders, diffusion, encoders, others, seq2seq, vision
from .entry import Entry

__all__ = ["ENTRIES", "Entry"]

ENTRIES: list[Entry] = [
    *decoders.ENTRIES,
    *encoders.ENTRIES,
    *seq2seq.ENTRIES,
    *vision.ENTRIES,
    *others.ENTRIES,
    *diffusion.ENTRIES,
]
