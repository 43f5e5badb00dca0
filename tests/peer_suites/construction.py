"""Where other libraries finish building a model: the place to transform it, before their tests see it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Built = Callable[[nn.Module], None]


class Outermost:
    """Calls ``built`` on what the outermost of nested constructions returns: its parts are no models of their own."""

    def __init__(self, built: Built) -> None:
        self._built = built
        self._depth = 0

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def constructor(self, cls: type[nn.Module]) -> None:
        """Watch ``cls.__init__``, which a subclass may call: the model is complete after that of its own class."""
        init = cls.__init__

        @functools.wraps(init)
        def watched(model: Any, *args: Any, **kwargs: Any) -> None:
            with self._under_way():
                init(model, *args, **kwargs)
            if self._depth == 0 and type(model) is cls:
                self._built(model)

        cls.__init__ = watched  # type: ignore[method-assign]

    def function(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """``make``, which returns a model, or a tuple that begins with one."""

        @functools.wraps(make)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._under_way():
                made = make(*args, **kwargs)
            if self._depth == 0:
                self._built(made[0] if isinstance(made, tuple) else made)
            return made

        return watched


def watch_transformers(built: Built) -> None:
    """Call ``built`` on each model made by its constructor or by ``from_pretrained``."""
    from transformers import PreTrainedModel

    outermost = Outermost(built)
    base: Any = PreTrainedModel
    init_subclass = base.__init_subclass__.__func__

    def watched(cls: type[nn.Module], **kwargs: Any) -> None:
        init_subclass(cls, **kwargs)
        if "__init__" in cls.__dict__:
            outermost.constructor(cls)

    base.__init_subclass__ = classmethod(watched)
    base.from_pretrained = classmethod(outermost.function(base.from_pretrained.__func__))


def watch_timm(built: Built) -> None:
    """Call ``built`` on each model that ``timm.create_model`` makes."""
    import timm

    create_model = Outermost(built).function(timm.create_model)
    for module in (timm, timm.models, timm.models._factory):
        module.create_model = create_model
