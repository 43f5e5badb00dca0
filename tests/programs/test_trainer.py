"""transformers' ``Trainer``."""

from pathlib import Path
from typing import Any

import pytest
from program import check_trainer, options
from small import SEQ, llama, tokens, transformers

pytestmark = pytest.mark.slow


def program(model: Any, folder: Path, **arguments: Any) -> Any:
    import ltd_fx.huggingface  # added

    ltd_fx.transform(model, ltd_fx.LTDScheduler(8, SEQ, 12))  # added
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**options(folder, **arguments)),
        train_dataset=tokens(),
        eval_dataset=tokens(48, 8),
    )
    ltd_fx.huggingface.add_callback(trainer)  # added
    return trainer


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"bf16": True, "torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": True},
    ],
    ids=["float32", "bf16", "checkpointed", "reentrant", "compiled", "all three"],
)
def test_trainer(arguments: dict[str, Any], tmp_path: Path) -> None:
    check_trainer(program, llama, transformers.LlamaForCausalLM.from_pretrained, tmp_path, **arguments)
