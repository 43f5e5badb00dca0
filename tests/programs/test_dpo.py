"""TRL's ``DPOTrainer``: the policy routed, the reference dense."""

from pathlib import Path
from typing import Any

import pytest
from program import check_trainer, logged, options, without_added
from small import SEQ, llama, preferences, tokenizer, transformers

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow


def program(model: Any, folder: Path, **arguments: Any) -> Any:
    import ltd_fx.huggingface  # added

    ltd_fx.transform(model, ltd_fx.LTDScheduler(4, SEQ, 12, relative=True))  # added
    trainer = trl.DPOTrainer(
        model,
        ref_model=llama().eval(),
        args=trl.DPOConfig(**options(folder, **arguments)),
        train_dataset=preferences(),
        eval_dataset=preferences(48, 8),
        processing_class=tokenizer(),
    )
    ltd_fx.huggingface.add_callback(trainer)  # added
    return trainer


@pytest.mark.parametrize(
    "arguments",
    [{}, {"precompute_ref_log_probs": True}, {"padding_free": True}],
    ids=["padded", "reference computed before", "padding free"],
)
def test_dpo(arguments: dict[str, Any], tmp_path: Path) -> None:
    check_trainer(program, llama, transformers.LlamaForCausalLM.from_pretrained, tmp_path, **arguments)


def test_the_first_step_has_a_margin(tmp_path: Path) -> None:
    """With equal weights: the policy drops tokens in training, the reference does not; nobody does in evaluation."""

    def model() -> Any:
        return llama(attention_dropout=0.0)

    margins = {}
    for name, make in {"routed": program, "plain": without_added(program)}.items():
        trainer = make(model(), tmp_path / name, max_steps=1, learning_rate=0.0, bf16=False)
        trainer.train()
        margins[name] = logged(trainer, "rewards/margins")[1]
        assert logged(trainer, "eval_rewards/margins") == {1: 0.0}
    assert margins["plain"] == 0
    assert margins["routed"] != 0
