"""Train transformers on fewer tokens per layer, inside ``torch.compile``."""

import ltd_fx.cuda  # noqa: F401 (registers the kernels)
from ltd_fx.api import (
    check_ranks,
    compile_layers,
    is_transformed,
    restore,
    same_draws,
    sampled_indices,
    summary,
    transform,
    verify,
)
from ltd_fx.dynamo import backend
from ltd_fx.errors import LTDError
from ltd_fx.install import RewriteReport, VerifyReport, warm_up
from ltd_fx.learn import CallSite, LayerPattern, Proof, register_pattern
from ltd_fx.runtime import Aligned, Draw
from ltd_fx.schedule import LayerTokenLR, LTDScheduler
from ltd_fx.version import __version__
from ltd_fx.weights import clean_state_dict, load_clean, save_clean

__all__ = [
    "Aligned",
    "CallSite",
    "Draw",
    "LTDError",
    "LTDScheduler",
    "LayerPattern",
    "LayerTokenLR",
    "Proof",
    "RewriteReport",
    "VerifyReport",
    "__version__",
    "backend",
    "check_ranks",
    "clean_state_dict",
    "compile_layers",
    "is_transformed",
    "load_clean",
    "register_pattern",
    "restore",
    "same_draws",
    "sampled_indices",
    "save_clean",
    "summary",
    "transform",
    "verify",
    "warm_up",
]
