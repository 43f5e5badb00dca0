"""``torch.compile(model, backend=ltd_fx.backend(...))``: the graphs that Dynamo captures are routed, not the model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh

from ltd_fx.dynamo.captured import Captured
from ltd_fx.dynamo.origin import Origin, origin_of
from ltd_fx.dynamo.program import Program, find_model
from ltd_fx.dynamo.routed import RoutedGraph, RoutedLayers
from ltd_fx.errors import LTDError
from ltd_fx.install import RewriteReport, RouteSpec, Settings
from ltd_fx.learn import Layers, calls_of
from ltd_fx.runtime import Protect, sampled_indices
from ltd_fx.schedule import LTDScheduler
from ltd_fx.torch_private_dynamo import backend_named, compile_number, guard_training, mark_any_size, trace_again

Inner = str | Callable[..., Any]
Compiled = Callable[..., Any]


class Backend:
    """What :func:`ltd_fx.backend` returns: a backend of one model, for ``torch.compile``."""

    def __init__(self, scheduler: LTDScheduler | None, inner: Inner, settings: Settings) -> None:
        settings.check(scheduler)
        if scheduler is not None:
            scheduler._awaited = True
        self._scheduler, self._inner, self._settings = scheduler, inner, settings
        self._program: Program | None = None
        self._traced: Any = None  # The compilation that was asked to trace its frame again.

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Compiled:
        """What Dynamo runs in place of ``graph``."""
        try:
            origin = origin_of(graph.graph)
            program = self._find_program(origin)
            routed = None if program is None else self._routed_maybe(program, graph, inputs, origin, options)
        except LTDError as error:
            return partial(_fail, error)  # Dynamo would wrap it in an error of its own.
        if routed is not None:
            return routed
        dense: Compiled = (
            torch.compile(fx.GraphModule(graph, copy.deepcopy(graph.graph)), backend=self._inner, **options)
            if options  # which are torch.compile's, and no backend's
            else backend_named(self._inner)(graph, inputs)
        )
        return dense

    @property
    def program(self) -> Program:
        """The model as far as it was seen.

        Raises:
            LTDError: no forward was.
        """
        if self._program is None:
            raise LTDError("ltd_fx.backend: no forward of the compiled model was seen; run one")
        return self._program

    def report(self) -> RewriteReport:
        """See :func:`ltd_fx.summary`."""
        return RewriteReport(list(self.program.layers.values()))

    def sampled_indices(self) -> dict[str, Tensor]:
        """See :func:`ltd_fx.sampled_indices`."""
        sites = self.program.sites
        return sampled_indices([sites[name] for name in self.program.numbers if name in sites])

    def _find_program(self, origin: Origin) -> Program | None:
        model = find_model(origin, self._settings)
        if self._program is None and model is not None:
            self._program = Program(model, self._settings, self._scheduler)
        if self._program is None or model is None or self._program.has(model):
            return self._program
        raise LTDError(
            f"ltd_fx.backend: it routes a {type(self._program.model).__name__} already, and is given a graph of a "
            f"{type(model).__name__}; give each model a backend of its own"
        )

    def _routed_maybe(
        self, program: Program, graph: fx.GraphModule, inputs: Sequence[Any], origin: Origin, options: dict[str, Any]
    ) -> Compiled | None:
        names = program.names()
        captured = Captured(graph, inputs, origin, names)
        own = next((names[root] for root in origin.roots.values() if names.get(root) in program.layers), None)
        called = [name for name in program.layers if calls_of(captured.module.graph, name)]
        modules = [program.model.get_submodule(name) for name in called]
        for source in origin.sources_of([program.model, *modules]):
            guard_training(source)
        if not any(module.training for module in modules):
            return None
        _refuse_breaks(program, origin, names, own)
        if own is None:
            called = [name for name in called if name in program.numbers]
            if not called:
                return None
        _refuse_unknown_mask(program, captured, inputs, origin)
        self._see_lengths(captured, inputs, called)
        compiler = partial(torch.compile, backend=self._inner, fullgraph=True, dynamic=True, **options)
        if own is None:
            return RoutedGraph(program, captured, called, compiler)
        return RoutedLayers(program, captured, own, compiler)

    def _see_lengths(self, captured: Captured, inputs: Sequence[Any], called: Sequence[str]) -> None:
        """Have the graph be of any length: traced once more, where it was captured for one only."""
        number = compile_number()
        if number == self._traced or all(_is_dynamic(captured.module.graph, name) for name in called):
            return
        self._traced = number
        for place in captured.given:
            if isinstance(inputs[place], Tensor) and not isinstance(inputs[place], nn.Parameter):
                mark_any_size(inputs[place])
        trace_again("ltd_fx: the length of the sequences must be a symbol")


def backend(
    scheduler: LTDScheduler | None = None,
    *,
    inner: Inner = "inductor",
    layers: Layers = None,
    skip_first: int = 1,
    skip_last: int = 1,
    seed: int = 0,
    sampling: str = "per_sample",
    protect: Protect = None,
    routes: Sequence[RouteSpec] | None = None,
    keep: Mapping[str, float] | None = None,
    device_mesh: DeviceMesh | None = None,
) -> Backend:
    """For ``torch.compile(model, backend=ltd_fx.backend(scheduler))``: the model is routed as it is compiled.

    The model is not touched: no class, no attribute, no hook. Each graph that Dynamo captures of it in training is
    proven or tested as in ``transform`` (or refused), rewritten, and handed to ``inner``. With ``fullgraph=True`` a
    whole schedule has two graphs, one routed and one dense, both of any length and any batch of two or more. The same
    seed draws as :func:`ltd_fx.transform` does. In eval mode ``inner`` is given the graph as it is. A registered
    ``LayerPattern`` is not used: how a graph's layers are called is its own way. :func:`ltd_fx.summary` and
    :func:`ltd_fx.sampled_indices` take the backend for the model.

    Args:
        scheduler: gives the reserved length; ``None`` keeps half of the tokens, always.
        inner: what compiles the rewritten graph: the name of a backend, or a callable.
        layers: the target layers, by their names in the model; this and what follows is as for ``ltd_fx.transform``.
        skip_first: layers left dense at the start of each stack.
        skip_last: layers left dense at the end of each stack.
        seed: of the draws.
        sampling: ``"per_sample"`` or ``"shared"``.
        protect: tokens that are kept first.
        routes: over several layers, which must be in one graph then.
        keep: the share of the tokens for single layers, by name.
        device_mesh: which ranks draw alike; the first training forward is then a collective.

    Returns:
        A backend for one model: for the module that holds the layers, whether that is compiled, what calls it, or its
        layers one by one.

    Raises:
        LTDError: an argument out of range, at once; a layer that cannot be routed, at the first training forward.
    """
    if sampling == "per_document":
        raise LTDError("ltd_fx.backend: sampling='per_document' goes by the model's arguments; use ltd_fx.transform")
    settings = Settings(layers, skip_first, skip_last, seed, sampling, protect, routes, keep, device_mesh)
    return Backend(scheduler, inner, settings)


def _fail(error: LTDError, *inputs: Any) -> None:
    raise error


def _is_dynamic(graph: fx.Graph, name: str) -> bool:
    """Whether a layer's hidden states are of any length in the graph, and of another size than the batch."""
    for node in reversed(calls_of(graph, name)[0]):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            sizes: list[Any] = list(value.shape[:2])
            symbols = {size.node.expr for size in sizes if isinstance(size, torch.SymInt)}
            return len(symbols) == 2 or (len(symbols) == 1 and 1 in sizes)
    return True


