"""sentence-transformers' ``SentenceTransformerTrainer``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import check_trainer, options
from small import bert, pairs, tokenizer

sentences = pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.slow


def trainer_of(model: Any, folder: Path) -> Any:
    return sentences.SentenceTransformerTrainer(
        model,
        sentences.SentenceTransformerTrainingArguments(**options(folder, learning_rate=2e-3)),
        train_dataset=pairs(),
        eval_dataset=pairs(48, 8),
        loss=sentences.sentence_transformer.losses.MultipleNegativesRankingLoss(model),
    )


def whole(model: Any, folder: Path) -> Any:
    import ltd_fx.huggingface  # added

    ltd_fx.transform(model, ltd_fx.LTDScheduler(2, 8, 12, relative=True))  # added
    trainer = trainer_of(model, folder)
    ltd_fx.huggingface.add_callback(trainer)  # added
    return trainer


def encoder_only(model: Any, folder: Path) -> Any:
    import ltd_fx.huggingface  # added

    ltd_fx.transform(model[0].model, ltd_fx.LTDScheduler(2, 8, 12, relative=True))  # added
    trainer = trainer_of(model, folder)
    ltd_fx.huggingface.add_callback(trainer)  # added
    return trainer


@pytest.mark.parametrize("program", [whole, encoder_only])
def test_sentences(program: Callable[..., Any], tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")

    def model() -> Any:
        encoder = sentences.sentence_transformer.modules.Transformer(str(tmp_path / "bert"))
        pooling = sentences.sentence_transformer.modules.Pooling(encoder.get_embedding_dimension())
        return sentences.SentenceTransformer(modules=[encoder, pooling], device="cpu")

    check_trainer(program, model, sentences.SentenceTransformer, tmp_path)
