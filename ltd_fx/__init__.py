"""Train transformers on fewer tokens per layer, inside ``torch.compile``."""

from ltd_fx.api import is_transformed, restore, sampled_indices, summary, transform
from ltd_fx.draw import Draw
from ltd_fx.errors import LTDError
from ltd_fx.patterns import LayerPattern, register_pattern
from ltd_fx.report import CallSite, RewriteReport
from ltd_fx.schedule import LTDScheduler

__version__ = "0.1.0"

__all__ = [
    "CallSite",
    "Draw",
    "LTDError",
    "LTDScheduler",
    "LayerPattern",
    "RewriteReport",
    "is_transformed",
    "register_pattern",
    "restore",
    "sampled_indices",
    "summary",
    "transform",
]
