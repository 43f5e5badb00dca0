"""A real ``Trainer``: stepping, logs, checkpoints, evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt2
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LayerTokenLR, LTDError, LTDScheduler

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
huggingface = pytest.importorskip("ltd_fx.huggingface")

SEQ, STEPS, BATCH = 32, 6, 2


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, size: int, seed: int) -> None:
        self.ids = torch.randint(0, 64, (size, SEQ), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Watch(transformers.TrainerCallback):
    """Records the draws and the learning rate of every step."""

    def __init__(self) -> None:
        self.draws: list[dict[str, list[Any]]] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.draws.append({name: kept.tolist() for name, kept in ltd_fx.sampled_indices(kwargs["model"]).items()})
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def scheduler_of(**options: Any) -> LTDScheduler:
    return LTDScheduler(
        **{"min_length": 8, "max_length": SEQ, "total_steps": 10, "global_batch_size": 2 * BATCH, **options}
    )


def trainer_of(folder: Path, scheduler: LTDScheduler | None = None, **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = gpt2()
    scheduler = scheduler or scheduler_of()
    ltd_fx.transform(model, scheduler)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    total = 12 * scheduler.max_length * 4 * 2 * BATCH
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **options),
        train_dataset=Texts(16, 0),
        eval_dataset=Texts(6, 1),
        optimizers=(adam, LayerTokenLR(adam, scheduler, total_layer_tokens=total, warmup_layer_tokens=total // 10)),
        callbacks=[huggingface.LTDCallback(), Watch()],
    )


def watch_of(trainer: Any) -> Watch:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Watch))


def losses(trainer: Any, key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.compat("transformers")
def test_a_step_an_optimizer_step(whole: Any) -> None:
    """Two micro-batches a step: same length, other tokens; the learning rate follows."""
    scheduler = scheduler_of()
    lengths = [scheduler.length_at(step) for step in range(STEPS)]
    watch = watch_of(whole)
    assert [{len(kept[0]) for kept in draws.values()} for draws in watch.draws] == [{length} for length in lengths]
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert [entry["ltd_reserved_length"] for entry in logs] == lengths
    consumed = [2 * BATCH * (2 * sum(lengths[: step + 1]) + 2 * SEQ * (step + 1)) for step in range(STEPS)]
    assert [entry["ltd_layer_tokens"] for entry in logs] == consumed
    saved = [1 - tokens / (2 * BATCH * 4 * SEQ * (step + 1)) for step, tokens in enumerate(consumed)]
    assert [entry["ltd_saved"] for entry in logs] == pytest.approx(saved)
    lr = whole.lr_scheduler
    assert watch.rates == [0.01 * lr.ratio_at(tokens) for tokens in [0, *consumed[:-1]]]
    assert not any("ltd_saved" in entry for entry in whole.state.log_history if "eval_loss" in entry)


@pytest.mark.compat("transformers")
@pytest.mark.parametrize(("step", "restore_callbacks"), [(2, False), (4, True)], ids=["in an epoch", "between epochs"])
def test_resumed_is_uninterrupted(whole: Any, step: int, restore_callbacks: bool, tmp_path: Path) -> None:
    """Loss, weights, draws and learning rate, to the bit."""
    trainer = trainer_of(tmp_path, restore_callback_states_from_checkpoint=restore_callbacks)
    trainer.train(resume_from_checkpoint=str(Path(whole.args.output_dir, f"checkpoint-{step}")))
    assert losses(trainer) == losses(whole)
    assert losses(trainer, "ltd_layer_tokens") == losses(whole, "ltd_layer_tokens")
    assert watch_of(trainer).draws == watch_of(whole).draws[step:]
    assert watch_of(trainer).rates == watch_of(whole).rates[step:]
    ours, theirs = trainer.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluation_is_dense(whole: Any) -> None:
    """The loss that the trainer found in the middle of training is that of the checkpoint's plain model."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(Path(whole.args.output_dir, "checkpoint-4"))
    assert type(plain) is transformers.GPT2LMHeadModel
    assert not ltd_fx.is_transformed(plain)
    arguments = transformers.TrainingArguments(whole.args.output_dir, report_to="none", use_cpu=True, disable_tqdm=True)
    found = transformers.Trainer(model=plain, args=arguments, eval_dataset=Texts(6, 1)).evaluate()
    assert found["eval_loss"] == losses(whole, "eval_loss")[4]


