"""Watch a model's forward from outside: how it calls its layers, on fake tensors or on real ones."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.learn.alike import shapes
from ltd_fx.learn.sandbox import Sandbox
from ltd_fx.torch_private import FAKE_TENSOR_LOG, FakeTensorMode, is_fake, pytree
from ltd_fx.tree import map_tensors


class Call(NamedTuple):
    """One call of a layer; ``output`` is None where it was not waited for."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class TensorSpec(NamedTuple):
    """A tensor without its data."""

    shape: tuple[Any, ...]  # of numbers, or of expressions of symbolic sizes
    dtype: torch.dtype
    device: torch.device


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A dict of keyword arguments or a tuple of positional ones, as (args, kwargs)."""
    return ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})


def describe(args: Any, kwargs: Any) -> Any:
    """The arguments of a call with a :class:`TensorSpec` for each tensor."""
    return pytree.tree_map_only(torch.Tensor, lambda t: TensorSpec(t.shape, t.dtype, t.device), (args, kwargs))


def _run_fake(model: nn.Module, mode: FakeTensorMode, args: Any, kwargs: Any) -> None:
    """The forward on fake tensors, from :func:`describe`: shapes and devices, no compute, no memory."""
    with mode, quiet(FAKE_TENSOR_LOG):
        args, kwargs = pytree.tree_map(
            lambda s: torch.empty(s.shape, dtype=s.dtype, device=s.device) if isinstance(s, TensorSpec) else s,
            (args, kwargs),
            is_leaf=lambda value: isinstance(value, TensorSpec),
        )
        run_model(model, args, kwargs, failing="does not run on fake tensors of these inputs")


def run_model(model: Callable[..., Any], args: Any, kwargs: Any, *, failing: str) -> None:
    """One forward within a sandbox.

    Raises:
        LTDError: it fails, as ``failing`` says.
    """
    try:
        with torch.compiler.set_stance("force_eager"):
            model(*args, **kwargs)
    except LTDError:
        raise
    except Exception as error:
        raise LTDError(f"ltd_fx: the model's forward {failing}: {type(error).__name__}: {error}") from error


def run_forward(model: nn.Module, inputs: Any, mode: FakeTensorMode | None) -> None:
    """One forward within ``sandbox.open(fake=mode)``; ``inputs`` are from :func:`describe` with a mode, else values.

    Raises:
        LTDError: it fails.
    """
    if mode is not None:
        _run_fake(model, mode, *inputs)
    else:
        run_model(model, *inputs, failing="fails")


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    *,
    sandbox: Sandbox,
    training: bool = False,
    fake: bool = True,
    kinds: Mapping[str, Any] | None = None,
) -> list[Call]:
    """The calls of ``layers`` in one forward, in order. Their tensors are fake: they hold no data and no history.

    Args:
        model: left as it was.
        layers: by fully qualified name.
        inputs: (args, kwargs), from :func:`describe` where ``fake``, else values.
        sandbox: of the model.
        training: the model is in training mode, else in eval mode, as the layers always are.
        fake: on fake tensors.
        kinds: layers of one kind (by name) give outputs of the same shapes, so the bodies of few need to run.

    Raises:
        LTDError: the forward fails.
    """
    calls: list[Call] = []
    mode = sandbox.mode if fake else None
    with sandbox.open(fake=mode):
        watch_calls(model, layers, calls, training=training, kinds=kinds if fake else None)
        run_forward(model, inputs, mode)
        return _hollow(calls, sandbox.mode)


def watch_calls(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calls: list[Call],
    *,
    training: bool,
    kinds: Mapping[str, Any] | None,
) -> None:
    """Within a sandbox, have each call of ``layers`` put into ``calls``; the arguments are as for :func:`observe`."""
    known: dict[Any, Call] = {}

    def watch(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            kind = (kinds[name], shapes(args, kwargs)) if kinds is not None else None
            same = known.get(kind) if kind is not None else None
            output = forward(*args, **kwargs) if same is None else _like_output(same, args, kwargs)
            calls.append(Call(name, args, kwargs, output))
            known.setdefault(kind, calls[-1])
            return output

        return watched

    _watch(model, layers, watch, training=training)


def _watch(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    watch: Callable[[str, Callable[..., Any]], Callable[..., Any]],
    *,
    training: bool,
) -> None:
    """Have the layers call what ``watch`` makes of their forwards, and the model run in a mode, until put back.

    The layers themselves are in eval mode: those that are routed already run dense.
    """
    nn.Module.train(model, training)  # An exported program refuses it.
    for name, layer in layers.items():
        layer.eval()
        layer.forward = watch(name, layer.forward)


def _hollow(calls: list[Call], mode: FakeTensorMode) -> list[Call]:
    """The calls with a fake tensor, without history, for each tensor: those that are one stay one."""
    made: dict[int, Any] = {}

    def hollow(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            plain = tensor.detach()
            made[id(tensor)] = plain if is_fake(plain) else mode.from_tensor(plain)
        return made[id(tensor)]

    return [Call(call.name, *map_tensors(hollow, tuple(call[1:]))) for call in calls]


def _like_output(call: Call, args: Any, kwargs: Any) -> Any:
    """What ``call`` returned, for other arguments of the same shapes: inputs handed on, or else new tensors."""
    given, now = (pytree.tree_leaves((a, k)) for a, k in ((call.args, call.kwargs), (args, kwargs)))
    handed = {id(old): new for old, new in zip(given, now, strict=True)}
    return map_tensors(lambda t: handed.get(id(t), torch.empty_like(t)), call.output)


class _Stop(BaseException):
    """Ends a forward of which enough was seen; no model's own handler should catch it."""


def observe_values(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Any,
    *,
    sandbox: Sandbox,
    training: bool = False,
) -> dict[str, Call]:
    """The first call of each of ``layers`` in one real forward, which ends when all have been called.

    The arguments are as for :func:`observe`.

    Raises:
        LTDError: the forward fails.
    """
    calls: dict[str, Call] = {}

    def watch(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, Call(name, *map_tensors(torch.Tensor.detach, (args, kwargs, None))))
            if len(calls) == len(layers):
                raise _Stop
            return forward(*args, **kwargs)

        return watched

    args, kwargs = inputs
    with suppress(_Stop), sandbox.open():
        _watch(model, layers, watch, training=training)
        run_model(model, args, kwargs, failing="fails")
    return calls


def is_stream(value: Any) -> bool:
    """Whether a value may be hidden states: a 3-D floating-point tensor."""
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Without the log of a library that reports what we raise, or try another way."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
