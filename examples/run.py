"""One training: a model, what trains it, and what is measured."""

import argparse
import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from report import Result
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx

Batch = tuple[Tensor, Tensor]  # inputs and targets, [B, S] each


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
        for block in self.model.blocks:  # one by one: equal layers share their graphs, several times quicker to compile
            block.compile(backend=self.compiled, fullgraph=True)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(len(self.losses), self.args)
        loss = loss_of(self.model, batch, self.args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - start)

    def warm_up(self, batch: Batch) -> None:
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

    def validate(self, batches: list[Batch]) -> float:
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


def loss_of(model: GPT, batch: Batch, args: argparse.Namespace) -> Tensor:
    """Mean cross-entropy of the next byte."""
    inputs, targets = batch
    with autocast(args):
        logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def validation_loss(model: GPT, batches: list[Batch], args: argparse.Namespace) -> float:
    """Mean over ``batches``, in eval mode; not compiled, so that the graphs counted are those of training."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        losses = [loss_of(model, batch, args).item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)
