"""Train transformers on fewer tokens per layer, inside ``torch.compile``."""

import ltd_fx.cuda.ops  # noqa: F401 (registers the kernels; neither loads them nor touches CUDA)
from ltd_fx.api import check_ranks, compile_layers, is_transformed, restore, sampled_indices, summary, transform, verify
from ltd_fx.errors import LTDError
from ltd_fx.install.report import RewriteReport, VerifyReport
from ltd_fx.learn.call_site import CallSite, Proof
from ltd_fx.learn.layer_pattern import LayerPattern
from ltd_fx.learn.patterns import register_pattern
from ltd_fx.runtime.arguments import Aligned
from ltd_fx.runtime.records import Draw
from ltd_fx.schedule.lr import LayerTokenLR
from ltd_fx.schedule.scheduler import LTDScheduler
from ltd_fx.version import __version__
from ltd_fx.weights.files import load_clean, save_clean
from ltd_fx.weights.keys import clean_state_dict

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
    "check_ranks",
    "clean_state_dict",
    "compile_layers",
    "is_transformed",
    "load_clean",
    "register_pattern",
    "restore",
    "sampled_indices",
    "save_clean",
    "summary",
    "transform",
    "verify",
]
