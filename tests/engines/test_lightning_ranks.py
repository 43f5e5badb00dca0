"""Lightning on two ranks, DDP and FSDP2: each rank draws for itself, and a resumed run is the uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ltd_fx

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from test_lightning import Language, Texts, scheduler_of, trainer_of  # noqa: E402

pytestmark = pytest.mark.slow


class Parallel(Language):
    """Transformed, and sharded, where Lightning has set up the process group."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.sharded = sharded
        self.scheduler = scheduler_of()

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp" if self.sharded else "dp",))
        ltd_fx.transform(self.model, self.scheduler, device_mesh=mesh)
        if self.sharded:
            for layer in self.model.transformer.h:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def fit(folder: Path, sharded: bool, **options: Any) -> list[Any]:
    """What this rank saw."""
    module = Parallel(sharded)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer_of(folder, save, devices=2, strategy=strategy).fit(module, Texts(dist.get_rank()), **options)
    return module.seen


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@on_ranks(2)
def test_resumed_is_uninterrupted(sharded: bool, tmp_path: Path) -> None:
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:  # as torchrun does
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": 0}.items():
            patch.setenv(name, str(value))
        expected = fit(tmp_path / "whole", sharded)
        assert fit(tmp_path / "resumed", sharded, ckpt_path=tmp_path / "whole" / "step=2.ckpt") == expected[4:]
    first = torch.tensor(expected[0][2]["transformer.h.1"])
    both = [torch.empty_like(first) for _ in range(2)]
    dist.all_gather(both, first)
    assert not torch.equal(*both)
