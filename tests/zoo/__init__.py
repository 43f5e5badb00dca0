"""Tiny, randomly initialised models of several libraries, each with the inputs of one training forward."""

from dataclasses import replace

from . import decoders, diffusion, encoders, others, seq2seq, vision
from .entry import Entry
from .expected import OPTIONS, REFUSED

__all__ = ["ENTRIES", "Entry"]

_MODULES = (decoders, encoders, seq2seq, vision, others, diffusion)
ENTRIES: list[Entry] = [
    replace(entry, options=OPTIONS.get(entry.name, {}), refused=REFUSED.get(entry.name))
    for module in _MODULES
    for entry in module.ENTRIES
]
