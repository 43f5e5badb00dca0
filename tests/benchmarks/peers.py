"""What is compared: each changes a model in place, all layers routed; those that can, return what sets their length.

``ideal`` is the bound: the same layers on the first k tokens, with no routing. ``hand-written`` is what a user would
write in ten lines; ``deepspeed`` is the wrapper of DeepSpeed's package, with torch in place of its CUDA kernels;
``tread`` drops tokens over all layers at once, by hand; ``route`` is that in ltd_fx; ``shared`` is *routed* with one
draw for the whole batch, and measured only where that matters; ``backend`` is a plain model that is compiled with
``ltd_fx.backend``.
"""

import importlib.util
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Setting, layers_of
from torch import Tensor, nn

import ltd_fx

# The arguments of the layers that carry the sequence, and along which dimensions.
_SEQUENCE = {"attention_mask": (2, 3), "position_ids": (1,), "position_embeddings": (1,)}
Index = Callable[[Tensor, int], Tensor]
SetLength = Callable[[int], None]


def _map(value: Any, dims: tuple[int, ...], take: Index) -> Any:
    if isinstance(value, tuple):
        return tuple(_map(item, dims, take) for item in value)
    if isinstance(value, Tensor):
        for dim in dims:
            value = take(value, dim) if value.shape[dim] > 1 else value
    return value


def _fewer(kwargs: dict[str, Any], take: Index) -> dict[str, Any]:
    return {name: _map(value, _SEQUENCE.get(name, ()), take) for name, value in kwargs.items()}


