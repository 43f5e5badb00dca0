"""``clean``: any checkpoint, with the untransformed model's keys."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.weights import clean_state_dict, read_checkpoint, save_clean

# Where trainers keep the weights in a larger file; "module" is DeepSpeed's.
_NESTED = ("state_dict", "model", "module", "model_state_dict")


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run)
    parser.add_argument("input", help="safetensors, or what torch.save wrote")
    parser.add_argument("output", help="ends in .safetensors or .pt")


def _run(options: argparse.Namespace) -> int:
    state = _weights(read_checkpoint(options.input), options.input)
    clean = clean_state_dict(state)
    save_clean(state, options.output)
    renamed = sum(key not in state for key in clean)
    if options.json:
        print(json.dumps({"tensors": len(clean), "renamed": renamed, "output": options.output}))
    else:
        print(f"{options.output}: {len(clean)} tensors, {renamed} renamed")
    return 0


def _weights(loaded: Any, path: str) -> Mapping[str, Tensor]:
    candidates = [loaded, *(loaded.get(key) for key in _NESTED)] if isinstance(loaded, Mapping) else []
    for state in candidates:
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return state
    raise LTDError(
        f"ltd_fx clean: {path} holds no mapping from names to tensors, by itself or as {', '.join(_NESTED)}; save the "
        "model's state_dict() from your script"
    )
