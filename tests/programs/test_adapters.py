"""PEFT in transformers' ``Trainer``: LoRA, and AdaLoRA with its ranks reallocated in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import HALF, STEPS, check_trainer, options
from small import SEQ, llama, tokens, transformers

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

_ADAPTED = {"target_modules": ["q_proj", "v_proj", "up_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
# A checkpoint from after the first reallocation has fewer rows, which PEFT does not load into a model to go on with.
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_dropout=0.1, **_ADAPTED),
    "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=3, total_step=STEPS, tinit=HALF, tfinal=4, **_ADAPTED),
}


class Reallocate(transformers.TrainerCallback):
    """As PEFT's documentation has it: after each step, before the gradients go."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def adapted(model: Any, kind: str) -> Any:
    return model if isinstance(model, peft.PeftModel) else peft.get_peft_model(model, CONFIGS[kind]())


def trainer_of(model: Any, folder: Path, kind: str) -> Any:
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**options(folder)),
        train_dataset=tokens(),
        eval_dataset=tokens(48, 8),
        callbacks=[Reallocate()] if kind == "adalora" else [],
    )


def transformed_first(model: Any, folder: Path, kind: str) -> Any:
    import ltd_fx.huggingface  # added

    ltd_fx.transform(model, ltd_fx.LTDScheduler(8, SEQ, 12))  # added
    trainer = trainer_of(adapted(model, kind), folder, kind)
    ltd_fx.huggingface.add_callback(trainer)  # added
    return trainer


def adapted_first(model: Any, folder: Path, kind: str) -> Any:
    import ltd_fx.huggingface  # added

    model = adapted(model, kind)
    ltd_fx.transform(model, ltd_fx.LTDScheduler(8, SEQ, 12))  # added
    trainer = trainer_of(model, folder, kind)
    ltd_fx.huggingface.add_callback(trainer)  # added
    return trainer


@pytest.mark.parametrize("program", [transformed_first, adapted_first])
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters(program: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    def load(path: str) -> Any:
        return peft.PeftModel.from_pretrained(llama(), path, is_trainable=True)

    check_trainer(program, llama, load, tmp_path, kind=kind)
