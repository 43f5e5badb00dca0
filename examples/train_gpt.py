"""Train a byte-level GPT on the source of Python's standard library twice, dense and routed (random-LTD).

Both start from the same weights and see the same batches, in turns: a step of the one, then the same step of the other,
so that whatever else slows the machine slows both. Ctrl-C saves and stops; --resume goes on, and ends with the same
bits as a run without interruption (on the CPU; a GPU's kernels need not be deterministic).
"""

import argparse
import contextlib
import copy
import math
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from options import make_scheduler, parse_options, settings
from report import IdealTimer, Result, plot, table, write_metrics
from text import read_standard_library, training_batch, validation_batches
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from tqdm import tqdm

import ltd_fx


PROMPT = b"def "


class Run:
    """One of the two trainings: the model, what trains it, and what was measured.

    Attributes:
        losses: training loss of each step.
        seconds: wall-clock of each step.
        validation: (step, loss) of each validation.

    """

    def __init__(self, args: argparse.Namespace, scheduler: ltd_fx.LTDScheduler | None) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.model = GPT(GPTConfig(args.layers, args.width, args.heads, args.seq)).to(args.device)
        self.scheduler = scheduler
        if scheduler is not None:
            ltd_fx.transform(self.model, scheduler, seed=args.seed)
        self.compiled = CompileCounterWithBackend("inductor")
        self.forward: Callable[[Tensor], Tensor] = self.model
        if args.compile == "model":
            self.forward = torch.compile(self.model, backend=self.compiled, fullgraph=True)
        else:
            for block in self.model.blocks:
                block.compile(backend=self.compiled, fullgraph=True)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(len(self.losses), self.args)
        loss = loss_of(self.forward, batch, self.args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - start)

    def warm_up(self, batch: Tensor) -> None:
        """Compile before the clock starts, and leave no other trace.

        The first step is the routed one, the last one dense. Inductor tunes a graph for the length it sees first: a
        resumed run must begin with the same two to have the very same kernels.
        """
        before = copy.deepcopy(self.state_dict())
        for step in (0, self.args.steps - 1):
            if self.scheduler is not None:
                self.scheduler.set_step(step)
            self.step(batch)
        self.load_state_dict(before)

    def validate(self, batches: list[Tensor]) -> float:
        self.validation.append((len(self.losses), validation_loss(self.model, batches, self.args)))
        return self.validation[-1][1]

    def layer_tokens(self, steps: int) -> int:
        if self.scheduler is not None:
            return self.scheduler.total_layer_tokens(steps)
        return steps * self.args.batch * self.args.seq * self.args.layers

    def result(self) -> Result:
        steps = [step for step, _ in self.validation]
        return Result(
            steps=steps,
            validation_loss=[loss for _, loss in self.validation],
            seconds=[sum(self.seconds[:step]) for step in steps],
            layer_tokens=[self.layer_tokens(step) for step in steps],
            training_loss=self.losses,
            graphs=self.compiled.frame_count,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "validation": self.validation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.losses, self.seconds, self.validation = state["losses"], state["seconds"], state["validation"]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to a tenth: a function of the step, with no state to save."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return args.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def loss_of(forward: Callable[[Tensor], Tensor], batch: Tensor, args: argparse.Namespace) -> Tensor:
    """Mean cross-entropy of the next byte."""
    batch = batch.to(args.device)
    with autocast(args):
        logits = forward(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: GPT, batches: list[Tensor], args: argparse.Namespace) -> float:
    """Mean over ``batches``, in eval mode; not compiled, so that the graphs counted are those of training."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        losses = [loss_of(model, batch, args).item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C only sets the event: a step is never cut in half. The second one works as usual."""
    interrupted = threading.Event()

    def handle(number: int, frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


class Comparison:
    """Both trainings and the timing of the ideal one, step by step.

    Args:
        args: the options.
        training_text: bytes to draw batches from.
        validation_text: bytes to validate on.

    """

    def __init__(self, args: argparse.Namespace, training_text: Tensor, validation_text: Tensor) -> None:
        self.args = args
        self.text = training_text
        self.validation = validation_batches(validation_text, args.eval_batches, size=args.batch, length=args.seq)
        self.corpus = zlib.crc32(validation_text.numpy(), zlib.crc32(training_text.numpy()))
        scheduler = make_scheduler(args)
        self.dense, self.routed = Run(args, None), Run(args, scheduler)
        self.lengths = [scheduler.length_at(step) for step in range(args.steps)]
        self.ideal = IdealTimer(self.dense.model, args.batch, sorted({*self.lengths, args.seq}))

    def batch(self, step: int) -> Tensor:
        return training_batch(self.text, step, seed=self.args.seed, size=self.args.batch, length=self.args.seq)

    def warm_up(self) -> None:
        """Compile everything, and leave no other trace."""
        self.dense.warm_up(self.batch(0))
        self.routed.warm_up(self.batch(0))
        self.ideal.measure()
        self.ideal.clear()

    def train(self) -> None:
        """Go on to the last step, or exit at the first Ctrl-C; either way a checkpoint is left behind."""
        steps, first = self.args.steps, len(self.dense.losses)
        layout = "{n}/{total} |{bar:24}| {elapsed}, ETA {remaining}{postfix}"
        with (
            deferred_interrupt() as interrupted,
            tqdm(total=steps, initial=first, bar_format=layout, ascii=True, disable=None, dynamic_ncols=True) as bar,
        ):  # disable=None: no bar where there is no terminal
            for step in range(first, steps):
                batch = self.batch(step)
                self.dense.step(batch)
                self.routed.step(batch)
                status = self.status(step)
                bar.set_postfix_str(status, refresh=False)
                bar.update()
                done = step + 1
                due = done % self.args.eval_every == 0 or done == steps
                if due:
                    losses = [run.validate(self.validation) for run in (self.dense, self.routed)]
                    with autocast(self.args):
                        self.ideal.measure()
                    bar.write(f"{done:5}/{steps}, {status}, validation loss {losses[0]:.3f} | {losses[1]:.3f}")
                if due or interrupted.is_set():
                    self.save()
                if interrupted.is_set():
                    bar.close()
                    sys.exit(f"interrupted after step {done}; add --resume to the same command to go on")

    def status(self, step: int) -> str:
        """One line on ``step``: dense | routed, and the reserved length."""
        pair = self.dense, self.routed
        tokens = self.args.batch * self.args.seq
        losses = " | ".join(f"{run.losses[-1]:.3f}" for run in pair)
        speeds = " | ".join(f"{tokens / run.seconds[-1]:,.0f}" for run in pair)
        return f"loss {losses}, tokens/s {speeds}, length {self.lengths[step]}"

    def ideal_seconds(self) -> float:
        """What the routed training would have taken had routing cost nothing."""
        return sum(self.dense.seconds) - sum(map(self.ideal.saved, self.lengths))

    def save(self) -> None:
        """Write the checkpoint: the old one stays until the new one is complete."""
        state = {
            "settings": settings(self.args),
            "corpus": self.corpus,
            "dense": self.dense.state_dict(),
            "routed": self.routed.state_dict(),
            "ideal": self.ideal.seconds,
        }
        path = self.args.out / "checkpoint.pt"
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, state: dict[str, Any]) -> None:
        if state["corpus"] != self.corpus:
            sys.exit(
                "--resume: the run was trained on another Python version's standard library; resume it with that one"
            )
        self.dense.load_state_dict(state["dense"])
        self.routed.load_state_dict(state["routed"])
        self.ideal.seconds = state["ideal"]


def main() -> None:
    args, checkpoint = parse_options(__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    training_text, validation_text = read_standard_library()
    comparison = Comparison(args, training_text, validation_text)
    dense, routed = comparison.dense, comparison.routed
    parameters = sum(p.numel() for p in dense.model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters; {len(training_text) / 1e6:.1f} MB of Python to train on")
    print(ltd_fx.summary(routed.model))

    print("compiling ...", flush=True)
    start = time.perf_counter()
    comparison.warm_up()
    print(f"compiled in {time.perf_counter() - start:.0f} s; below: dense | routed", flush=True)
    if checkpoint is not None:
        comparison.load(checkpoint)
    comparison.train()

    results = dense.result(), routed.result()
    ideal_seconds = comparison.ideal_seconds()
    print("\n" + table(*results, ideal_seconds))
    plot(*results, args.out / "loss.png")
    ideal = {"seconds": ideal_seconds, "measured": comparison.ideal.seconds}
    write_metrics(*results, ideal, settings(args), args.out / "metrics.json")
    ltd_fx.save_clean(routed.model, args.out / "model.safetensors")

    plain = GPT(routed.model.config).to(args.device).eval()  # never transformed
    ltd_fx.load_clean(plain, args.out / "model.safetensors")
    loss = validation_loss(plain, comparison.validation, args)
    print(
        f"\n{args.out / 'model.safetensors'}, loaded into an untransformed GPT: validation loss {loss:.4f}; it writes"
    )
    print(plain.generate(PROMPT, 300).decode("ascii", "backslashreplace"))
    print(f"\nwritten to {args.out}: loss.png, metrics.json, model.safetensors, checkpoint.pt")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume goes on from the last checkpoint, if there is one")
