"""Train a byte-level GPT on the source of Python's standard library twice, dense and routed (random-LTD).

Both start from the same weights and see the same batches, in turns: a step of the one, then the same step of the other,
so that whatever else slows the machine slows both. Ctrl-C saves and stops; --resume goes on, and ends with the same
bits as a run without interruption (on the CPU; a GPU's kernels need not be deterministic).
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import data
import torch
from gpt import GPT
from options import make_scheduler, parse_options, settings
from report import IdealTimer, plot, table, write_metrics
from run import Batch, Run, autocast, validation_loss
from torch import Tensor
from tqdm import tqdm

import ltd_fx

PROMPT = b"def "


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
        self.validation = [self.batch(validation_text, number) for number in range(args.eval_batches)]
        self.corpus = zlib.crc32(validation_text.numpy(), zlib.crc32(training_text.numpy()))
        scheduler = make_scheduler(args)
        self.dense, self.routed = Run(args, None), Run(args, scheduler)
        self.lengths = [scheduler.length_at(step) for step in range(args.steps)]
        self.ideal = IdealTimer(self.dense.model, args.batch, sorted({*self.lengths, args.seq}))

    def batch(self, text: Tensor, number: int) -> Batch:
        inputs, targets = data.batch(text, self.args.batch, self.args.seq, self.args.seed, number)
        return inputs.to(self.args.device), targets.to(self.args.device)

    def warm_up(self) -> None:
        """Compile everything, and leave no other trace."""
        first = self.batch(self.text, 0)
        self.dense.warm_up(first)
        self.routed.warm_up(first)
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
                tokens = self.batch(self.text, step)
                self.dense.step(tokens)
                self.routed.step(tokens)
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
    training_text, validation_text = data.standard_library()
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

    plain = GPT(routed.model.config).to(args.device)  # never transformed
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
