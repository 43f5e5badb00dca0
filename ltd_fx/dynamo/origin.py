"""Where a graph that Dynamo captured comes from: its frame, and the modules that this frame found."""

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from torch import fx, nn

from ltd_fx.errors import LTDError
from ltd_fx.torch_private_dynamo import Frame, frame_in_progress, source_name, sources_of

_MODULES = re.compile(r"\._modules\['([^']+)'\]")
_WEIGHT = re.compile(r"(?P<root>.*?)(?P<path>(?:\._modules\['[^']+'\])*)\._(?:parameters|buffers)\['(?P<name>[^']+)'\]")


class Origin(NamedTuple):
    """The frame of a graph.

    Attributes:
        frame: what Dynamo knows of it.
        roots: the modules that it did not find within others (``self``), by their sources; the longest first.
        sources: of the modules and weights that it found, by name.
        callers: the modules whose calls are under way, the innermost first.
    """

    frame: Frame
    roots: dict[str, nn.Module]
    sources: dict[str, Any]
    callers: list[nn.Module]

    def module_maybe(self, path: str) -> nn.Module | None:
        """The module of an entry of ``nn_module_stack``."""
        for source, root in self.roots.items():
            if path == source or path.startswith(source + "."):
                try:
                    return root.get_submodule(path[len(source) + 1 :])
                except AttributeError:
                    return None
        return None

    def sources_of(self, modules: Iterable[nn.Module]) -> Iterator[Any]:
        """The sources of those of ``modules`` that the frame found."""
        wanted = {id(module) for module in modules}
        for name, source in self.sources.items():
            path = _MODULES.sub(r".\1", name)
            if id(self.module_maybe(path)) in wanted:
                yield source


def origin_of(graph: fx.Graph) -> Origin:
    """In a backend: where the graph that it was given comes from."""
    frame, roots, sources = frame_in_progress(), dict[str, Any](), dict[str, Any]()
    for node in graph.find_nodes(op="placeholder"):
        if "grapharg" not in node.meta:
            raise LTDError(
                "ltd_fx.backend: it is given a part of a graph, as DistributedDataParallel has torch.compile split it "
                "by its buckets; set torch._dynamo.config.optimize_ddp = False, or use ltd_fx.transform"
            )
        weight = weight_of(node)
        if weight is not None:
            sources |= {source_name(source): source for source in sources_of(node)}
        if weight is not None and weight["root"] not in roots:
            with suppress(Exception):  # Some sources are no expressions of the frame's names alone.
                roots[weight["root"]] = eval(weight["root"], {}, frame.scope)
    modules = {source: roots[source] for source in sorted(roots, key=len, reverse=True)}
    return Origin(frame, {s: m for s, m in modules.items() if isinstance(m, nn.Module)}, sources, list(_callers()))


def weight_of(placeholder: fx.Node) -> re.Match[str] | None:
    """The ``root``, ``path`` and ``name`` of an input of Dynamo's graph that is a parameter or a buffer."""
    source = next(sources_of(placeholder), None)
    return None if source is None else _WEIGHT.fullmatch(source_name(source))


def _callers() -> Iterator[nn.Module]:
    frame = inspect.currentframe()
    while frame is not None:
        # Of no other frame: to look at its locals would keep them until it ends, whatever it deletes before.
        if frame.f_code is nn.Module.__call__.__code__:
            yield frame.f_locals["self"]
        frame = frame.f_back
