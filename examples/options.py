"""The command line of ``train_gpt.py``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ltd_fx


def parse_options(description: str | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The options; with ``--resume``, completed by the settings of the checkpoint, which is returned too."""
    parser = _parser(description)
    args = parser.parse_args()
    checkpoint = None
    if args.resume:
        path = args.out / "checkpoint.pt"
        if not path.exists():
            parser.error(f"--resume: there is no {path}; name the folder of the run to resume with --out")
        checkpoint = torch.load(path, "cpu", weights_only=True)
        parser.set_defaults(**checkpoint["settings"])
        args = parser.parse_args()
        for name, saved in checkpoint["settings"].items():
            if getattr(args, name) != saved:
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} {getattr(args, name)}: the run in {args.out} has {saved}; leave {flag} out")
    _check(args, parser.error)
    return args, checkpoint


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "resume")}


def make_scheduler(args: argparse.Namespace) -> ltd_fx.LTDScheduler:
    """The random-LTD schedule that the options describe."""
    return ltd_fx.LTDScheduler(
        args.min_length,
        args.seq,
        max(round(args.full_at * args.steps), 1),
        multiple_of=args.multiple_of,
        global_batch_size=args.batch,
    )


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    model = parser.add_argument_group("model and batch")
    model.add_argument(
        "--layers", type=_integer(3), default=8, help="decoder layers; the first and the last stay dense"
    )
    model.add_argument("--width", type=_integer(1), default=192, help="size of the hidden states")
    model.add_argument("--heads", type=_integer(1), default=6, help="attention heads")
    model.add_argument("--seq", type=_integer(2), default=256, help="sequence length in bytes")
    model.add_argument("--batch", type=_integer(1), default=4, help="sequences per step")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=_integer(1), default=240, help="training steps")
    training.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    training.add_argument(
        "--warmup", type=_integer(0), default=20, help="steps of linear warm-up; cosine decay follows"
    )
    training.add_argument("--seed", type=_integer(0), default=0, help="of the weights, the batches and the kept tokens")
    training.add_argument(
        "--eval-every", type=_integer(1), default=30, help="steps between validations (and checkpoints)"
    )
    training.add_argument("--eval-batches", type=_integer(1), default=8, help="batches in a validation")

    ltd = parser.add_argument_group("random-LTD")
    ltd.add_argument("--min-length", type=_integer(2), default=64, help="tokens that the routed layers keep at first")
    ltd.add_argument("--full-at", type=float, default=0.7, help="share of the steps until they keep all tokens")
    ltd.add_argument("--multiple-of", type=_integer(1), default=16, help="granularity of the reserved length")

    execution = parser.add_argument_group("execution")
    execution.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    execution.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is by autocast"
    )

    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder for everything that is written")
    files.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in OUT, with the settings that it holds"
    )
    return parser


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:  # argparse reports a ValueError as "invalid integer value"
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


def _check(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Report what argparse cannot see: combinations, and what torch and ltd_fx refuse."""
    if args.width % (2 * args.heads):
        error(f"--width {args.width} must be a multiple of twice --heads {args.heads}, for rotary positions")
    if not args.lr > 0:
        error(f"--lr {args.lr} must be above 0")
    if not 0 < args.full_at <= 1:
        error(f"--full-at {args.full_at} must be above 0 and at most 1")
    try:
        make_scheduler(args)
    except ltd_fx.LTDError as problem:
        error(str(problem))
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as problem:  # an AssertionError: torch was built without CUDA
        error(f"--device {args.device}: {problem}")
