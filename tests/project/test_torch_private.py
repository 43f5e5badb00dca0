"""What torch's private names must mean. A failure here says which name a release of torch has changed."""

import logging
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

from ltd_fx import LTDError, torch_private

pytestmark = pytest.mark.compat("torch")

Pair = namedtuple("Pair", "left right")


# ---- fake tensors


def test_pytree() -> None:
    pytree = torch_private.pytree
    tree = {"a": [torch.zeros(2), 3], "b": Pair(torch.ones(1), None)}
    leaves, structure = pytree.tree_flatten(tree)
    assert [leaf if leaf is None else float(torch.as_tensor(leaf).sum()) for leaf in leaves] == [0, 3, 1, None]
    again = pytree.tree_unflatten(leaves, structure)
    assert again["b"] == tree["b"]
    assert type(again["b"]) is Pair
    assert all(ours is theirs for ours, theirs in zip(pytree.tree_leaves(tree), leaves, strict=True))
    assert pytree.tree_map_only(Tensor, lambda t: t.shape[0], tree) == {"a": [2, 3], "b": Pair(1, None)}
    assert pytree.tree_map(type, [Pair(1, 2.0)], is_leaf=lambda value: isinstance(value, Pair)) == [Pair]
    path, _ = pytree.tree_flatten_with_path(tree)[0][2]
    assert pytree.keystr(path) == "['b'].left"


def test_fake_tensor_mode() -> None:
    """Shapes alone, on any device, with real parameters among the inputs."""
    layer = nn.Linear(3, 4)
    with torch_private.FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(2, 3)
        out = layer(hidden)
        on_gpu = torch.empty(2, 3, device="cuda")
    assert (out.shape, out.device.type, on_gpu.device.type) == ((2, 4), "cpu", "cuda")
    assert type(out) is type(hidden) is not Tensor
    assert type(layer.weight) is nn.Parameter


def test_is_fake() -> None:
    with torch_private.FakeTensorMode():
        fake = torch.empty(2)
    assert torch_private.is_fake(fake)
    assert torch_private.is_fake(nn.Parameter(fake))
    assert not torch_private.is_fake(torch.empty(2))


def test_fake_mode_of() -> None:
    with torch_private.FakeTensorMode():
        fake = torch.empty(2)
    with torch_private.fake_mode_of(fake):
        assert (torch.empty(2) + fake).shape == (2,)
    with torch_private.fake_mode_of(torch.empty(2)):
        assert type(torch.empty(2)) is Tensor


