"""What ``docs/internals.md`` says of torch, where no test of the package would notice that it holds no more."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode


@pytest.fixture
def double() -> Iterator[Any]:
    """An operator with a gradient by ``register_autograd``, and a vmap rule that calls ``torch.vmap``."""
    with torch.library._scoped_library("ltd_fx_facts", "FRAGMENT"):

        @torch.library.custom_op("ltd_fx_facts::double", mutates_args=())
        def double(x: Tensor) -> Tensor:
            return x * 2

        double.register_autograd(lambda _, grad: double(grad))
        double.register_vmap(lambda _, dims, x: (torch.vmap(lambda row: row * 2, in_dims=dims[0])(x), 0))
        yield double


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.length: Any = 1

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.length if isinstance(self.length, int) else self.length.shape[0])


def graphs_over_a_walk(lengths: list[Any]) -> int:
    torch._dynamo.reset()
    counter, module = CompileCounter(), Scaled()
    compiled = torch.compile(module, backend=counter, dynamic=False)
    for length in lengths:
        if isinstance(length, Tensor):
            torch._dynamo.mark_dynamic(length, 0)
        module.length = length
        compiled(torch.ones(3))
    torch._dynamo.reset()
    return int(counter.frame_count)


def test_a_number_of_a_module_is_guarded_by_value_and_a_shape_is_not() -> None:
    assert graphs_over_a_walk([2, 3, 4, 5]) == 4
    assert graphs_over_a_walk([torch.empty(k, 0) for k in (2, 3, 4, 5)]) == 1


def test_register_autograd_does_not_work_under_func_grad(double: Any) -> None:
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: double(x).sum())(torch.ones(3))


def test_vmap_within_a_vmap_rule_trips_an_assert_of_torchs(double: Any) -> None:
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        torch.vmap(double)(torch.ones(3, 2))


def test_batch_norm_writes_to_what_its_schema_says_it_reads() -> None:
    names = {argument.name: argument for argument in torch.ops.aten.native_batch_norm.default._schema.arguments}
    assert names["running_mean"].alias_info is None
    mean = torch.zeros(4)
    torch.ops.aten.native_batch_norm(torch.ones(2, 4), None, None, mean, torch.ones(4), True, 0.1, 1e-5)
    assert mean.any()


def test_a_write_to_a_real_tensor_under_fake_mode() -> None:
    """Done, where all inputs are real; and counted even where a fake one keeps it from being done."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(()))
    real, untouched = torch.zeros(()), torch.zeros(())
    with mode:
        real.add_(1)
    assert real == 1
    version = untouched._version
    with mode:
        untouched.add_(fake)
    assert untouched == 0
    assert untouched._version > version


def test_a_bound_method_in_its_own_object_is_a_cycle() -> None:
    module = nn.Linear(2, 2)
    module.__dict__["forward"] = module.forward
    held = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert held() is not None
    finally:
        gc.enable()
    gc.collect()
    assert held() is None
