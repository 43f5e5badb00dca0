"""Which forward hooks are a part of what a model computes, and so are called while it is learnt and proven.

All others watch: they keep activations, count or log, and would count forwards that are none of the user's.
"""

import dis
import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from ltd_fx.torch_private import hooks_of

# Whose hooks always compute: sharded and tensor-parallel weights, recorded outputs, adapters.
_COMPUTING = ("torch", "transformers", "peft", "accelerate")
_IN_PLACE = re.compile(r"[a-z]\w*[a-z0-9]_")
_AUGMENTED = ("+=", "-=", "*=", "/=", "@=")


def computes(hook: Any) -> bool:
    """Whether a hook is :func:`of_a_library`, or :func:`may_change` what its module is given or returns."""
    return of_a_library(hook) or may_change(hook)


def may_change(hook: Any) -> bool:
    """Whether a hook of the user's may return something, or writes in place; its code tells."""
    if of_a_library(hook):
        return False
    hook = _function(hook)
    code = getattr(hook if hasattr(hook, "__code__") else type(hook).__call__, "__code__", None)
    if code is None or any(map(_IN_PLACE.fullmatch, code.co_names)):
        return True
    steps = list(dis.get_instructions(code))
    pairs = list(pairwise(steps))
    returned = [step.argval for step in steps if step.opname == "RETURN_CONST"]
    returned += [a.argval if a.opname == "LOAD_CONST" else a for a, b in pairs if b.opname == "RETURN_VALUE"]
    given = set(code.co_varnames[: code.co_argcount])
    augmented = any(a.argrepr in _AUGMENTED and given & _stored(b) for a, b in pairs)
    return augmented or any(value is not None for value in returned)


def _stored(step: dis.Instruction) -> set[str]:
    if not step.opname.startswith("STORE_FAST"):
        return set()
    return set(step.argval) if isinstance(step.argval, tuple) else {step.argval}


def leaves_hooks_out(layer: nn.Module) -> bool:
    """Whether modules within the layer have hooks that only watch; the layer's own are outside of it."""
    return not all(
        computes(hook) for module in layer.modules() if module is not layer for hook in forward_hooks(module)
    )


def forward_hooks(module: nn.Module) -> Iterator[Any]:
    """The module's forward hooks and those that go before it."""
    for hooks in hooks_of(module)[:2]:
        yield from hooks.values()


def of_a_library(hook: Any) -> bool:
    """Whether a hook is one of those by which a library shards, adapts or records a module."""
    return str(getattr(_function(hook), "__module__", "")).partition(".")[0] in _COMPUTING


def _function(hook: Any) -> Any:
    while isinstance(hook, partial):
        hook = hook.func
    return hook
