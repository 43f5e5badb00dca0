"""``transform``, ``verify`` and a first training forward leave the model, its run and the process as they were."""

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attend import Attention
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import ltd_fx
from ltd_fx import LTDError

D, LENGTH = 16, 12


class Layer(nn.Module):
    """Counts its forwards in every way there is, and changes a weight in each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.dropout = Attention(D), nn.BatchNorm1d(D), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("rebound", torch.zeros(()))
        self.register_buffer("load", torch.zeros(4))
        self.plain, self.number, self.seen = torch.zeros(()), 0, {"tokens": 0}
        self.scale = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.rebound = self.rebound + 1
        self.load[:2].add_(x.shape[1])
        self.load.data.mul_(2)
        self.plain += 1
        self.number += 1
        self.seen["tokens"] += x.shape[1]
        with torch.no_grad():
            self.scale[:2].clamp_(0.5)
            self.scale.data.clamp_(0.5)
        return x + self.attention(x) * self.scale


class Net(nn.Module):
    """Draws from every generator, and runs a norm that keeps statistics in training."""

    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.inputs, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)
        self.layers = nn.ModuleList(layer() for _ in range(4))
        self.weights = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        x = nn.functional.dropout(self.inputs(x), 0.1, self.training) + torch.rand(D)
        self.weights.data = self.weights.data * 0.5
        x = self.norm(x.mT).mT * self.weights
        for layer in self.layers:
            x = layer(x)
        return x


class Calm(nn.Module):
    """Changes nothing in its forward."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inputs, self.layers = nn.Linear(D, D), nn.ModuleList(layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Refused(Layer):
    """Sees a number of tokens, so it may not see fewer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.arange(x.shape[1])[:, None].to(x))


def inputs() -> Tensor:
    return torch.randn(2, LENGTH, D, generator=torch.Generator().manual_seed(1))


def everything(model: nn.Module) -> Any:
    """All that is told of a model and of the process."""
    modules: Any = [(name, type(module), vars(module).copy()) for name, module in model.named_modules()]
    modules = [(name, cls, {k: copied(v) for k, v in held.items()}) for name, cls, held in modules]
    parameters = {n: (id(p), p.data_ptr(), p.requires_grad, p.grad) for n, p in model.named_parameters()}
    state = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    return modules, parameters, state, process()


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value.copy() if isinstance(value, (dict, set)) else value


def process() -> Any:
    numpy = np.random.get_state()
    drawn = torch.get_rng_state(), random.getstate(), numpy[1], numpy[2:]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled()
    flags = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), torch.get_default_device()
    return drawn, modes, flags, torch._dynamo.eval_frame._stance.stance, len(threading.enumerate())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a is b or a == b)


def test_a_refused_transform_changes_nothing() -> None:
    model, scheduler, x = Net(Refused).train(), ltd_fx.LTDScheduler(4, LENGTH, 10), inputs()
    model.layers[0].eval()
    model.layers[1].scale.requires_grad_(False)
    before, batch, state = everything(model), x.clone(), copy.deepcopy(scheduler.state_dict())
    with pytest.raises(LTDError, match="cannot be routed"):
        ltd_fx.transform(model, scheduler, example_inputs=(x,))
    assert same(everything(model), before)
    assert torch.equal(x, batch)
    assert scheduler.state_dict() == state


@pytest.mark.parametrize("fake", [True, False])
def test_transform_verify_and_restore_change_nothing(fake: bool) -> None:
    class Real(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[torch.ones(len(x)).nonzero()[:, 0]])  # which no fake tensor tells the shape of

    model, x = (Net() if fake else Real()).train(), inputs()
    before = everything(model)
    ltd_fx.transform(model, example_inputs=(x,))
    assert ltd_fx.verify(model, (x,)).ok
    ltd_fx.restore(model)
    assert same(everything(model), before)


def test_the_first_training_forward_counts_once() -> None:
    model, x = Net().train(), inputs()
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    plain(x)
    ltd_fx.transform(model)
    torch.manual_seed(3)
    model(x)
    for ours, theirs in zip(model.layers, plain.layers, strict=True):
        assert torch.equal(ours.calls, theirs.calls)
        assert torch.equal(ours.rebound, theirs.rebound)
        assert torch.equal(ours.scale, theirs.scale)
        assert ours.number == theirs.number == 1
        assert torch.equal(ours.plain, torch.ones(()))
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert model.norm.num_batches_tracked == 1
    assert torch.equal(model.weights, plain.weights)


def test_inputs_are_not_written_to() -> None:
    class Writing(Calm):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(x)

    model, x = Writing(Making), inputs()
    ltd_fx.transform(model, example_inputs=(x,))
    ltd_fx.verify(model, (x,))
    assert torch.equal(x, inputs())


def test_hooks_of_the_run_are_not_called() -> None:
    calls: list[Any] = []

    def hook(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 1000:
            raise AssertionError("a hook of the user's")

    model, x = Calm(Making).train(), inputs()
    handles = [register_module_forward_hook(hook), register_module_forward_pre_hook(hook)]
    for module in (model, model.inputs, model.layers[1], model.layers[1].attention.q):
        handles += [module.register_forward_hook(hook), module.register_forward_pre_hook(hook)]
        handles += [module.register_full_backward_hook(hook)]
    try:
        ltd_fx.transform(model, example_inputs=(x,))
        assert ltd_fx.verify(model, (x,)).ok
        assert calls == []
        model(x)
        assert len(calls) >= 8
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_that_compute_are() -> None:
    """Weight norm of the old kind makes the weight in a hook."""
    model = Calm(Making).train()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.inputs)
    del model.inputs.weight
    ltd_fx.transform(model, example_inputs=(inputs(),))
    assert ltd_fx.verify(model, (inputs(),)).ok
    assert not hasattr(model.inputs, "weight")


def test_other_threads_keep_their_default_dtype() -> None:
    seen: set[torch.dtype] = set()
    done, model = threading.Event(), Calm(Making).train()

    def watch() -> None:
        while not done.is_set():
            seen.add(torch.zeros(1).dtype)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert ltd_fx.verify(ltd_fx.transform(model, example_inputs=(inputs(),)), (inputs(),)).ok
    finally:
        done.set()
        thread.join()
    assert seen == {torch.float32}


class Making(nn.Module):
    """Makes tensors without naming a dtype, and multiplies them with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(D)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.ones(D, D) + torch.full((D, D), 0.5) + torch.tensor([0.5]) + torch.arange(D) / D
        return x + self.attention(x @ made / D)


@pytest.mark.parametrize("lazy", [False, True])
def test_parameters_that_a_forward_makes_are_left_to_it(lazy: bool) -> None:
    model = Calm(Making)
    model.inputs = nn.LazyLinear(D)
    with pytest.raises(LTDError, match=r"makes its parameter inputs\.weight: run one before"):
        ltd_fx.transform(model, example_inputs=None if lazy else (inputs(),))(inputs())
    assert type(model.inputs) is nn.LazyLinear
    assert type(model.inputs.weight) is nn.UninitializedParameter
