"""What torch's private names about modules must mean. A failure here says which name a release of torch has changed."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ltd_fx import torch_private

pytestmark = pytest.mark.compat("torch")


def test_child_slots() -> None:
    """Every name, in order, with ``None`` and with a module that has two names."""
    parent, child = nn.Module(), nn.Identity()
    parent.first, parent.again, parent.none = child, child, child
    parent.none = None
    assert torch_private.child_slots(parent) == {"first": child, "again": child, "none": None}


def hooked() -> tuple[nn.Module, list[str]]:
    ran: list[str] = []
    module = nn.Linear(2, 2)
    for name in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        getattr(module, f"register_{name}_hook")(lambda *args, name=name: ran.append(name))
    module.register_forward_hook(lambda *args: ran.append("with_kwargs"), with_kwargs=True, always_call=True)
    module(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert len(ran) == 5
    ran.clear()
    return module, ran


def test_hooks_of() -> None:
    """All kinds: a module without them calls none."""
    module, ran = hooked()
    for hooks in torch_private.hooks_of(module):
        hooks.clear()
    module(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert ran == []


def test_call_without_hooks() -> None:
    """Nor those of all modules, nor what was compiled; those that are added later are called."""
    module, ran = hooked()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *args: ran.append("everywhere"))
    module.compile(backend=lambda *args: pytest.fail("compiled"))
    before = dict(module.__dict__)
    torch_private.call_without_hooks(module, but=lambda hook: False)
    assert module(torch.ones(1, 2)).shape == (1, 2)
    assert ran == []
    module.register_forward_hook(lambda *args: ran.append("added"))
    module(torch.ones(1, 2))
    assert "added" in ran
    module.__dict__.clear()
    module.__dict__.update({**before, "_compiled_call_impl": None})
    ran.clear()
    torch_private.call_without_hooks(module, but=lambda hook: True)
    module(torch.ones(1, 2))
    everywhere.remove()
    assert sorted(ran) == ["everywhere", "forward", "forward_pre", "with_kwargs"]


def test_replace_tensors() -> None:
    module = nn.BatchNorm1d(2, affine=True)
    before, buffers, weight = dict(module.__dict__), dict(module.named_buffers()), module.weight
    torch_private.replace_tensors(module, torch.clone, lambda p: nn.Parameter(p * 2))
    module(torch.ones(3, 2))
    assert module.num_batches_tracked == 1
    assert torch.equal(module.weight, weight * 2)
    module.__dict__.update(before)
    assert all(buffers[name] is buffer for name, buffer in module.named_buffers())
    assert module.num_batches_tracked == 0
    assert module.weight is weight


def test_orig_mod() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    assert [name for name, _ in compiled.named_children()] == [torch_private.ORIG_MOD]


def test_checkpoint_wrapped_module() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = checkpoint_wrapper(nn.Linear(2, 2))
    assert [name for name, _ in wrapped.named_children()] == [torch_private.CHECKPOINT_WRAPPED_MODULE]


def test_replicate() -> None:
    """It makes what ``is_replica`` knows, with the attributes of the module, hooks among them."""
    module = nn.Linear(2, 2)
    module.tag = 1
    replica = getattr(module, torch_private.REPLICATE)()
    assert replica is not module
    assert (replica.tag, torch_private.is_replica(replica), torch_private.is_replica(module)) == (1, True, False)
    assert replica._forward_pre_hooks is module._forward_pre_hooks


def test_fsdp_wrapped_module(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=True)
        assert [name for name, _ in wrapped.named_children()] == [torch_private.FSDP_WRAPPED_MODULE]
    finally:
        torch.distributed.destroy_process_group()


def test_share_contents() -> None:
    module, holder = nn.Module(), nn.BatchNorm1d(2)
    torch_private.share_contents(module, holder)
    holder.register_buffer("later", torch.ones(1))
    assert list(module.state_dict()) == list(holder.state_dict())
    assert module.weight is holder.weight
    assert module.to(torch.float64).weight.dtype == holder.weight.dtype == torch.float64


def test_input_spec_maybe() -> None:
    class Added(nn.Module):
        def forward(self, a: torch.Tensor, *, b: torch.Tensor) -> torch.Tensor:
            return a + b

    program = torch.export.export(Added(), (torch.ones(2),), {"b": torch.ones(2)})
    spec = torch_private.input_spec_maybe(program.module())
    assert torch_private.pytree.tree_unflatten([1, 2], spec) == ((1,), {"b": 2})
    assert torch_private.input_spec_maybe(torch.fx.symbolic_trace(nn.Linear(2, 2))) is None


def test_assert_scalar() -> None:
    with pytest.raises(RuntimeError, match="too many"):
        torch_private.ASSERT_SCALAR(False, "too many")
