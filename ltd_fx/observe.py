"""Watch a model's forward from outside: how it calls its layers, on fake tensors or on real ones."""

import copy
import functools
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from ltd_fx.alike import shapes
from ltd_fx.errors import LTDError
from ltd_fx.torch_private import FAKE_TENSOR_LOG, FakeTensorMode, pytree
from ltd_fx.tree import map_tensors


class Call(NamedTuple):
    """One call of a layer; ``output`` is None where it was not waited for."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class TensorSpec(NamedTuple):
    """A tensor without its data."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A dict of keyword arguments or a tuple of positional ones, as (args, kwargs)."""
    return ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})


def describe(args: Any, kwargs: Any) -> Any:
    """The arguments of a call with a :class:`TensorSpec` for each tensor."""
    return pytree.tree_map_only(torch.Tensor, lambda t: TensorSpec(t.shape, t.dtype, t.device), (args, kwargs))


def run_fake(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Run the model's forward on fake tensors: shapes and devices, no compute, no memory. The model stays as it was.

    Args:
        model: its parameters stay real; operators see them as fake.
        args: from :func:`describe`.
        kwargs: likewise.

    Raises:
        LTDError: the forward fails.

    """
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet(FAKE_TENSOR_LOG):
        args, kwargs = pytree.tree_map(
            lambda s: torch.empty(s.shape, dtype=s.dtype, device=s.device) if isinstance(s, TensorSpec) else s,
            (args, kwargs),
            is_leaf=lambda value: isinstance(value, TensorSpec),
        )
        _run(model, args, kwargs, failing="does not run on fake tensors of these inputs")


def _run(model: nn.Module, args: Any, kwargs: Any, *, failing: str) -> None:
    try:
        with preserved(model), torch.compiler.set_stance("force_eager"):
            model(*args, **kwargs)
    except LTDError:
        raise
    except Exception as error:
        raise LTDError(f"ltd_fx: the model's forward {failing}: {type(error).__name__}: {error}") from error


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    *,
    fake: bool = True,
    kinds: Mapping[str, Any] | None = None,
) -> list[Call]:
    """The calls of ``layers`` in one forward, in order, in eval mode.

    Args:
        model: left as it was.
        layers: by fully qualified name.
        inputs: (args, kwargs), from :func:`describe` where ``fake``, else values.
        fake: on fake tensors.
        kinds: layers of one kind (by name) give outputs of the same shapes, so the bodies of few need to run.

    Raises:
        LTDError: the forward fails.

    """
    calls: list[Call] = []
    known: dict[Any, Call] = {}

    def watch(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            kind = (kinds[name], shapes(args, kwargs)) if fake and kinds is not None else None
            same = known.get(kind) if kind is not None else None
            output = forward(*args, **kwargs) if same is None else _like_output(same, args, kwargs)
            calls.append(Call(name, args, kwargs, output))
            known.setdefault(kind, calls[-1])
            return output

        return watched

    with _patched(layers, watch), _eval(model):
        if fake:
            run_fake(model, *inputs)
        else:
            _run(model, *inputs, failing="fails")
    return calls


def _like_output(call: Call, args: Any, kwargs: Any) -> Any:
    """What ``call`` returned, for other arguments of the same shapes: inputs handed on, or else new tensors."""
    given, now = (pytree.tree_leaves((a, k)) for a, k in ((call.args, call.kwargs), (args, kwargs)))
    handed = {id(old): new for old, new in zip(given, now, strict=True)}
    return map_tensors(lambda t: handed.get(id(t), torch.empty_like(t)), call.output)


class _Stop(BaseException):
    """Ends a forward of which enough was seen; no model's own handler should catch it."""


def observe_values(model: nn.Module, layers: Mapping[str, nn.Module], args: Any, kwargs: Any) -> dict[str, Call]:
    """The first call of each of ``layers`` in one real forward in eval mode, which ends when all have been called.

    Raises:
        LTDError: the forward fails.

    """
    calls: dict[str, Call] = {}

    def watch(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, Call(name, args, kwargs, None))
            if len(calls) == len(layers):
                raise _Stop
            return forward(*args, **kwargs)

        return watched

    with suppress(_Stop), _patched(layers, watch), _eval(model):
        _run(model, args, kwargs, failing="fails")
    return calls


def is_stream(value: Any) -> bool:
    """Whether a value may be hidden states: a 3-D floating-point tensor."""
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the log of a library that reports what we raise, or try another way."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@contextmanager
def _patched(
    layers: Mapping[str, nn.Module], watch: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    before = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.forward = watch(name, layer.forward)
    try:
        yield
    finally:
        for name, layer in layers.items():
            del layer.__dict__["forward"]
            if before[name] is not None:
                layer.__dict__["forward"] = before[name]


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Without dropout, skipped layers or updated statistics."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """What a forward may leave behind is undone: random state, rebound buffers, and all it caches (as fake tensors, or
    in another dtype).

    Rotary tables and position indices are kept in attributes of modules, in dictionaries there, and by ``functools``.
    """
    modules = list(model.modules())
    before = [dict(module.__dict__) for module in modules]
    classes = {base for module in modules for base in type(module).__mro__ if base is not nn.Module}
    held = [
        (value, copy.copy(value))
        for attributes in (*before, *map(vars, classes))
        for value in attributes.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, kept in held:
            container.clear()
            container.extend(kept) if isinstance(container, list) else container.update(kept)
        for cached in _functools_caches(modules, classes):
            cached.cache_clear()


def _functools_caches(modules: list[nn.Module], classes: set[type]) -> Iterator[Any]:
    """The caches of the modules, of their classes, and of the Python files that define these."""
    files = {cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")}
    holders = [*modules, *classes, *(sys.modules[name] for name in files if name in sys.modules)]
    for holder in holders:
        for value in list(vars(holder).values()):
            value = getattr(value, "__func__", value)  # of a static method
            cells = getattr(value, "__closure__", None) or ()  # of a wrapper around the cached function
            for found in (value, *(cell.cell_contents for cell in cells)):
                if isinstance(found, functools._lru_cache_wrapper) and found.__module__ in files:
                    yield found
