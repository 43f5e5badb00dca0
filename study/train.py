"""One run: ``python study/train.py text/random-ltd --seed 0`` trains, evaluates, and leaves one JSON file.

A run that was killed goes on from its last checkpoint when it is started again, and ends with the very same numbers (on
the CPU with as many threads; a GPU's kernels need not be deterministic).
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from config import Config, load
from files import RESULTS, write
from routing import LearningRate, transform
from tasks import make_task
from torch import nn
from tqdm import tqdm

import ltd_fx

CHECKPOINT_EVERY = 60.0  # seconds


class Run:
    """A model, what trains it, and what was measured.

    Attributes:
        steps: done so far.
        evaluations: the rows of the result.
        layer_tokens: tokens that went through a layer, all layers added up.
        seconds: of training steps: of the CPU, or on a GPU of the clock.
        training_loss: sum since the last evaluation.
    """

    def __init__(self, config: Config, seed: int, device: str) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.task = make_task(config, device)
        self.model = self.task.model(seed).train()
        self.scheduler = transform(self.model, config, self.task.tokens, self.task.protect, seed)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
        self.rate = LearningRate(self.optimizer, config, self.scheduler)
        self.average = (
            {name: value.detach().clone() for name, value in self.weights().items()} if config.average else {}
        )
        self.steps, self.layer_tokens, self.seconds, self.training_loss = 0, 0, 0.0, 0.0
        self.evaluations: list[dict[str, Any]] = []

    def weights(self) -> dict[str, torch.Tensor]:
        """Those of the model as it was before ``ltd_fx``."""
        return self.model.state_dict() if self.scheduler is None else ltd_fx.clean_state_dict(self.model)

    def step(self) -> None:
        """One optimizer step."""
        start = self.clock()
        length = self.length()
        loss = self.task.loss(self.model, self.seed, self.steps, length)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.layer_tokens += self.step_layer_tokens(length)
        self.steps += 1
        if self.scheduler is not None:
            self.scheduler.step()
        self.rate.set(self.steps)
        if self.average:
            decay = min(self.config.average, self.steps / (self.steps + 10))
            for name, value in self.weights().items():
                self.average[name].lerp_(value, 1 - decay)
        self.training_loss += loss.item()
        self.seconds += self.clock() - start

    def clock(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def length(self) -> int:
        """Tokens of each sequence of the next step."""
        if self.config.truncation is None:
            return self.task.tokens
        return self.config.truncation.length_at(self.steps, self.config.steps, self.task.tokens)

    def step_layer_tokens(self, length: int) -> int:
        """Layer tokens of a step on sequences of ``length``."""
        dropped = 0
        if self.scheduler is not None and self.config.schedule is not None:
            routed = self.config.schedule.routed(self.task.layers)
            dropped = routed * max(length - self.scheduler.reserved_length, 0)
        return self.config.batch * (self.task.layers * length - dropped)

    def evaluate(self) -> None:
        """Add a row: held-out data through a model that ``ltd_fx`` never saw, with this one's weights."""
        clean = self.task.model(self.seed)
        clean.load_state_dict(self.average or self.weights())
        since = self.steps - (self.evaluations[-1]["step"] if self.evaluations else 0)
        self.evaluations.append(
            {
                "step": self.steps,
                "layer_tokens": self.layer_tokens,
                "seconds": round(self.seconds, 2),
                "training_loss": self.training_loss / since,
                **self.task.evaluate(clean.eval()),
            }
        )
        self.training_loss = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "rate": self.rate.by_layer_tokens and self.rate.by_layer_tokens.state_dict(),
            "average": self.average,
            "steps": self.steps,
            "layer_tokens": self.layer_tokens,
            "seconds": self.seconds,
            "training_loss": self.training_loss,
            "evaluations": self.evaluations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.rate.by_layer_tokens is not None:
            self.rate.by_layer_tokens.load_state_dict(state["rate"])
        self.average = state["average"]
        self.steps, self.layer_tokens, self.seconds = state["steps"], state["layer_tokens"], state["seconds"]
        self.training_loss, self.evaluations = state["training_loss"], state["evaluations"]


def train(config: Config, seed: int, device: str, until: int, results: Path) -> Path:
    """Do the run up to step ``until``, from its checkpoint if there is one, and return the file of its result."""
    result = results / f"{config.name}-{seed}.json"
    run = Run(config, seed, device)
    checkpoint = result.with_suffix(".pt")
    if checkpoint.exists():
        run.load_state_dict(torch.load(checkpoint, device, weights_only=True))
    saved = time.monotonic()
    evaluated = set(config.evaluated())
    name = f"{config.name} {seed}"
    with tqdm(total=until, initial=run.steps, desc=name, disable=None, dynamic_ncols=True) as bar:
        while run.steps < until:
            run.step()
            bar.update()
            if run.steps in evaluated:
                run.evaluate()
                bar.write(f"{name}: {json.dumps(run.evaluations[-1])}")
            if run.steps in evaluated or time.monotonic() - saved > CHECKPOINT_EVERY:
                write(checkpoint, lambda path: torch.save(run.state_dict(), path))
                saved = time.monotonic()
    write(result, lambda path: path.write_text(json.dumps(describe(run), indent=1) + "\n", encoding="ascii"))
    checkpoint.unlink(missing_ok=True)
    return result


def describe(run: Run) -> dict[str, Any]:
    """The result of a run, with all that is needed to do it again."""
    return {
        "config": asdict(run.config),
        "seed": run.seed,
        "machine": {
            "device": torch.cuda.get_device_name() if run.device != "cpu" else processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "ltd_fx": ltd_fx.__version__,
        },
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "evaluations": run.evaluations,
    }


def processor() -> str:
    names = Path("/proc/cpuinfo")
    if not names.exists():
        return platform.processor() or platform.machine()
    lines = names.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="task/arm: a file of study/runs, without .toml")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the kept tokens")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--until", type=int, help="stop after this step, with the schedules of the whole run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    args = parser.parse_args()
    config = load(args.run)
    if args.device == "cpu":
        torch.set_num_threads(1)  # two runs side by side on two cores, and the same bits whatever their number
    train(config, args.seed, args.device, args.until or config.steps, args.results)


if __name__ == "__main__":
    main()
