"""What follows what, read off one forward at symbolic sizes.

Each size of the inputs is a symbol of its own, and the model makes those one that it needs to be equal: sizes that are
equal by chance stay apart, which forwards at other sizes cannot always show (an image's tokens and a text's, a width).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ltd_fx.errors import LTDError
from ltd_fx.learn.observe import Call, TensorSpec, describe, is_stream, quiet, run_model, watch_calls
from ltd_fx.learn.probe import Edit, Probe, by_name, stream
from ltd_fx.learn.sandbox import Sandbox
from ltd_fx.torch_private import FAKE_TENSOR_LOG, FakeTensorMode, pytree
from ltd_fx.torch_private_sizes import decided_by, own_symbols, replaced, simplified, symbolic_products, symbolic_sizes
from ltd_fx.tree import map_tensors


class SymbolicCalls:
    """The first call of each layer in one forward on fake tensors of symbolic sizes.

    Args:
        model: left as it was.
        layers: by fully qualified name.
        inputs: (args, kwargs), from :func:`describe`.
        sandbox: of the model.
        training: the mode of the model; the layers are in eval mode.
        kinds: of the layers, as for :func:`observe`.

    Raises:
        LTDError: the forward fails before it has called all that it calls at plain sizes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        inputs: Any,
        *,
        sandbox: Sandbox,
        training: bool,
        kinds: Mapping[str, Any],
    ) -> None:
        mode, calls = sandbox.symbolic, list[Call]()
        given = _with_symbols(mode, inputs, "input")
        with sandbox.open(fake=mode), mode, symbolic_products(), quiet(FAKE_TENSOR_LOG):
            watch_calls(model, layers, calls, training=training, kinds=kinds)
            try:
                run_model(model, *given, failing="does not run on symbolic sizes")
            except LTDError:
                if {call.name for call in calls} != set(layers):
                    raise
        first = by_name(calls)
        streams = {name: stream(call) for name, call in first.items()}
        further = [leaf for call in calls for leaf in pytree.tree_leaves((call.args, call.kwargs)) if is_stream(leaf)]
        sizes = _Sizes(mode, [s for s in streams.values() if s is not None], further)
        self._streams = {name: () if s is None else sizes.of(s) for name, s in streams.items()}
        self._inputs = [sizes.of(leaf) if isinstance(leaf, Tensor) else () for leaf in pytree.tree_leaves(given)]
        self._plain = [leaf.shape if isinstance(leaf, TensorSpec) else () for leaf in _leaves(inputs)]
        self.calls = {name: sizes.described(call) for name, call in first.items()}

    def size(self, name: str, dim: int) -> Any:
        """Of a layer's hidden states along ``dim``: an expression, or a number where the model has one size."""
        return self._streams[name][dim] if self._streams[name] else 0

    def probes(self, dim: int) -> list[Probe]:
        """The forward as a probe along ``dim`` of the hidden states, for each size that is a symbol there."""
        sizes = {sizes[dim]: None for sizes in self._streams.values() if sizes}
        return [Probe(self._edit(size), self.calls) for size in sizes if not isinstance(size, int)]

    def _edit(self, size: Any) -> Edit:
        """The inputs' dimensions of this size; none where it is made of several."""
        dims = {i: tuple(d for d, n in enumerate(shape) if n == size) for i, shape in enumerate(self._inputs)}
        dims = {i: found for i, found in dims.items() if found}
        first = next(((self._plain[i][found[0]]) for i, found in dims.items()), 0)
        return Edit(first, dims)


def boundary_probe(slot: nn.Module, call: Call, *, sandbox: Sandbox) -> Probe:
    """A layer's own forward with a symbol for each size of its arguments: for a model of one length.

    Args:
        slot: the layer.
        call: how it is called, on fake tensors.
        sandbox: of the model.

    Raises:
        LTDError: it does not run on symbolic sizes.
    """
    mode = sandbox.symbolic
    args, kwargs = _with_symbols(mode, describe(call.args, call.kwargs), call.name)
    with sandbox.open(slot, fake=mode), mode, symbolic_products(), quiet(FAKE_TENSOR_LOG):
        slot.eval()
        made: list[Any] = []
        run_model(lambda *a, **k: made.append(slot(*a, **k)), args, kwargs, failing="does not run on symbolic sizes")
    called = Call(call.name, args, kwargs, made[0])
    hidden = [s for s in [stream(called)] if s is not None]
    return Probe(Edit(0, {}), {call.name: _Sizes(mode, hidden, []).described(called)})


def _leaves(inputs: Any) -> list[Any]:
    return pytree.tree_leaves(inputs, is_leaf=lambda value: isinstance(value, TensorSpec))


def _with_symbols(mode: FakeTensorMode, inputs: Any, name: str) -> Any:
    """``inputs`` with fake tensors in place of descriptions, a symbol for each size."""
    count = 0

    def make(spec: Any) -> Any:
        nonlocal count
        if not isinstance(spec, TensorSpec):
            return spec
        count += 1
        sizes = symbolic_sizes(mode, spec.shape, f"{name}_{count}")
        with mode:
            return torch.empty(sizes, dtype=spec.dtype, device=spec.device)

    return pytree.tree_map(make, inputs, is_leaf=lambda value: isinstance(value, TensorSpec))


class _Sizes:
    """Sizes as plain numbers or as expressions, with what the forward needs to be equal expressed alike.

    Args:
        mode: after the forward.
        hidden: its hidden states, whose own symbols the others are expressed by: the rows of a table for two sequences,
            made from other inputs than these, are as many as both have.
        further: other sequences, whose symbols are the next to be kept.
    """

    def __init__(self, mode: FakeTensorMode, hidden: list[Tensor], further: list[Tensor]) -> None:
        self._mode, self._others = mode, dict[Any, Any]()
        own = set().union(*(own_symbols(n) for tensor in hidden for n in tensor.shape))
        known = set().union(*(own_symbols(n) for tensor in further for n in tensor.shape))
        conditions = [c for c, _ in decided_by(mode, None)[0] if type(c).__name__ == "Equality"]
        zeros = [simplified(mode, condition.lhs - condition.rhs) for condition in conditions]
        for zero in [*(symbol - size for symbol, size in replaced(mode)), *zeros]:
            zero = self._expressed(zero)
            for symbol in sorted(zero.free_symbols - own, key=lambda s: (s in known, str(s))):
                rest = zero - zero.coeff(symbol) * symbol
                if zero.coeff(symbol) in (1, -1) and symbol not in rest.free_symbols:
                    found = {symbol: -rest * zero.coeff(symbol)}
                    self._others = {s: e.subs(found) for s, e in self._others.items()} | found
                    break

    def _expressed(self, size: Any) -> Any:
        return size.subs(self._others).expand() if self._others and size.free_symbols else size

    def of(self, tensor: Tensor) -> tuple[Any, ...]:
        sizes = (self._expressed(simplified(self._mode, n)) for n in tensor.shape)
        return tuple(int(n) if n.is_Integer else n for n in sizes)

    def described(self, call: Call) -> Call:
        def describe(tensor: Tensor) -> Any:
            return TensorSpec(self.of(tensor), tensor.dtype, tensor.device)

        return Call(call.name, *map_tensors(describe, tuple(call[1:])))
