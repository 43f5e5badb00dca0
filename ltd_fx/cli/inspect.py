"""``inspect``: which layers of a model are routed, and whether that is proven right.

The model has random weights. The exit code is 1 where a routed layer is not proven right, 2 where one is refused; with
``--why``, of that layer.
"""

import argparse
import importlib
import json
import os
import sys
from typing import Any

import torch
from torch import nn

from ltd_fx import api
from ltd_fx.errors import LTDError
from ltd_fx.learn import find_stacks, split_inputs
from ltd_fx.prove import Examination

_TOKENS, _SEQUENCES = 24, 2


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run)
    parser.add_argument(
        "model",
        help="a transformers configuration (folder, config.json or name), or module:factory, where factory() returns a "
        "model, or a model and example inputs for one forward",
    )
    parser.add_argument("--layers", metavar="REGEX", help="names of the target layers (default: find them)")
    parser.add_argument("--why", metavar="LAYER", help="print a layer's graph, with what is known of each value")
    parser.add_argument("--depth", type=int, help="build so many layers of a transformers model")


def _run(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    model, inputs = (
        _factory(options.model) if ":" in options.model else _from_transformers(options.model, options.depth)
    )
    if options.why is not None:
        return _why(model, inputs, options)
    api.transform(model, layers=options.layers, example_inputs=inputs)
    report = api.summary(model)
    proofs = {site.name: site.proof for site in report.sites if site.routed}
    verified = all(proof is not None and proof.right for proof in proofs.values())
    if options.json:
        sites = [
            {
                "name": site.name,
                "class": site.layer_class,
                "routed": site.routed,
                "reason": site.reason,
                "aligned": {name: str(entry) for name, entry in site.aligned.items()},
                "status": site.status if site.routed else None,
                "error": None if site.proof is None else site.proof.error,
            }
            for site in report.sites
        ]
        print(json.dumps({"verified": verified, "layers": sites}))
    else:
        print(report)
    return 0 if verified else 1


def _why(model: nn.Module, inputs: Any, options: argparse.Namespace) -> int:
    """Print what is known of one layer, before the error where it cannot be routed."""
    if options.json:
        raise LTDError("ltd_fx inspect: --why is for people; leave out --json")
    if inputs is None:
        raise LTDError("ltd_fx inspect: --why needs example inputs: have the factory return (model, inputs)")
    found = {layer.name: layer for stack in find_stacks(model, options.layers) for layer in stack}
    if options.why not in found:
        raise LTDError(f"ltd_fx inspect: --why {options.why} is none of the target layers {', '.join(found)}")
    layer = found[options.why]
    slots = {layer.name: model.get_submodule(layer.name)}
    examination = Examination(model, [layer], slots, split_inputs(inputs))
    status, refusal = "refused", None
    try:
        status = examination.accept(layer, shared=False, protected=0).status
    except LTDError as error:
        refusal = error
    print(f"{layer.name} ({layer.layer_class}): {status}\n{examination.explain(layer, shared=False, protected=0)}")
    if refusal is not None:
        raise refusal
    return 0 if status in ("proven", "tested") else 1


def _factory(name: str) -> tuple[nn.Module, Any]:
    module, _, attribute = name.partition(":")
    # `python -m` has the folder on its path; so has this where it is called as a function.
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise LTDError(f"ltd_fx inspect: {name} cannot be built: {error}") from error
    finally:
        sys.path.pop(0)
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise LTDError(f"ltd_fx inspect: {name}() must return an nn.Module, or one and example inputs, got {made!r}")
    return model, inputs


def _from_transformers(name: str, depth: int | None) -> tuple[nn.Module, Any]:
    try:
        import transformers
    except ImportError:
        raise LTDError("ltd_fx inspect: a configuration needs transformers; pip install transformers") from None
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise LTDError(f"ltd_fx inspect: {name} is no transformers configuration: {error}") from error
    if depth is not None:
        if depth < 1:
            raise LTDError(f"ltd_fx inspect: --depth must be positive, got {depth}")
        config.num_hidden_layers = depth
    known = [cls for cls in config.architectures or () if hasattr(transformers, cls)]
    build: Any = getattr(transformers, known[0]) if known else transformers.AutoModel.from_config
    model = build(config)
    return model, _inputs_for(model, config)


def _inputs_for(model: Any, config: Any) -> dict[str, torch.Tensor] | None:
    """Example inputs of a text or image model; ``None`` for others, which are then not checked."""
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.randn(_SEQUENCES, config.num_channels, height, width)}
    if model.main_input_name != "input_ids":
        return None
    ids = torch.randint(config.vocab_size, (_SEQUENCES, _TOKENS))
    mask = torch.ones_like(ids)
    mask[1, -_TOKENS // 4 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : _TOKENS - 4]
    return inputs
