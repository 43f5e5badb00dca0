"""TRL's ``SFTTrainer`` (in bfloat16, with activation checkpointing, as it comes): padded batches, packed rows, and the
loss of the assistant's turns only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import check_trainer, options
from small import SEQ, conversations, llama, texts, tokenizer, transformers

import ltd_fx

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow


def program(model: Any, folder: Path, data: Callable[..., Any] = texts, **arguments: Any) -> Any:
    import ltd_fx.huggingface  # added

    ltd_fx.transform(model, ltd_fx.LTDScheduler(8, SEQ, 12, relative=True))  # added
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**options(folder, max_length=SEQ, **arguments)),
        train_dataset=data(),
        eval_dataset=data(48, 8),
        processing_class=tokenizer(),
    )
    ltd_fx.huggingface.add_callback(trainer)  # added
    return trainer


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
        {"data": conversations, "assistant_only_loss": True},
    ],
    ids=["padded", "packed", "wrapped", "assistant only"],
)
def test_sft(arguments: dict[str, Any], tmp_path: Path) -> None:
    check_trainer(program, llama, transformers.LlamaForCausalLM.from_pretrained, tmp_path, **arguments)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_kept_apart(attention: str, tmp_path: Path) -> None:
    """Each routed layer, on a batch of the trainer's, equals the dense one with the dropped tokens blocked."""
    model = llama(attn_implementation=attention)
    trainer = program(model, tmp_path, packing=True)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    assert (batch["position_ids"] == 0).sum() > 2
    assert batch.keys() >= {"cu_seq_lens_q", "seq_idx"}
    assert ltd_fx.verify(model, batch).ok
