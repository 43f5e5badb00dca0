"""``torch.compile(model, backend=ltd_fx.backend(...))``: the graphs that Dynamo captures are routed, not the model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ltd_fx.dynamo.captured import Captured
from ltd_fx.dynamo.origin import Origin, origin_of
from ltd_fx.dynamo.program import Program, find_model
from ltd_fx.errors import LTDError
from ltd_fx.install import Rewrite, Settings, install, outlined
from ltd_fx.learn import calls_of
from ltd_fx.ops import register_inductor_decompositions
from ltd_fx.schedule import LTDScheduler
from ltd_fx.torch_private_dynamo import (
    backend_named,
    compile_number,
    guard_training,
    source_name,
    sources_of,
    trace_again,
)

Inner = str | Callable[..., Any]


class Backend:
    """See :func:`ltd_fx.backend`."""

    def __init__(self, scheduler: LTDScheduler | None, inner: Inner, settings: Settings) -> None:
        settings.check(scheduler)
        self._scheduler, self._inner, self._settings = scheduler, inner, settings
        self._program: Program | None = None
        self._traced: Any = None  # The compilation that was asked to trace its frame again.

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """What Dynamo runs in place of ``graph``."""
        try:
            return self._routed_maybe(graph, inputs, options) or backend_named(self._inner)(graph, inputs, **options)
        except LTDError as error:
            return partial(_fail, error)  # Dynamo would wrap it in an error of its own.

    def _routed_maybe(
        self, graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]
    ) -> Callable[..., Any] | None:
        origin = origin_of(graph.graph)
        program = self._find_program(origin)
        if program is None:
            return None
        captured = Captured(graph, inputs, origin, program.names())
        routed = [name for name in program.routed if calls_of(captured.module.graph, name)]
        _guard(graph, origin, [program.model, *map(program.model.get_submodule, routed)])
        if not any(program.model.get_submodule(name).training for name in routed):
            return None
        traced = compile_number() == self._traced
        if not traced and not all(_is_dynamic(captured.module.graph, name) for name in routed):
            self._traced = compile_number()
            for place in captured.given:
                if isinstance(inputs[place], Tensor) and not isinstance(inputs[place], nn.Parameter):
                    for dim in range(inputs[place].ndim):
                        torch._dynamo.maybe_mark_dynamic(inputs[place], dim)
            trace_again("ltd_fx: the length of the sequences must be a symbol")
        compiler = partial(torch.compile, backend=self._inner, fullgraph=True, dynamic=True, **options)
        return _Routed(program, captured, routed, compiler)

    def _find_program(self, origin: Origin) -> Program | None:
        if self._program is None:
            model = find_model(origin, self._settings)
            if model is None:
                return None
            self._program = Program(model, self._settings, self._scheduler)
        return self._program


class _Routed:
    """A graph of a program, which is rewritten when it first runs: with the numbers that it is given then."""

    def __init__(self, program: Program, captured: Captured, routed: list[str], compiler: Callable[..., Any]) -> None:
        self._program, self._captured, self._names, self._compiler = program, captured, routed, compiler
        self._compiled: Callable[..., Any] | None = None
        self._rewrite: Rewrite

    def __call__(self, *inputs: Any) -> Any:
        captured, program = self._captured, self._program
        given = [inputs[place] for place in captured.given]
        with captured.weights_of(inputs):
            if self._compiled is None:
                self._compiled = self._route(given)
            place = captured.arguments.get(program.protect or "")
            program.begin(self, None if place is None else inputs[place])
            program.sites.update({site.name: site for site in self._rewrite.sites})
            try:
                return self._compiled(*given)
            finally:
                program.state.end_forward()

    def _route(self, given: list[Any]) -> Callable[..., Any]:
        program, module = self._program, self._captured.module
        register_inductor_decompositions()
        module.train()
        layers = [replace(layer, pattern=None, vouched=False) for layer in program.layers]
        classes = {name: type(program.model.get_submodule(name)) for name in self._names}
        with outlined(module, classes) as done:
            absent = frozenset(program.routed) - frozenset(self._names)
            self._rewrite = Rewrite(program.state, layers, outlined=done, absent=absent)
            for name in self._names:
                module.get_submodule(name).training = program.model.get_submodule(name).training
            install(module, self._rewrite, (tuple(given), {}))
        compiled: Callable[..., Any] = self._compiler(module)
        return compiled


def _fail(error: LTDError, *inputs: Any) -> None:
    raise error


def _is_dynamic(graph: fx.Graph, name: str) -> bool:
    """Whether a layer's hidden states are of any length in the graph, and of another size than the batch."""
    for node in reversed(calls_of(graph, name)[0]):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            first, second = value.shape[:2]
            symbols = [size.node.expr for size in (first, second) if isinstance(size, torch.SymInt)]
            return len(set(symbols)) == 2 or (len(symbols) == 1 and 1 in (first, second))
    return True


def _guard(graph: fx.GraphModule, origin: Origin, modules: Sequence[nn.Module]) -> None:
    """Have Dynamo compile the frame again where one of the modules changes between training and eval mode."""
    sources = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        for source in sources_of(node):
            sources.setdefault(source_name(source), source)
    for name, source in sources.items():
        module = origin.module_maybe(name.replace("._modules['", ".").replace("']", "")) if "_modules" in name else origin.roots.get(name)
        if module in modules:
            guard_training(source)
