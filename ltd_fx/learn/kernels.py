"""Attention kernels in plain sight: while a layer is watched, known ones run as matrix products and a softmax.

A kernel hides which tokens it lets see each other, and may not run here at all. Its arguments say it: masks, documents,
windows, slopes.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ltd_fx.learn.plain_attention import FUNCTIONS, OF_TRANSFORMERS
from ltd_fx.runtime import attentions, kernel_of

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # transformers' mapping from names to functions, in the files of its models


@contextmanager
def in_plain_sight(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, the attention functions that the files of ``modules`` use are plain ones, in this thread."""
    modules = list(modules)
    names = {type(module).__module__ for module in modules}
    files = [sys.modules[name] for name in names if name in sys.modules]
    places: dict[tuple[int, str], tuple[Any, str, Callable[..., Any]]] = {}
    for module in {attention for each in modules for attention in attentions(each)}:
        name = kernel_of(module)
        file = sys.modules.get(type(module).__module__)
        interface = getattr(file, _INTERFACE, getattr(sys.modules.get("transformers.modeling_utils"), _INTERFACE, {}))
        plain = OF_TRANSFORMERS.get(_origin(interface.get(name)))
        if plain is not None:
            places[id(interface), name] = interface, name, plain
    for (library, function), plain in FUNCTIONS.items():
        original = getattr(sys.modules.get(library), function, None)
        if original is not None:
            for file in (*files, sys.modules[library]):
                for name in [name for name, value in vars(file).items() if value is original]:
                    places[id(file), name] = vars(file), name, plain
    with ExitStack() as stack:
        for where, name, plain in places.values():
            stack.enter_context(_replaced(where, name, plain))
        yield


def _origin(function: Any) -> str:
    """Where a function was defined: another one may have been registered under a known name."""
    function = getattr(function, "func", function)  # of a partial
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


@contextmanager
def _replaced(where: MutableMapping[str, Any], name: str, plain: Callable[..., Any]) -> Iterator[None]:
    original, thread = where[name], threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (plain if threading.get_ident() == thread else original)(*args, **kwargs)

    where[name] = chosen
    try:
        yield
    finally:
        if not isinstance(where, dict):  # It was found there, or else in what is common to all models.
            del where[name]
        if where.get(name) is not original:
            where[name] = original
