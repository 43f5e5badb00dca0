"""TRL's ``SFTTrainer`` (in bfloat16, with activation checkpointing, as it comes): padded batches, packed rows, and the
loss of the assistant's turns only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flash import CALLS, flash, use_flash  # noqa: F401 (the fixture)
from program import check_trainer, options
from small import SEQ, conversations, llama, texts, tokenizer, transformers
from torch._dynamo.testing import CompileCounterWithBackend

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


@pytest.mark.usefixtures("flash")
def test_sft_on_a_kernel_that_counts_documents(tmp_path: Path) -> None:
    """It is given the boundaries of the kept tokens, as many documents as there are in the batch."""
    model = use_flash(llama())
    trainer = program(model, tmp_path, packing=True, padding_free=True, max_steps=6, bf16=False, eval_strategy="no")
    trainer.train()
    routed = [(tokens, ends) for tokens, ends in CALLS if ends[-1] == tokens and tokens % SEQ]
    assert len(routed) > 6
    assert all(site.proof and site.proof.right for site in ltd_fx.summary(model).sites if site.routed)


def test_sft_compiled_takes_two_graphs(tmp_path: Path) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = llama()
    trainer = program(model, tmp_path, packing=True, max_steps=16, eval_strategy="no", gradient_checkpointing=False)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    scheduler = model._ltd_rewrite.state.scheduler
    step = torch.compile(model.train(), backend=counter, fullgraph=True)
    for _ in range(16):
        step(**batch).loss.backward()
        scheduler.step()
    assert counter.frame_count == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_kept_apart(attention: str, tmp_path: Path) -> None:
    """Each routed layer, on a batch of the trainer's, equals the dense one with the dropped tokens blocked."""
    model = llama(attn_implementation=attention)
    trainer = program(model, tmp_path, packing=True)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    assert (batch["position_ids"] == 0).sum() > 2
    assert batch.keys() >= {"cu_seq_lens_q", "seq_idx"}
    assert ltd_fx.verify(model, batch).ok