def _wrap(layer: nn.Module, run: Callable[..., Any]) -> None:
    """Have ``run(forward, hidden, kwargs)`` stand for the layer's forward."""
    forward, signature = layer.forward, inspect.signature(layer.forward)
    (_, *names) = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    def wrapped(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run(forward, hidden, {**dict(zip(names, args, strict=False)), **kwargs})

    layer.forward = wrapped


def dense(model: nn.Module, setting: Setting) -> None:
    pass


def ideal(model: nn.Module, setting: Setting) -> None:
    layers, rest, keep = layers_of(model), [], setting.keep

    def first_tokens(forward: Any, hidden: Tensor, kwargs: Any) -> Any:
        if hidden.shape[1] > keep:
            rest.append(hidden[:, keep:])
            hidden = hidden[:, :keep]
        return forward(hidden, **_fewer(kwargs, lambda t, dim: t.narrow(dim, 0, keep)))

    def last(forward: Any, hidden: Tensor, kwargs: Any) -> Any:
        return torch.cat([first_tokens(forward, hidden, kwargs), rest.pop()], dim=1)

    for layer in layers:
        _wrap(layer, last if layer is layers[-1] else first_tokens)


def _scheduler(setting: Setting) -> ltd_fx.LTDScheduler:
    """The step is the length."""
    scheduler = ltd_fx.LTDScheduler(1, 1 << 20, 1, kind=lambda step: step)
    scheduler.set_step(setting.keep)
    return scheduler


def backend(model: nn.Module, setting: Setting) -> SetLength:
    scheduler = _scheduler(setting)
    model.compile(backend=ltd_fx.backend(scheduler, skip_first=0, skip_last=0))
    return scheduler.set_step


def routed(model: nn.Module, setting: Setting, **options: Any) -> SetLength:
    scheduler = _scheduler(setting)
    ltd_fx.transform(model, scheduler, skip_first=0, skip_last=0, **options)
    return scheduler.set_step


def route(model: nn.Module, setting: Setting) -> SetLength:
    return routed(model, setting, routes=[(0, -1, None)], example_inputs=setting.inputs())


def _sample(hidden: Tensor, keep: int) -> Tensor:
    return torch.rand(hidden.shape[:2], device=hidden.device).argsort(1)[:, :keep].sort(1).values


def _taker(kept: Tensor) -> Index:
    def take(value: Tensor, dim: int) -> Tensor:
        value = value.expand(len(kept), *value.shape[1:])
        index = kept.view(len(kept), *[-1 if i == dim else 1 for i in range(1, value.ndim)])
        shape = [kept.shape[1] if i == dim else n for i, n in enumerate(value.shape)]
        return value.gather(dim, index.expand(shape))

    return take


class HandWritten(nn.Module):
    """As users write it: around the layer, with the reserved length as an attribute."""

    def __init__(self, layer: nn.Module, keep: int) -> None:
        super().__init__()
        self.layer, self.keep = layer, keep
        parameters = inspect.signature(layer.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {**kwargs, **dict(zip(self.names, args, strict=False))}
        if self.keep >= hidden.shape[1]:
            return self.layer(hidden, **kwargs)
        kept = _sample(hidden, self.keep)
        rows = kept[..., None].expand(-1, -1, hidden.shape[2])
        return hidden.scatter(1, rows, self.layer(hidden.gather(1, rows), **_fewer(kwargs, _taker(kept))))


def hand_written(model: nn.Module, setting: Setting) -> SetLength:
    layers = layers_of(model)
    for i, layer in enumerate(layers):
        layers[i] = HandWritten(layer, setting.keep)

    def set_length(keep: int) -> None:
        for layer in layers:
            layer.keep = keep

    return set_length


def tread(model: nn.Module, setting: Setting) -> None:
    layers, out = layers_of(model), []

    def start(forward: Any, hidden: Tensor, kwargs: Any) -> Any:
        kept = _sample(hidden, setting.keep)
        rows = kept[..., None].expand(-1, -1, hidden.shape[2])
        out.append((hidden, rows, _fewer(kwargs, _taker(kept))))
        return forward(hidden.gather(1, rows), **out[0][2])

    def inner(forward: Any, hidden: Tensor, kwargs: Any) -> Any:
        return forward(hidden, **out[0][2])

    def end(forward: Any, hidden: Tensor, kwargs: Any) -> Any:
        full, rows, fewer = out.pop()
        return full.scatter(1, rows, forward(hidden, **fewer))

    for layer in layers:
        _wrap(layer, start if layer is layers[0] else end if layer is layers[-1] else inner)


def deepspeed(model: nn.Module, setting: Setting) -> SetLength:
    """Its wrapper and autograd functions as they are, torch in place of its CUDA kernels; no rotary positions."""
    basic = pytest.importorskip("deepspeed.runtime.data_pipeline.data_routing.basic_layer")
    from deepspeed.ops.random_ltd import dropping_utils

    dropping_utils.random_ltd_module = types.SimpleNamespace(
        token_sort_=lambda indices, seq_len: indices.sort(-1).values,
        token_gather=lambda hidden, indices, batch_first: hidden.gather(1, _rows(hidden, indices)),
        token_scatter_=lambda hidden, kept, indices, batch_first: hidden.scatter_(1, _rows(hidden, indices), kept),
    )
    layers = layers_of(model)
    scheduler = Scheduler(setting.keep, len(layers))
    config = {"hidden_state_order": "batch_seq_dim", "micro_batch_size": setting.batch}
    config |= (
        {"model_type": "encoder", "model_mask_name": "attention_mask"}
        if setting.padded
        else {"model_type": "decoder", "model_mask_name": None}
    )
    for i, layer in enumerate(layers):
        wrapper = basic.RandomLayerTokenDrop(_Forward(layer.forward))
        wrapper.init_config(config, scheduler, i)
        _wrap(layer, lambda forward, hidden, kwargs, wrapper=wrapper: wrapper(hidden, **kwargs))
    return scheduler.set_length


class Scheduler:
    """What the wrapper reads of DeepSpeed's own, whose module needs its engine."""

    def __init__(self, keep: int, layers: int) -> None:
        self.random_ltd_layer_num = layers
        self.state = {"max_value": 1 << 20, "current_value": keep}

    def get_current_seq(self) -> int:
        return self.state["current_value"]

    def set_length(self, keep: int) -> None:
        self.state["current_value"] = keep


class _Forward(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def _rows(hidden: Tensor, indices: Tensor) -> Tensor:
    return indices.long()[..., None].expand(-1, -1, hidden.shape[2])


def shared(model: nn.Module, setting: Setting) -> SetLength:
    return routed(model, setting, sampling="shared")


PEERS: dict[str, Callable[[nn.Module, Setting], SetLength | None]] = {
    "dense": dense,
    "ideal": ideal,
    "routed": routed,
    "shared": shared,
    "route": route,
    "backend": backend,
    "hand-written": hand_written,
    "tread": tread,
    "deepspeed": deepspeed,
}


def peers_for(setting: Setting, *, compiled: bool = False) -> list[str]:
    """Those that can run it, without ``shared``."""
    absent = {"shared"} if setting.family != "llama" and _has_deepspeed() else {"shared", "deepspeed"}
    if not compiled or setting.family == "vit":  # whose images are of one size
        absent.add("backend")
    return [name for name in PEERS if name not in absent]


def prepare(name: str, model: nn.Module, setting: Setting, *, compiled: bool) -> nn.Module:
    """The model as the peer ``name`` runs it."""
    PEERS[name](model, setting)
    return torch.compile(model) if compiled and name != "backend" else model


def _has_deepspeed() -> bool:
    found = importlib.util.find_spec("deepspeed") is not None
    if not found:
        print("deepspeed is not installed: left out")
    return found
