"""What a forward keeps outside of the model's own modules: tables in the globals of helper files, in attributes of
classes, in closures, in default arguments and in ``functools`` caches.
"""

import functools
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ltd_fx.learn.hooks import forward_hooks

# Files of these packages are not looked into: Python's own, torch's, and those that never hold a model's tables.
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "ltd_fx", "__future__"}
# So deep are the containers that are looked into: an object's dictionary of dictionaries, say.
_DEPTH = 5
_CONTAINERS = (dict, list, set, deque, tuple, frozenset)
_MUTABLE = (dict, list, set, deque, functools._lru_cache_wrapper)
# Looked into whosever class it is of.
_TRANSPARENT = (
    *_CONTAINERS,
    functools._lru_cache_wrapper,
    functools.partial,
    staticmethod,
    classmethod,
    property,
    types.MethodType,
)
_PLAIN = (types.NoneType, str, bytes, int, float, torch.dtype, torch.device, Tensor, types.ModuleType)
_UNASSIGNED = object()
_NOTHING: list[Any] = []
_OWN = vars(nn.Module()).keys()


class Outside:
    """What the code of a model can reach by name and may write to, as it is now; :meth:`put_back` goes back to that.

    Only what came to hold tensors of a forward is put back. Whatever else a first forward does outside of the model (a
    late import that registers its functions, a process group made when it is needed) may be something done only once.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        classes = {base for module in modules for base in type(module).__mro__ if not _is_foreign(base)}
        roots = [value for module in modules for name, value in vars(module).items() if name not in _OWN]
        roots += [hook for module in modules for hook in forward_hooks(module)]
        self._held: list[tuple[Any, list[Any], list[Any]]] = []
        self._caches: list[tuple[Any, int]] = []
        # the modules themselves are put back whole, whatever they hold
        for holder in _holders([*roots, *classes, *_namespaces(classes)], {id(module) for module in modules}):
            if isinstance(holder, functools._lru_cache_wrapper):
                self._caches.append((holder, holder.cache_info().misses))
            else:
                # one for all that is empty: most are, and each list is the garbage collector's work
                self._held.append((holder, _keys(holder) or _NOTHING, _contents(holder) or _NOTHING))

    def put_back(self, is_new: Callable[[Tensor], bool]) -> None:
        """Put back what has come to hold a tensor for which ``is_new`` is true."""
        for holder, keys, before in self._held:
            now = _contents(holder)
            if len(now) == len(before) and all(map(operator.is_, now, before)):
                continue
            known = set(map(id, before))
            if any(is_new(tensor) for tensor in _tensors([value for value in now if id(value) not in known])):
                _refill(holder, keys, before)
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _is_foreign(value: Any) -> bool:
    name = getattr(value, "__module__", None)
    return not isinstance(name, str) or name.partition(".")[0] in _FOREIGN


def _namespaces(classes: set[type]) -> Iterator[dict[str, Any]]:
    """The globals of the files that define ``classes``, of the files whose names these use, and so on.

    A file that itself uses nothing of torch is looked into, but leads no further.
    """
    names = {cls.__module__ for cls in classes}
    waiting = list(names)
    while waiting:
        module = sys.modules.get(waiting.pop())
        if module is None:
            continue
        yield vars(module)
        used = {name for value in list(vars(module).values()) if (name := _file_of(value)) is not None}
        if any(name.partition(".")[0] == "torch" for name in used):
            further = {name for name in used if name.partition(".")[0] not in _FOREIGN} - names
            names |= further
            waiting += further


def _file_of(value: Any) -> str | None:
    if isinstance(value, types.ModuleType):
        return value.__name__
    name = getattr(value, "__module__", None) if isinstance(value, (type, types.FunctionType)) else None
    return name if isinstance(name, str) else None


def _holders(roots: list[Any], seen: set[int]) -> Iterator[Any]:
    """What is mutable among ``roots`` and in all that they hold; an object is by its ``__dict__``."""
    waiting = [(root, 0) for root in roots]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in seen or isinstance(value, _PLAIN) or depth > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, _MUTABLE) or _is_closure(value) or (isinstance(value, type) and not _is_foreign(value)):
            yield value
        foreign = _is_foreign(value if isinstance(value, (type, types.FunctionType)) else type(value))
        if isinstance(value, _TRANSPARENT) or not foreign:
            waiting += [(inner, depth + 1) for inner in _inner(value)]


def _inner(value: Any) -> list[Any]:
    """What ``value`` holds. None of its own code is run for it: a mapping may load files when it is read."""
    if isinstance(value, (*_CONTAINERS, type)):
        return _contents(value)
    if isinstance(value, types.FunctionType):
        keywords = list((value.__kwdefaults__ or {}).values())
        return [value.__closure__, *(value.__defaults__ or ()), *keywords, value.__dict__]
    if isinstance(value, functools._lru_cache_wrapper):
        return [value.__wrapped__]
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    try:
        return [object.__getattribute__(value, "__dict__")]
    except AttributeError:
        return []


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    """The tensors that ``values`` hold."""
    waiting, seen = [(value, 0) for value in values], set()
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and depth <= _DEPTH and not isinstance(value, (*_PLAIN, type, types.FunctionType)):
            seen.add(id(value))
            waiting += [(inner, depth + 1) for inner in _inner(value)]


def _is_closure(value: Any) -> bool:
    """Whether it is the cells of one function: a table and the length it was made for belong together."""
    return isinstance(value, tuple) and len(value) > 0 and isinstance(value[0], types.CellType)


def _cell_contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _UNASSIGNED


def _keys(holder: Any) -> list[Any]:
    if isinstance(holder, type):
        return list(vars(holder))
    return list(dict.keys(holder)) if isinstance(holder, dict) else []


def _contents(holder: Any) -> list[Any]:
    if isinstance(holder, type):
        return list(vars(holder).values())
    if isinstance(holder, dict):
        return list(dict.values(holder))
    if _is_closure(holder):
        return [_cell_contents(cell) for cell in holder]
    return list(holder)


def _refill(holder: Any, keys: list[Any], values: list[Any]) -> None:
    if isinstance(holder, type):
        before = dict(zip(keys, values, strict=True))
        for name in [*vars(holder)]:
            if name not in before:
                delattr(holder, name)
            elif vars(holder)[name] is not before[name]:
                setattr(holder, name, before[name])
        for name in before.keys() - vars(holder).keys():
            setattr(holder, name, before[name])
    elif _is_closure(holder):
        for cell, value in zip(holder, values, strict=True):
            if value is _UNASSIGNED:
                del cell.cell_contents
            else:
                cell.cell_contents = value
    else:
        holder.clear()
        if isinstance(holder, dict):
            holder.update(zip(keys, values, strict=True))
        elif isinstance(holder, set):
            holder.update(values)
        else:
            holder.extend(values)
