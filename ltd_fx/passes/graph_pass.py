"""What makes a function of a graph a pass that a pipeline can hold: also for modules, with an identity for caches."""

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from torch import fx

from ltd_fx.torch_private_dynamo import custom_graph_pass
from ltd_fx.version import __version__

Options = ParamSpec("Options")
Changed = TypeVar("Changed")


class GraphPass(Generic[Options, Changed]):
    """A function of an ``fx.Graph`` that changes it in place, and takes an ``fx.GraphModule`` too, which it recompiles.

    Its options are keywords, so that ``functools.partial`` makes a pipeline's step of it. Where it raises, discard the
    graph.
    """

    def __init__(self, function: Callable[Concatenate[fx.Graph, Options], Changed]) -> None:
        self._function = function
        functools.update_wrapper(self, function)

    def __call__(self, graph: fx.Graph | fx.GraphModule, *args: Options.args, **options: Options.kwargs) -> Changed:
        if not isinstance(graph, fx.GraphModule):
            return self._function(graph, *args, **options)
        changed = self._function(graph.graph, *args, **options)
        graph.recompile()
        return changed

    def uuid(self) -> str:
        """The same as long as the pass does the same: of its file and the package's version."""
        source = Path(inspect.getfile(self._function)).read_bytes()
        return f"{__version__}-{self._function.__name__}-{hashlib.sha256(source).hexdigest()}"


def inductor_pass(*passes: Callable[[fx.GraphModule], Any]) -> Any:
    """Have Inductor run ``passes`` before autograd, on the graph that Dynamo captured.

    ``torch._inductor.config.pre_grad_custom_pass = inductor_pass(functools.partial(outline, names=[...]))``

    Args:
        passes: of this package, with their options given by ``functools.partial``; or any function of an
            ``fx.GraphModule`` with a method ``uuid``.

    Returns:
        A ``CustomGraphPass``. Its ``uuid`` is ``None``, so that Inductor caches nothing, where that of a pass is not
        known, or an option is no plain value.
    """
    identities = [_identity(each) for each in passes]

    def run(graph: fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None
        for each in passes:
            each(module)

    return custom_graph_pass(run, None if None in identities else tuple(identities))


def _identity(each: Any) -> Any:
    if isinstance(each, functools.partial):
        inner, options = _identity(each.func), repr((each.args, sorted(each.keywords.items())))
        return None if inner is None or " at 0x" in options else (inner, options)
    return each.uuid() if hasattr(each, "uuid") else None