def test_logs_reach_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_of(tmp_path, max_steps=2, report_to="tensorboard", save_strategy="no", eval_strategy="no")
    trainer.remove_callback(huggingface.LTDCallback)
    huggingface.add_callback(trainer)
    trainer.train()
    (file,) = Path(tmp_path).rglob("events.out.tfevents*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    assert [event.value for event in events.Scalars("train/ltd_reserved_length")] == [8, 10]
    assert len(events.Scalars("train/ltd_saved")) == 2


@pytest.mark.filterwarnings("ignore:LTDCallback. a step of this trainer")
@pytest.mark.parametrize("fails", [(1,), (6,), (3, 8)], ids=str)
def test_auto_find_batch_size_begins_again(fails: tuple[int, ...], tmp_path: Path, monkeypatch: Any) -> None:
    """The last attempt has the lengths, draws and logs of a run whose every attempt began where training did."""
    options = {"per_device_train_batch_size": 8, "save_strategy": "no", "eval_strategy": "no"}
    trainer = trainer_of(tmp_path, auto_find_batch_size=True, **options)
    watch, scheduler = watch_of(trainer), trainer.model._ltd_rewrite.state.scheduler
    scheduler.set_step(2)  # an earlier train()
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda **options: None)
    training_step, calls, seen = trainer.training_step, [], []

    def step(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(trainer.state.global_step)
        if len(calls) in fails:
            watch.draws.clear()
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        loss: Tensor = training_step(*args, **kwargs)
        seen.append((trainer.state.global_step, scheduler.reserved_length))
        return loss

    monkeypatch.setattr(trainer, "training_step", step)
    trainer.train()
    assert calls.count(0) >= 2  # it began again
    assert seen == [(global_step, scheduler.length_at(2 + global_step)) for global_step, _ in seen]
    assert scheduler.state_dict()["step"] == 2 + STEPS
    assert [entry["ltd_reserved_length"] for entry in trainer.state.log_history if "ltd_saved" in entry] == [
        scheduler.length_at(2 + step) for step in range(STEPS)
    ]
    plain = trainer_of(tmp_path, **{**options, **shrunk(8, len(fails))})
    plain.model._ltd_rewrite.state.scheduler.set_step(2)
    plain.train()
    assert watch.draws == watch_of(plain).draws


def shrunk(size: int, times: int) -> dict[str, int]:
    """What accelerate makes of a batch size that is too large."""
    for _ in range(times):
        size = int(size * 0.9)
    return {"per_device_train_batch_size": size}


@pytest.mark.slow
def test_a_train_after_one_that_failed_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = trainer_of(tmp_path, auto_find_batch_size=True, save_strategy="no", eval_strategy="no")
    scheduler = trainer.model._ltd_rewrite.state.scheduler
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_maybe_log_save_evaluate", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    done = scheduler.state_dict()["step"]
    assert done == 1
    trainer.train()
    assert scheduler.state_dict()["step"] == done + STEPS


def without_ltd(checkpoint: Path, folder: Path) -> Path:
    """A copy of the checkpoint as if saved without the callback."""
    copied = folder / checkpoint.name
    copied.mkdir()
    for file in checkpoint.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    state = json.loads((copied / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["LTDCallback"]
    (copied / "trainer_state.json").write_text(json.dumps(state))
    return copied


def test_a_checkpoint_saved_without_the_callback(whole: Any, tmp_path: Path) -> None:
    checkpoint = without_ltd(Path(whole.args.output_dir, "checkpoint-2"), tmp_path)
    trainer = trainer_of(tmp_path)
    with pytest.warns(UserWarning, match="saved without this callback; the schedule goes on from step 2"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert losses(trainer) == losses(whole)
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["LTDCallback"]["attributes"]["saved"]["step"] == 6


@pytest.mark.parametrize("content", [None, "", '{"epoch": 0.5,'])
def test_a_checkpoint_left_half_written_does_not_pass_for_a_whole_one(content: str | None, tmp_path: Path) -> None:
    """``trainer_state.json`` is written last: a kill before leaves none, or a part."""
    trainer = trainer_of(tmp_path, max_steps=1, save_steps=1, eval_strategy="no")
    trainer.train()
    state = tmp_path / "checkpoint-1" / "trainer_state.json"
    state.unlink()
    if content is not None:
        state.write_text(content)
    with pytest.raises((FileNotFoundError, json.JSONDecodeError)):
        trainer.train(resume_from_checkpoint=True)


def test_refusals(whole: Any, tmp_path: Path) -> None:
    with pytest.raises(LTDError, match=r"there are none; call step\(\) first"):
        scheduler_of().metrics()
    checkpoint = str(Path(whole.args.output_dir, "checkpoint-2"))
    with pytest.raises(LTDError, match="total_steps=10, this scheduler total_steps=11"):
        trainer_of(tmp_path, scheduler_of(total_steps=11)).train(resume_from_checkpoint=checkpoint)
    trainer = trainer_of(tmp_path, scheduler_of(global_batch_size=3), max_steps=1, eval_strategy="no")
    with pytest.warns(UserWarning, match="this trainer has 4 sequences, .* global_batch_size=3"):
        trainer.train()
    ltd_fx.transform(ltd_fx.restore(trainer.model))
    with pytest.raises(LTDError, match="pass an LTDScheduler to transform"):
        trainer.train()
    ltd_fx.restore(trainer.model)
    with pytest.raises(LTDError, match="not transformed"):
        trainer.train()


def test_the_model_is_still_one_of_transformers(whole: Any, tmp_path: Path) -> None:
    whole.model.save_pretrained(tmp_path)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert isinstance(plain, nn.Module)
    ids = {"input_ids": Texts(3, 5).ids}
    whole.model.eval()
    assert torch.equal(plain.eval()(**ids).logits, whole.model(**ids).logits)
