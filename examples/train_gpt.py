"""Train a small byte-level GPT on Python's standard library, dense and routed, and compare.

Both runs start from the same weights and see the same batches; both are compiled, layer by layer. Ctrl-C saves, and
``--resume`` goes on exactly where it stopped.

    python examples/train_gpt.py --help
"""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ltd_fx
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from tqdm import tqdm

from data import batch, standard_library
from gpt import GPT, VOCABULARY, GPTConfig
from report import compare, ideal_share, plot, table

PROMPT = b"def read_lines(path):\n"
VALIDATION = 1_000_000  # numbers of the validation batches, out of the way of the training steps


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    size = parser.add_argument_group("size")
    size.add_argument("--layers", type=int, default=8)
    size.add_argument("--width", type=int, default=192)
    size.add_argument("--heads", type=int, default=6)
    size.add_argument("--seq-len", type=int, default=256, help="bytes in a sequence")
    size.add_argument("--batch-size", type=int, default=4, help="sequences in a batch")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=400)
    training.add_argument("--lr", type=float, default=2e-3, help="peak of a warm-up and cosine schedule")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cpu")
    training.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the forward (autocast)"
    )
    schedule = parser.add_argument_group("reserved length")
    schedule.add_argument("--min-length", type=int, default=64, help="at step 0")
    schedule.add_argument(
        "--dense-from", type=float, default=0.7, help="share of the steps until layers are dense again"
    )
    schedule.add_argument("--multiple-of", type=int, default=16)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder for everything this writes")
    output.add_argument("--evaluations", type=int, default=5, help="validations in a run")
    output.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    args = parser.parse_args()
    for name in ("layers", "steps", "batch_size", "evaluations"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.width % (2 * args.heads):
        parser.error("--width must be a multiple of twice --heads, for rotary positions")
    if not 0 < args.dense_from <= 1:
        parser.error("--dense-from must be in (0, 1]")
    return args


class Run:
    """One of the two trainings: everything that a resume needs is in :meth:`state_dict`."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        torch.manual_seed(args.seed)
        self.model = GPT(GPTConfig(args.layers, args.width, args.heads, args.seq_len)).to(args.device).train()
        self.scheduler: ltd_fx.LTDScheduler | None = None
        if name == "routed":
            self.scheduler = ltd_fx.LTDScheduler(
                args.min_length,
                args.seq_len,
                max(1, round(args.dense_from * args.steps)),
                multiple_of=args.multiple_of,
                global_batch_size=args.batch_size,
            )
            ltd_fx.transform(self.model, self.scheduler, seed=args.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)
        self.counter = CompileCounterWithBackend("inductor")
        for block in self.model.blocks:  # identical layers share their graphs
            block.compile(backend=self.counter, fullgraph=True)
        self.metrics: dict[str, Any] = {
            "loss": [], "seconds": [], "compiled": [], "layer_tokens": [], "validation": [], "graphs": 0
        }  # fmt: skip

    @property
    def step(self) -> int:
        return len(self.metrics["loss"])

    def train(self, train: Tensor, valid: Tensor, interrupted: Callable[[], bool]) -> None:
        """Go on to the last step, or to the end of the step in which ``interrupted()`` turns true."""
        args, metrics = self.args, self.metrics
        every = math.ceil(args.steps / args.evaluations)
        with tqdm(total=args.steps, initial=self.step, desc=self.name, unit="step", mininterval=1.0) as progress:
            while self.step < args.steps and not interrupted():
                started, graphs = time.perf_counter(), self.counter.frame_count
                loss = self.train_step(train)
                seconds = time.perf_counter() - started
                metrics["graphs"] += self.counter.frame_count - graphs
                metrics["compiled"].append(self.counter.frame_count > graphs)
                metrics["seconds"].append(seconds)
                metrics["loss"].append(loss)
                metrics["layer_tokens"].append(self.layer_tokens())
                if self.step % every == 0 or self.step == args.steps:
                    metrics["validation"].append((self.step, self.validate(valid)))
                speed = args.batch_size * args.seq_len / seconds
                length = self.scheduler.reserved_length if self.scheduler else args.seq_len
                progress.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}", length=length, refresh=False)
                progress.update()

    def train_step(self, text: Tensor) -> float:
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * warm_up_and_cosine(self.step / args.steps)
        inputs, targets = (
            part.to(args.device) for part in batch(text, args.batch_size, args.seq_len, args.seed, self.step)
        )
        loss = self.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler:
            self.scheduler.step()
        return loss.item()

    def layer_tokens(self) -> int:
        """Tokens times layers that they have been through."""
        if self.scheduler:
            return self.scheduler.consumed_layer_tokens
        return self.step * self.args.batch_size * self.args.seq_len * self.args.layers

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        dtype = getattr(torch, self.args.dtype)
        with torch.autocast(torch.device(self.args.device).type, dtype, enabled=dtype != torch.float32):
            logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def validate(self, text: Tensor, batches: int = 8) -> float:
        """Mean loss over the same windows each time; eager, since a graph for evaluation would not pay here."""
        args = self.args
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):
            losses = [
                self.loss(
                    *(part.to(args.device) for part in batch(text, 16, args.seq_len, args.seed, VALIDATION + i))
                ).item()
                for i in range(batches)
            ]
        self.model.train()
        return sum(losses) / len(losses)

    def state_dict(self) -> dict[str, Any]:
        return {**{name: part.state_dict() for name, part in self.parts().items()}, "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.metrics = state["metrics"]

    def parts(self) -> dict[str, Any]:
        scheduler = {"scheduler": self.scheduler} if self.scheduler else {}
        return {"model": self.model, "optimizer": self.optimizer, **scheduler}


def warm_up_and_cosine(share: float, warm_up: float = 0.05) -> float:
    """The learning rate at ``share`` of the steps, as a share of its peak; a tenth of it at the end."""
    if share < warm_up:
        return (share + 1e-3) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))


def save(path: Path, contents: Any) -> None:
    """Write whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(contents, temporary)
    os.replace(temporary, path)


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """What must not differ between a run and its resume."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device")}


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    runs = {name: Run(name, args) for name in ("dense", "routed")}
    if args.resume:
        saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        changed = [name for name, value in configuration(args).items() if saved["configuration"].get(name) != value]
        if changed:
            raise SystemExit(f"{checkpoint} was written with other settings: --{changed[0].replace('_', '-')} differs")
        for name, run in runs.items():
            run.load_state_dict(saved[name])
    print(ltd_fx.summary(runs["routed"].model), end="\n\n")
    texts = standard_library()
    interrupted = stop_at_the_end_of_the_step()
    for run in runs.values():
        run.train(*texts, interrupted)
        save(checkpoint, {"configuration": configuration(args), **{n: r.state_dict() for n, r in runs.items()}})
        if interrupted():
            raise SystemExit(f"\nsaved {checkpoint}; go on with --resume")
    finish(runs, args)


def stop_at_the_end_of_the_step() -> Callable[[], bool]:
    """Ctrl-C asks, rather than cuts a step in two; a second one cuts."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    signal.signal(signal.SIGINT, ask)
    return lambda: bool(asked)


def finish(runs: dict[str, Run], args: argparse.Namespace) -> None:
    """The table, the files, and a sample from the exported weights."""
    metrics = {name: run.metrics for name, run in runs.items()}
    scheduler = runs["routed"].scheduler
    shares = [
        ideal_share(args.layers, args.width, VOCABULARY, args.seq_len, scheduler.length_at(step))
        for step in range(args.steps)
    ]
    comparison = compare(metrics["dense"], metrics["routed"], shares)
    print("\n" + table(metrics, comparison))
    (args.out / "metrics.json").write_text(json.dumps({"comparison": comparison, **metrics}))
    plot(metrics, args.out / "loss.png")

    weights = args.out / "model.safetensors"
    ltd_fx.save_clean(runs["routed"].model, weights)
    plain = GPT(GPTConfig(**asdict(runs["routed"].model.config)))  # never transformed
    ltd_fx.load_clean(plain.eval(), weights)
    print(f"\nfrom {weights}, loaded into an untransformed model:\n")
    print(plain.generate(PROMPT, 200).decode(errors="replace"))
    print(f"\nwrote {', '.join(name for name in ('loss.png', 'metrics.json', 'model.safetensors'))} to {args.out}/")


if __name__ == "__main__":
    main()