def test_fake_tensor_log(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of an operator that fails goes there, and nowhere else."""
    caplog.set_level(logging.ERROR)
    with torch_private.FakeTensorMode(), pytest.raises(RuntimeError):
        torch.empty(2, 3) @ torch.empty(2, 3)
    assert {record.name for record in caplog.records} == {torch_private.FAKE_TENSOR_LOG}


def test_storage_of() -> None:
    """Views of one memory have one; tensors without any have some."""
    tensor, other = torch.zeros(2, 3), torch.zeros(2, 3)
    assert torch_private.storage_of(tensor) == torch_private.storage_of(tensor[1:].T)
    assert torch_private.storage_of(tensor) == torch_private.storage_of(tensor.detach())
    assert torch_private.storage_of(tensor) != torch_private.storage_of(other)
    two = TwoTensor(tensor, other)
    with torch_private.FakeTensorMode():
        fake = torch.empty(2)
    numbers = [torch_private.storage_of(t) for t in (tensor, two, fake, torch.eye(2).to_sparse())]
    assert len(set(numbers)) == 4


# ---- operators


def test_written_by() -> None:
    aten = torch.ops.aten
    assert torch_private.written_by(aten.add_.Tensor) == {0, "self"}
    assert torch_private.written_by(aten.add.out) == {3, "out"}
    assert torch_private.written_by(aten._foreach_add_.Scalar) == {0, "self"}
    assert torch_private.written_by(aten.add.Tensor) == set()


def dispatched(function: Callable[[], Any]) -> list[Any]:
    seen: list[Any] = []

    class Seen(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        function()
    return seen


def test_without_modes() -> None:
    def function() -> None:
        with torch_private.without_modes():
            torch.zeros(2) + 1
        torch.ones(2)

    assert dispatched(function) == [torch.ops.aten.ones.default]


def test_softmaxes_under_torch_dispatch_mode() -> None:
    scores = torch.randn(1, 2, 3, 3, requires_grad=True)
    softmax, safe_softmax = torch_private.SOFTMAXES
    assert softmax in dispatched(lambda: scores.softmax(-1))
    with sdpa_kernel(SDPBackend.MATH):
        seen = dispatched(lambda: nn.functional.scaled_dot_product_attention(scores, scores, scores, scores))
    assert safe_softmax in seen


def test_to_copy_under_torch_dispatch_mode() -> None:
    assert dispatched(lambda: torch.ones(2).double()).count(torch_private.TO_COPY) == 1


def test_safe_softmax() -> None:
    """As ``softmax``, but zeros for a row of -inf."""
    scores = torch.randn(2, 3)
    assert torch.equal(torch_private.safe_softmax(scores, -1), scores.softmax(-1))
    assert torch_private.safe_softmax(torch.full((1, 3), -torch.inf), -1).tolist() == [[0, 0, 0]]


def test_check_with() -> None:
    """Raises our error, asks for its message only then, and does not ask for the value of a size known at run time."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

    torch_private.check_with(LTDError, True, lambda: 1 / 0)
    with pytest.raises(LTDError, match="no good"):
        torch_private.check_with(LTDError, False, lambda: "no good")
    size = ShapeEnv().create_unbacked_symint()
    with pytest.raises(GuardOnDataDependentSymNode):
        bool(size > 3)
    torch_private.check_with(LTDError, size > 3, lambda: "unknown")


def test_is_grouped_mm() -> None:
    seen: list[bool] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(torch_private.is_grouped_mm(func))
            return func(*args, **(kwargs or {}))

    tokens, weights = torch.randn(4, 8).bfloat16(), torch.randn(2, 8, 8).bfloat16()
    with Seen():
        nn.functional.grouped_mm(tokens, weights, offs=torch.tensor([2, 4], dtype=torch.int32))
        tokens.mm(tokens.mT)
    assert any(seen)
    assert not seen[-1]


def test_op_overload() -> None:
    aten, kind = torch.ops.aten, torch_private.OpOverload
    assert [isinstance(op, kind) for op in (aten.mul.Tensor, aten.mul, torch.mul)] == [True, False, False]
    assert [op.is_view for op in (aten.view.default, aten.expand.default, aten.mul.Tensor)] == [True, True, False]
    assert [torch.Tag.pointwise in op.tags for op in (aten.mul.Tensor, aten.mm.default)] == [True, False]
    assert torch.Tag.nondeterministic_seeded in aten.bernoulli.default.tags


# ---- autograd


def test_in_backward() -> None:
    """Only while the engine runs: in hooks and in what a checkpoint computes again."""
    seen: list[bool] = []

    def layer(x: Tensor) -> Tensor:
        seen.append(torch_private.in_backward())
        return x.sin()

    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda grad: seen.append(torch_private.in_backward()))
    out = torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False)
    assert seen == [False]
    out.backward()
    assert seen == [False, True, True]
    assert not torch_private.in_backward()


def test_is_transforming() -> None:
    """Also where a tensor is none of the transformation's."""
    seen: list[bool] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(torch_private.is_transforming())
        return x.sum()

    torch.func.grad(loss)(torch.ones(2))
    torch.vmap(loss)(torch.ones(2, 2))
    assert seen == [True, True]
    assert not torch_private.is_transforming()


def test_is_functorch_wrapped_tensor() -> None:
    wrapped = torch_private.is_functorch_wrapped_tensor
    seen: list[bool] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(wrapped(x))
        return x.sum()

    torch.func.grad(loss)(torch.ones(2))
    torch.vmap(loss)(torch.ones(2, 2))
    assert seen == [True, True]
    assert [wrapped(x) for x in (torch.ones(2), nn.Parameter(torch.ones(2)))] == [False, False]


# ---- learning rates


def test_lr_scheduler_state() -> None:
    """A scheduler resumes from these, and its rates come out right."""

    def build() -> torch.optim.lr_scheduler.LambdaLR:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    ran, resumed = build(), build()
    for _ in range(3):
        ran.optimizer.step()
        ran.step()
    state = ran.state_dict()
    resumed.load_state_dict({"lr_lambdas": [None], **{name: state[name] for name in torch_private.LR_SCHEDULER_STATE}})
    assert resumed.get_last_lr() == ran.get_last_lr() == [0.5]
    resumed.optimizer.step()
    resumed.step()
    assert resumed.get_last_lr() == [0.4]
