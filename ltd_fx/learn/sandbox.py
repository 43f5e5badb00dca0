"""Forwards that leave the program as it was: nothing counted, cached, written to or drawn, no mere onlooker called."""

import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ltd_fx.errors import LTDError
from ltd_fx.learn.hooks import computes, of_a_library
from ltd_fx.learn.kernels import in_plain_sight
from ltd_fx.learn.numbers import watch_number
from ltd_fx.learn.outside import Outside
from ltd_fx.torch_private import (
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    call_without_hooks,
    is_fake,
    replace_tensors,
    storage_of,
    written_by,
)
from ltd_fx.torch_private_sizes import symbolic_mode


class Sandbox:
    """Where forwards of a model leave the program as it was when the sandbox was made.

    Attributes:
        mode: of all fake tensors made here.

    Raises:
        LTDError: the model has parameters that only a forward makes.
    """

    def __init__(self, model: nn.Module) -> None:
        lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
        if lazy is not None:
            raise LTDError(
                f"ltd_fx: the first forward of the model makes its parameter {lazy}: run one before, in eval"
            )
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = model
        self._outside = Outside(model)
        self._fakes: dict[tuple[int, int], Any] = {}
        self._numbered: set[type[nn.Module]] = set()

    @cached_property
    def symbolic(self) -> FakeTensorMode:
        """Another mode, of fake tensors whose sizes may be symbols."""
        return symbolic_mode()

    @contextmanager
    def open(self, module: nn.Module | None = None, *, fake: FakeTensorMode | None = None) -> Iterator[None]:
        """Undo what forwards of the model do besides what they return, and all that is done to its modules' attributes.

        Within, the modules have buffers of their own, copies or fakes, and call no hooks that only watch.

        Args:
            module: instead of the model, a layer or a copy of one; hooks of its own are around what is routed.
            fake: parameters and buffers are fake, of this mode, under which the forwards are to run.
        """
        modules = list((self._model if module is None else module).modules())
        hooks = [computes if each is not module else of_a_library for each in modules]
        plain = in_plain_sight(modules)
        with plain, _random_state(), _autocast_cache_off(), _attributes(modules), _Writes() as writes:
            try:
                for each, called in zip(modules, hooks, strict=True):
                    if not isinstance(each, torch.jit.ScriptModule):
                        self._substitute(each, fake)
                        call_without_hooks(each, but=called)
                        watch_number(each, partial(self._numbered.add, type(each)))
                yield
            finally:
                self._outside.put_back(writes.is_new)

    def goes_by_number(self, layer: nn.Module) -> bool:
        """Whether modules like those of the layer computed something from their layer's number, in forwards so far."""
        return any(type(module) in self._numbered for module in layer.modules())

    def _substitute(self, module: nn.Module, fake: FakeTensorMode | None) -> None:
        """Give the module tensors to write to; :func:`_attributes` puts its own back."""
        own = _copy if fake is None else partial(_fake, fake)
        replace_tensors(module, own, None if fake is None else partial(self._fake_parameter, fake))
        plain = {name: value for name, value in module.__dict__.items() if isinstance(value, Tensor)}
        module.__dict__.update({name: own(value) for name, value in plain.items()})

    def _fake_parameter(self, mode: FakeTensorMode, parameter: Tensor | None) -> Tensor | None:
        key = id(mode), id(parameter)
        if key not in self._fakes:
            self._fakes[key] = _fake(mode, parameter)
        return self._fakes[key]  # type: ignore[no-any-return]


def _fake(mode: FakeTensorMode, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not _is_plain(tensor):
        return tensor
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    made.__dict__.update(vars(tensor))
    return made


def _copy(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or not _is_plain(tensor) else tensor.detach().clone()


def _is_plain(tensor: Tensor) -> bool:
    """Whether it can be replaced: it holds data of its own, and is of no class whose behaviour would be lost."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type != "meta"


@contextmanager
def _attributes(modules: list[nn.Module]) -> Iterator[None]:
    """The attributes of the modules are put back, those in containers too, and what parameters refer to."""
    attributes = [dict(module.__dict__) for module in modules]
    held = [
        (value, value.copy() if value else ())
        for each in attributes
        for value in each.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    parameters = [
        (p, p.data, p.grad, p.requires_grad)
        for module in modules
        for p in module.parameters(recurse=False)
        if type(p) is nn.Parameter
    ]
    try:
        yield
    finally:
        for module, before in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(before)
        for container, kept in held:
            if container or kept:
                container.clear()
                container.extend(kept) if isinstance(container, list) else container.update(kept)
        for parameter, data, grad, requires_grad in parameters:
            if parameter.data.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.grad is not grad:
                parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


class _Writes(TorchDispatchMode):
    """Puts back what was written to tensors that were there before: the inputs, parameters, counters in globals."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._new: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def is_new(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` was made within."""
        return is_fake(tensor) or storage_of(tensor) in self._new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = written_by(func) if isinstance(func, OpOverload) else frozenset()
        if written:
            given = (*enumerate(args), *kwargs.items())
            for tensor in tensors_in(value for key, value in given if key in written):
                self._save(tensor)
        result = func(*args, **kwargs)
        made = {storage_of(tensor) for tensor in tensors_in((result,)) if not is_fake(tensor)}
        if made:
            self._new |= made - {storage_of(tensor) for tensor in tensors_in((*args, *kwargs.values()))}
        return result

    def _save(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        if not self.is_new(tensor) and key not in self._before and tensor.device.type != "meta":
            # all of what it is a view of; of a class of its own, what it says that it is
            value = tensor.untyped_storage() if type(tensor) in (Tensor, nn.Parameter) else tensor.detach()
            self._before[key] = value, value.clone()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for storage, before in self._before.values():
            storage.copy_(before)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


@contextmanager
def _random_state() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    before = None if numpy is None else numpy.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(before)


@contextmanager
def _autocast_cache_off() -> Iterator[None]:
    """Within ``torch.autocast`` the casts of weights are cached for the whole region: fakes, or what no_grad made."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
