"""FSDP2 with random-LTD on the source of Python's standard library: ``torchrun --nproc-per-node 2 examples/fsdp2.py``.

Started again with the same OUT it goes on from the last complete checkpoint, with any number of ranks.
"""

import argparse
import os
from pathlib import Path

import data
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ltd_fx

SEQ, BATCH = 256, 8  # sequences over all ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp2"), help="checkpoints and the trained model")
    parser.add_argument("--steps", type=int, default=80, help="training steps")
    parser.add_argument("--save-every", type=int, default=40, help="steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="compile the layers, which share their graphs")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if BATCH % ranks:
        parser.error(f"{BATCH} sequences do not divide into {ranks} ranks")
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("fsdp",))

    torch.manual_seed(0)  # equal weights on all ranks
    model = GPT(GPTConfig(layers=6, width=128, heads=4, max_length=SEQ)).to(device)
    scheduler = ltd_fx.LTDScheduler(64, SEQ, max(round(0.7 * args.steps), 1), multiple_of=16, global_batch_size=BATCH)
    ltd_fx.transform(model, scheduler, device_mesh=mesh)  # each rank its own draws
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if args.compile:
        ltd_fx.compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)

    first = load(args.out, model, optimizer, scheduler)
    text, held_out = data.standard_library()
    for step in range(first, args.steps):
        loss = loss_of(model, data.batch(text, BATCH // ranks, SEQ, 0, step * ranks + rank), device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        done = step + 1
        if rank == 0 and done % 10 == 0:
            saved = scheduler.metrics()["ltd_saved"]
            print(f"step {done}: loss {loss.item():.3f}, {saved:.1%} of the layer tokens saved", flush=True)
        if done % args.save_every == 0 or done == args.steps:
            save(args.out / f"checkpoint-{done}", model, optimizer, scheduler)

    model.eval()
    with torch.no_grad():
        loss = loss_of(model, data.batch(held_out, BATCH, SEQ, 1, 0), device)
    ltd_fx.save_clean(model, args.out / "model.safetensors")  # whole tensors, under the plain model's names
    if rank == 0:
        print(f"validation loss {loss.item():.3f} (dense); written to {args.out}: model.safetensors")
    dist.destroy_process_group()


def loss_of(model: GPT, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
    inputs, targets = (tokens.to(device) for tokens in batch)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def save(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, scheduler: ltd_fx.LTDScheduler) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "scheduler": scheduler}, checkpoint_id=folder)


def load(out: Path, model: GPT, optimizer: torch.optim.Optimizer, scheduler: ltd_fx.LTDScheduler) -> int:
    """Resume from the last checkpoint, if there is one; the number of steps taken."""
    complete = [int(file.parent.name.split("-")[1]) for file in out.glob("checkpoint-*/.metadata")]  # written last
    if not complete:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "scheduler": scheduler}
    dcp.load(state, checkpoint_id=out / f"checkpoint-{max(complete)}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return max(complete)


if __name__ == "__main__":
    main()
