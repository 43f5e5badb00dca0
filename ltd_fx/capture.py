"""A model as an ``fx.Graph`` at call-site granularity: one ``call_module`` node per target layer.

Nothing inside a layer is traced, and no user code is traced symbolically: a layer's graph comes from its signature, and
a model's graph from watching one forward under fake tensors.
"""

import inspect
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ltd_fx.errors import LTDError

LAYER = "_ltd_layer"
ARGS, KWARGS = "_ltd_args", "_ltd_kwargs"


def layer_graph(signature: inspect.Signature, hidden: str) -> fx.Graph:
    """One call of a layer, from its signature: a placeholder per argument, one ``call_module``, its output.

    The layer is called with its hidden states by position where that is possible and everything else by name, as
    models do. ``*args`` and ``**kwargs`` travel as one tuple and one dict, under the names :data:`ARGS` and
    :data:`KWARGS`: an ``fx.Node`` cannot spread them.

    Raises:
        LTDError: a required keyword-only argument, which an ``fx.Graph`` cannot express.

    """
    graph = fx.Graph()
    args: list[fx.Node] = []
    kwargs: dict[str, fx.node.Argument] = {}
    for parameter in signature.parameters.values():
        name = parameter.name
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise LTDError(
                f"ltd_fx: the layer's required keyword-only argument {name!r} is not supported; give it a default"
            )
        if parameter.kind is parameter.VAR_POSITIONAL:
            kwargs[ARGS] = graph.placeholder(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs[KWARGS] = graph.placeholder(f"**{name}")
        else:
            default = inspect.Signature.empty if parameter.default is parameter.empty else parameter.default
            node = graph.placeholder(name, default_value=default)
            by_position = parameter.kind is parameter.POSITIONAL_ONLY or (name == hidden and not kwargs)
            if by_position:
                args.append(node)
            else:
                kwargs[name] = node
    graph.output(graph.call_module(LAYER, tuple(args), kwargs))
    graph.lint()
    return graph


def record(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any) -> fx.Graph:
    """Watch one forward under fake tensors and write down the calls of ``layers``.

    Args:
        model: run in the mode it is in.
        layers: the target layers by fully qualified name.
        example_inputs: a tuple of positional or a dict of keyword arguments for one forward.

    Returns:
        The graph, with a placeholder for every value made outside of the layers, an edge where one layer's output is
        another's input, and the fake values in ``node.meta["val"]``.

    Raises:
        LTDError: the forward fails.

    """
    recorder = _Recorder()
    handles = [layer.register_forward_hook(recorder.hook(name), with_kwargs=True) for name, layer in layers.items()]
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, dict) else (tuple(example_inputs), {})
    try:
        run_fake(model, *describe(args, kwargs))
    finally:
        for handle in handles:
            handle.remove()
    recorder.graph.output(recorder.last)
    recorder.graph.lint()
    return recorder.graph


class TensorSpec(NamedTuple):
    """A tensor without its data."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


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
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.random.fork_rng([]),
            torch.compiler.set_stance("force_eager"),
        ):
            args, kwargs = pytree.tree_map(
                lambda spec: (
                    torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
                    if isinstance(spec, TensorSpec)
                    else spec
                ),
                (args, kwargs),
                is_leaf=lambda value: isinstance(value, TensorSpec),
            )
            model(*args, **kwargs)
    except LTDError:
        raise
    except Exception as error:
        raise LTDError(
            f"ltd_fx: the model's forward does not run on fake tensors of these inputs: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, kept in buffers:  # a forward may rebind a buffer (dynamic rotary frequencies), here to a fake one
            module._buffers.update(kept)


class _Recorder:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.last: fx.Node | None = None
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []  # ids identify values only as long as these live

    def hook(self, name: str) -> Any:
        def record_call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            node_args, node_kwargs = pytree.tree_map(self._node, (args, kwargs))
            node = self.graph.call_module(name, node_args, node_kwargs)
            self.last = node
            self._remember(node, output)
            if isinstance(output, (tuple, list)):
                for i, item in enumerate(output):
                    if isinstance(item, torch.Tensor):
                        self._remember(self.graph.call_function(operator.getitem, (node, i)), item)

        return record_call

    def _node(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            return value
        if id(value) not in self._nodes:
            # placeholders come first in a graph
            first = next(iter(self.graph.nodes), None)
            place = self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(None)
            with place:
                self._remember(self.graph.placeholder(f"value_{len(self._nodes)}"), value)
        return self._nodes[id(value)]

    def _remember(self, node: fx.Node, value: Any) -> None:
        self._alive.append(value)
        self._nodes[id(value)] = node
        node.meta["val"] = value