def _refuse_unknown_mask(program: Program, captured: Captured, inputs: Sequence[Any], origin: Origin) -> None:
    """Raise :class:`LTDError` where the draws need an argument of the model, and the graph may go without it."""
    if program.protect is None or captured.argument(program.protect, inputs) is not None:
        return
    local = origin.frame.scope["L"]
    args, kwargs = local.get("args"), local.get("kwargs")
    named = local.get(program.protect, kwargs.get(program.protect) if isinstance(kwargs, dict) else None)
    unnamed = isinstance(args, tuple) and len(args) > 1  # The first may be the model itself.
    whole = any(root is program.model for root in origin.roots.values()) and not origin.frame.resumed
    if not whole or named is not None or unnamed:
        raise LTDError(
            f"ltd_fx.backend: protect={program.protect!r} names an argument of the {program.state.root} that the graph "
            "of its layers is not given; pass it by its name, and compile the model whole"
        )


def _refuse_breaks(program: Program, origin: Origin, names: dict[nn.Module, str], own: str | None) -> None:
    """Raise :class:`LTDError` where the frame is of a part of a layer."""
    inner = [
        name for root in origin.roots.values() for name in program.layers if names.get(root, "").startswith(name + ".")
    ]
    broken = own is not None and (origin.frame.resumed or origin.frame.broken)
    if inner or broken:
        at = f" at {origin.frame.broken}" if origin.frame.broken else ""
        raise LTDError(
            f"ltd_fx.backend: {own or inner[0]} cannot be routed: torch.compile breaks the graph within it{at}; mend "
            "that (fullgraph=True says why), leave the layer out with layers=..., or use ltd_fx.transform"
        )
