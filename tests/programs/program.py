"""A user's program, with and without the lines that ``ltd_fx`` needs, and what must hold of it."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ltd_fx

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

ADDED = "# added"
STEPS, HALF = 16, 8


def added_lines(program: Callable[..., Any]) -> list[str]:
    """The lines of the program that are there for ``ltd_fx``, but for its import."""
    lines = [line.strip() for line in inspect.getsource(program).splitlines() if line.rstrip().endswith(ADDED)]
    return [line for line in lines if not line.startswith("import ")]


def without_added(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program as it was before these lines were added."""
    source = textwrap.dedent(inspect.getsource(program))
    kept = "\n".join(line for line in source.splitlines() if not line.rstrip().endswith(ADDED))
    assert "ltd_fx" not in ast.unparse(ast.parse(kept)), "a line for ltd_fx is not marked"
    scope = dict(program.__globals__)
    exec(compile(kept, inspect.getsourcefile(program) or "", "exec"), scope)
    found: Callable[..., Any] = scope[program.__name__]
    return found


class Watch(transformers.TrainerCallback):
    """What the last forward of each step kept."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.append(str([rows.tolist() for rows in ltd_fx.sampled_indices(kwargs["model"]).values()]))


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Training arguments of the programs that are of transformers' kind."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": HALF,
        "eval_strategy": "steps",
        "eval_steps": HALF,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def logged(trainer: Any, key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def checkpoint(folder: Path) -> str:
    """That of the middle of training."""
    return str(folder / f"checkpoint-{HALF}")


def check_trainer(
    program: Callable[..., Any], model: Callable[[], Any], load: Callable[[str], Any], folder: Path, **arguments: Any
) -> None:
    """Train, save, evaluate and resume, with the added lines and without.

    The routed program must learn, with other tokens at each step. It must evaluate as the plain one does with the
    weights of its checkpoint and those that it has in the end; and resume as if it had not stopped, where the plain one
    does: all to the bit.

    Args:
        program: ``(model, folder, **arguments)``; makes the trainer.
        model: makes the plain model.
        load: the plain model from a checkpoint's path.
        folder: for checkpoints.
        arguments: for the program.

    """
    assert len(added_lines(program)) <= 3
    plain = without_added(program)
    routed, watch = program(model(), folder / "routed", **arguments), Watch()
    routed.add_callback(watch)
    routed.train()

    losses = list(logged(routed).values())
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert logged(routed, "ltd_saved")[STEPS] > 0.1
    assert len(set(watch.kept[:HALF])) == HALF

    dense = plain(model(), folder / "plain", **arguments)
    dense.train()
    assert not ltd_fx.is_transformed(dense.model)
    assert logged(dense) != logged(routed)
    assert resumed(program, routed, model, folder, arguments) or not resumed(plain, dense, model, folder, arguments)

    halfway = load(checkpoint(folder / "routed"))
    assert not ltd_fx.is_transformed(halfway)
    for trained, step in ((halfway, HALF), (routed.model, STEPS)):
        dense.model.load_state_dict(trained.state_dict())
        assert dense.evaluate()["eval_loss"] == logged(routed, "eval_loss")[step]


def resumed(
    program: Callable[..., Any], whole: Any, model: Callable[[], Any], folder: Path, arguments: dict[str, Any]
) -> bool:
    """Whether the program, resumed in the middle, is the uninterrupted one: losses and weights, to the bit."""
    again = program(model(), folder / "resumed", **arguments)
    again.train(resume_from_checkpoint=checkpoint(Path(whole.args.output_dir)))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return same and logged(again) == logged(whole)
