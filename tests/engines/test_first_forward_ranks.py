"""Built-in patterns without example inputs, on several ranks: each tests them by its own batch, all to the same end."""

import warnings

import torch
import torch.distributed as dist
from conftest import SEQ, decoder, loss_of
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ltd_fx
from ltd_fx import LTDScheduler


def llama() -> nn.Module:
    torch.manual_seed(0)
    return ltd_fx.transform(decoder("Llama")().train(), LTDScheduler(9, SEQ, 3))


def train(model: nn.Module) -> list[str]:
    """A step, on more padding the higher the rank; and what is known of the layers then."""
    mask = torch.ones(2, SEQ, dtype=torch.long)
    mask[:, : 20 * dist.get_rank()] = 0
    ids = torch.randint(0, 64, (2, SEQ), generator=torch.Generator().manual_seed(dist.get_rank()))
    loss_of(model(input_ids=ids, attention_mask=mask, use_cache=False)).backward()
    assert {rows.shape[1] for rows in ltd_fx.sampled_indices(model).values()} == {9}
    return [site.status for site in ltd_fx.summary(model).sites if site.routed]


@on_ranks(2)
def test_ddp() -> None:
    model = DistributedDataParallel(llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert train(model) == ["proven"] * 2
    gradients = [p.grad.clone() for p in model.parameters()]
    for gradient in gradients:
        dist.broadcast(gradient, 0)
    assert all(torch.equal(p.grad, first) for p, first in zip(model.parameters(), gradients, strict=True))


@on_ranks(2)
def test_sharded_parameters_leave_it_untested_with_one_warning() -> None:
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [train(model) for _ in range(2)] == [["to be tested"] * 2] * 2
    ours = [str(warning.message) for warning in caught if "ltd_fx" in str(warning.message)]
    assert len(ours) == 1, ours
    assert "cannot be tested while parameters are sharded" in ours[0]
