"""transformers' Trainer on the source of Python's standard library, with TensorBoard logs of what random-LTD does.

``python examples/hf_trainer.py [--plot curves.png]`` trains a byte-level Llama of 1.2M parameters in a minute or two on
a CPU; ``--resume`` goes on from the last checkpoint in OUT.
"""

import argparse
from pathlib import Path

import data
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ltd_fx
from ltd_fx.huggingface import add_callback

SEQ, BATCH = 256, 4


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The text cut into sequences of SEQ bytes."""

    def __init__(self, text: Tensor) -> None:
        self.windows = text[: len(text) // SEQ * SEQ].view(-1, SEQ)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        window = self.windows[i].long()
        return {"input_ids": window, "labels": window}


def train(out: Path, steps: int, resume: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=352,
            max_position_embeddings=SEQ,
            use_cache=False,
        )
    )
    args = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        logging_steps=max(steps // 60, 1),
        eval_strategy="steps",
        eval_steps=max(steps // 6, 1),
        save_steps=max(steps // 3, 1),
        report_to="tensorboard",
    )
    scheduler = ltd_fx.LTDScheduler(
        64, SEQ, max(round(0.7 * steps), 1), multiple_of=16, global_batch_size=args.train_batch_size * args.world_size
    )
    ltd_fx.transform(model, scheduler)
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    total = scheduler.total_layer_tokens(steps)
    lr = ltd_fx.LayerTokenLR(adam, scheduler, total_layer_tokens=total, warmup_layer_tokens=total // 10, min_ratio=0.1)

    text, held_out = data.standard_library()
    trainer = Trainer(
        model,
        args,
        train_dataset=Windows(text),
        eval_dataset=torch.utils.data.Subset(Windows(held_out), range(64)),
        optimizers=(adam, lr),
    )
    add_callback(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()  # plain: LlamaForCausalLM.from_pretrained(out)


def plot(logs: Path, path: Path) -> None:
    """Draw the scalars that the trainer wrote for TensorBoard."""
    file = max(logs.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    events = EventAccumulator(str(file)).Reload()
    panels = (
        ("train/loss", "eval/loss"),
        ("train/ltd_reserved_length",),
        ("train/ltd_layer_tokens",),
        ("train/ltd_saved",),
        ("train/learning_rate",),
    )
    figure = Figure(figsize=(13, 2.8), layout="constrained")
    for axes, tags in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for tag in tags:
            scalars = events.Scalars(tag)
            axes.plot([scalar.step for scalar in scalars], [scalar.value for scalar in scalars], label=tag)
        axes.set_title(", ".join(tags), fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(tags) > 1:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/hf"), help="checkpoints, logs and the trained model")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument("--plot", type=Path, help="draw the TensorBoard scalars into this file")
    args = parser.parse_args()
    train(args.out, args.steps, args.resume)
    if args.plot is not None:
        plot(args.out, args.plot)


if __name__ == "__main__":
    main()
