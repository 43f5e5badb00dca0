"""Weights under the untransformed model's names, whatever wraps it, in and out of files."""

from ltd_fx.weights.files import load_clean, read_checkpoint, save_clean
from ltd_fx.weights.keys import clean_state_dict, held_by, unwrapped, without_components
