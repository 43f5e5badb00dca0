"""What runs in place of a graph that Dynamo captured."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ltd_fx.dynamo.captured import Captured
from ltd_fx.dynamo.program import Program
from ltd_fx.errors import LTDError
from ltd_fx.install import Rewrite, install, outlined, put_site
from ltd_fx.learn import CallSite
from ltd_fx.ops import register_inductor_decompositions
from ltd_fx.runtime import Site

Compiler = Callable[[nn.Module], Callable[..., Any]]


class _Routed(ABC):
    """A graph of a program, rewritten when it runs first: it is proven with the numbers that it is given then."""

    def __init__(self, program: Program, captured: Captured, compiler: Compiler) -> None:
        self._program, self._captured, self._compiler = program, captured, compiler
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        program, captured = self._program, self._captured
        given = [inputs[place] for place in captured.given]
        with captured.weights_of(inputs):
            if self._compiled is None:
                register_inductor_decompositions()
                self._rewrite(given)
                self._compiled = self._compiler(captured.module)
            program.begin(captured.module, self._enter(inputs), captured.argument(program.protect, inputs))
            try:
                return self._compiled(*given)
            finally:
                program.state.end_forward()

    @abstractmethod
    def _rewrite(self, given: list[Any]) -> None:
        """Rewrite the captured graph; ``given`` is what it takes."""

    @abstractmethod
    def _enter(self, inputs: Sequence[Any]) -> Mapping[str, Site]:
        """The sites, by layer, of those that run with these inputs."""


class RoutedGraph(_Routed):
    """A graph that calls layers.

    Args:
        program: the model.
        captured: its graph.
        called: the routed layers in it.
        compiler: of the rewritten graph.
    """

    def __init__(self, program: Program, captured: Captured, called: Sequence[str], compiler: Compiler) -> None:
        super().__init__(program, captured, compiler)
        cut = {layer.route for layer in program.layers.values() if layer.route and layer.name not in called}
        _refuse_routes(cut & {program.layers[name].route for name in called})
        self._called = called
        self._sites: Mapping[str, Site] = {}

    def _rewrite(self, given: list[Any]) -> None:
        absent = frozenset(self._program.numbers) - frozenset(self._called)
        layers = [replace(layer, pattern=None, vouched=False) for layer in self._program.layers.values()]
        rewrite = _rewritten(self._program, self._captured, layers, absent, given)
        self._sites = {site.name: site for site in rewrite.sites}
        self._program.layers.update({layer.name: layer for layer in rewrite.routed})

    def _enter(self, inputs: Sequence[Any]) -> Mapping[str, Site]:
        return self._sites


class RoutedLayers(_Routed):
    """The graph of one layer, which others that are alike share (``layer.compile()``, FSDP2 by layers).

    Args:
        program: the model.
        captured: the layer's graph.
        name: of the layer that it was captured of.
        compiler: of the rewritten graph.
    """

    def __init__(self, program: Program, captured: Captured, name: str, compiler: Compiler) -> None:
        super().__init__(program, captured, compiler)
        self._name = name
        _refuse_routes({layer.route for layer in program.layers.values()} - {None})
        first = next((weight for weight in captured.weights if weight.startswith(name + ".")), None)
        if first is None:
            raise LTDError(
                f"ltd_fx.backend: {name} has no weights, so nothing tells it from others; use ltd_fx.transform"
            )
        self._place, self._weight = captured.weights[first], first.removeprefix(name + ".")
        self._sites: dict[str, Site] = {}
        self._found: CallSite

    def _rewrite(self, given: list[Any]) -> None:
        program = self._program
        own = replace(program.layers[self._name], routed=True, reason="", share=None, pattern=None, vouched=False)
        rewrite = _rewritten(program, self._captured, [own], frozenset(), given)
        (self._found,) = rewrite.routed
        layer = self._captured.module.get_submodule(self._name)
        for name, known in program.layers.items():
            if known.routed:
                length = program.state.lengths[known.share]
                self._sites[name] = Site(name, program.numbers[name], layer, program.state, length, in_graph=True)

    def _enter(self, inputs: Sequence[Any]) -> Mapping[str, Site]:
        weight, module = inputs[self._place], self._captured.module
        name = next((n for n in self._program.layers if self._program.weight_maybe(n, self._weight) is weight), None)
        if name is None:
            raise LTDError(f"ltd_fx.backend: {self._name} runs with weights that are no layer's of the model")
        site = self._sites.get(name)
        module.get_submodule(self._name).training = site is not None  # Others are dense.
        if site is None:
            return {}
        put_site(module, 0, site)
        if self._program.sites.get(name) is not site:  # What is shown of this graph is shown of a layer that runs it.
            proof = self._found.proof and replace(self._found.proof, name=name)
            known = self._program.layers[name]
            self._program.layers[name] = replace(known, pattern=self._found.pattern, vouched=False, proof=proof)
        return {name: site}


def _refuse_routes(routes: Collection[str | None]) -> None:
    for route in routes:
        raise LTDError(
            f"ltd_fx.backend: the layers of the route of {route} must be in one graph, and torch.compile captures "
            "several (fullgraph=True says why); end the route where the graph does, or use ltd_fx.transform"
        )


def _rewritten(
    program: Program, captured: Captured, layers: Sequence[CallSite], absent: frozenset[str], given: list[Any]
) -> Rewrite:
    """Rewrite the captured graph for those of ``layers`` that are routed, and not ``absent``.

    Raises:
        LTDError: one cannot be routed.
    """
    module, rewrite = captured.module, Rewrite(program.state, layers, absent=absent)
    module.train()
    originals = {layer.name: program.model.get_submodule(layer.name) for layer in rewrite.routed}
    with outlined(module, {name: type(original) for name, original in originals.items()}):
        for name, original in originals.items():
            module.get_submodule(name).training = original.training
        install(module, rewrite, (tuple(given), {}))
    return rewrite
