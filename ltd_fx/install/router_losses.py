"""The auxiliary loss of a mixture of experts under a padding mask: it counts the tokens that the routers saw.

Transformers computes it in the model's forward, of the logits of all routers and the batch's mask, which has an entry
for each token; routers of routed layers saw fewer. Such a model runs a copy of its forward that calls the same loss
with the entries of the tokens of each layer.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Sequence
from types import CellType, FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ltd_fx.learn import CallSite
from ltd_fx.runtime import Site, sampled_indices

_LOSS = "load_balancing_loss_func"  # transformers' name for it, in the files of its models
_ARGUMENTS = ("gate_logits", "num_experts", "top_k", "attention_mask")
_RECORDED = "_can_record_outputs"  # what transformers' models collect of modules, by their class


class Routed(Protocol):
    """A rewrite (``in_place.Rewrite``), as far as it is looked at here."""

    layers: Sequence[CallSite]
    sites: list[Site]


def route_losses(root: nn.Module, rewrite: Routed) -> None:
    """Have the models within ``root`` that compute such a loss call it with the masks of the kept tokens."""
    for module in root.modules():
        function = inspect.unwrap(type(module).forward)
        uses = _LOSS in getattr(getattr(function, "__code__", None), "co_names", ())
        loss = getattr(function, "__globals__", {}).get(_LOSS) if uses else None
        if _is_known(loss) and "forward" not in module.__dict__:
            routers = getattr((getattr(module, _RECORDED, None) or {}).get("router_logits"), "target_class", ())
            slots = {layer.name: root.get_submodule(layer.name) for layer in rewrite.layers}
            names = [name for name, slot in slots.items() if any(isinstance(part, routers) for part in slot.modules())]
            module.__dict__["forward"] = _Forward(module, rewrite, names)


def _is_known(loss: Any) -> bool:
    """Whether it counts over all layers at once. Some of transformers', and one of the user's own, do otherwise."""
    if not getattr(loss, "__module__", "").startswith("transformers."):
        return False
    return tuple(inspect.signature(loss).parameters) == _ARGUMENTS


def unroute_losses(root: nn.Module) -> None:
    """Undo :func:`route_losses`."""
    for module in root.modules():
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.__dict__["forward"]


class _Forward:
    """In place of the forward of ``module``; copies of it have one of their own. The layers ``names`` have routers."""

    def __init__(self, module: nn.Module, rewrite: Routed, names: Sequence[str]) -> None:
        self._module, self._rewrite, self._names = weakref.ref(module), rewrite, names
        forward = type(module).forward
        self.__signature__ = inspect.signature(forward.__get__(module))
        loss = inspect.unwrap(forward).__globals__[_LOSS]
        self._function = _with_global(forward, _LOSS, _counting(loss, rewrite, names))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._module(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        return _Forward(memo[id(self._module())], copy.deepcopy(self._rewrite, memo), self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forward, (self._module(), self._rewrite, self._names)


def _counting(loss: Callable[..., Any], rewrite: Routed, names: Sequence[str]) -> Callable[..., Any]:
    """``loss``, of the routers of the layers ``names``, in order."""

    def counted(gate_logits: Any, num_experts: Any = None, top_k: Any = 2, attention_mask: Tensor | None = None) -> Any:
        one_each = isinstance(gate_logits, tuple) and len(gate_logits) == len(names)
        if attention_mask is None or not one_each:
            return loss(gate_logits, num_experts, top_k, attention_mask)
        tokens = attention_mask.shape[0] * attention_mask.shape[1]
        fewer = [name for name, logits in zip(names, gate_logits, strict=True) if logits.shape[0] != tokens]
        if not fewer:
            return loss(gate_logits, num_experts, top_k, attention_mask)
        draws = sampled_indices(rewrite.sites)
        masks = [attention_mask.gather(1, draws[name]) if name in fewer else attention_mask for name in names]
        device = gate_logits[0].device
        # As one layer with as many tokens as all of them: it counts over all layers anyway.
        logits = torch.cat([each.to(device) for each in gate_logits])
        return loss((logits,), num_experts, top_k, torch.cat([m.reshape(-1) for m in masks])[None])

    return counted


def _with_global(function: Any, name: str, value: Any) -> Any:
    """A copy of ``function``, and of those that it wraps, for whose code ``value`` is the global ``name``."""
    if not isinstance(function, FunctionType):
        return function
    scope = function.__globals__
    if name in function.__code__.co_names:
        # Under a name of its own, for Dynamo would look globals up in the module of that name.
        scope = {**scope, name: value, "__name__": f"{scope['__name__']} (ltd_fx)"}
    cells = tuple(CellType(_with_global(cell.cell_contents, name, value)) for cell in function.__closure__ or ())
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells or None)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
