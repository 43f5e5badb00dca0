"""Tiny models for transformers' common tests: its source distribution has these, but not each model's own test file."""

import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

# Two mix-ins that the common tests import are not in the distribution.
for name, mixin in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
    module = types.ModuleType(f"tests.{name}")
    setattr(module, mixin, type(mixin, (), {}))
    sys.modules[module.__name__] = module

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

BATCH, TOKENS, VOCAB, HIDDEN, LAYERS, HEADS = 9, 8, 99, 32, 2, 4
IMAGE, PATCH, FRAMES, MELS = 30, 6, 60, 80
PATCHES = (IMAGE // PATCH) ** 2
PAD, START, END = 0, 1, 2
SPECIAL = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
LLAMA = {**SIZES, **SPECIAL, "num_key_value_heads": 2}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": END,
    **SPECIAL,
}
BART = {**SEQ2SEQ, "max_position_embeddings": 64}
T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_ff": 48,
    "d_kv": HIDDEN // HEADS,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": PAD,
    **SPECIAL,
}


def tokens() -> Tensor:
    """Ordinary ones, and last the end-of-sequence token, which classifiers of encoder-decoder models look for."""
    ids: Tensor = ids_tensor([BATCH, TOKENS], VOCAB - 3) + 3
    ids[:, -1] = END
    return ids


def mask() -> Tensor:
    """The last sequence is half as long as the others."""
    real = torch.ones(BATCH, TOKENS, dtype=torch.long)
    real[-1, TOKENS // 2 :] = 0
    return real


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": mask()}


def text_to_text() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": tokens(), "decoder_attention_mask": mask()}


def image() -> dict[str, Tensor]:
    return {"pixel_values": floats_tensor([BATCH, 3, IMAGE, IMAGE])}


def speech() -> dict[str, Tensor]:
    return {"input_features": floats_tensor([BATCH, MELS, FRAMES]), "decoder_input_ids": tokens()}


class Family:
    """What the common tests ask a `model_tester` about: classes, a configuration, inputs, sizes."""

    batch_size, seq_length, hidden_size, num_choices = BATCH, TOKENS, HIDDEN, 4
    num_hidden_layers, num_attention_heads = LAYERS, HEADS
    is_training = True

    def __init__(
        self, name: str, heads: str, sizes: dict[str, Any], inputs: Callable[[], dict[str, Tensor]] = text, **facts: Any
    ) -> None:
        self.classes = tuple(getattr(transformers, name + head) for head in heads.split())
        self._config, self._sizes, self._inputs = getattr(transformers, f"{name}Config"), sizes, inputs
        self.__dict__.update(facts)

    def get_config(self) -> Any:
        return self._config(**self._sizes)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        return self.get_config(), self._inputs()


class CommonTests(ModelTesterMixin):
    """transformers' own, of one family."""

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return self.model_tester.classes


class LlamaTest(CommonTests, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    model_tester = Family(
        "Llama",
        "Model ForCausalLM ForSequenceClassification ForTokenClassification ForQuestionAnswering",
        LLAMA,
        causal_lm_class=transformers.LlamaForCausalLM,
    )


class MixtralTest(CommonTests, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    model_tester = Family(
        "Mixtral",
        "Model ForCausalLM ForSequenceClassification ForTokenClassification ForQuestionAnswering",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": HIDDEN // HEADS},
        causal_lm_class=transformers.MixtralForCausalLM,
    )
    test_all_params_have_gradient = False  # an expert may get no token


class GPT2Test(CommonTests, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    model_tester = Family(
        "GPT2",
        "Model LMHeadModel ForSequenceClassification ForTokenClassification ForQuestionAnswering",
        {**SIZES, **SPECIAL},
        causal_lm_class=transformers.GPT2LMHeadModel,
    )


class BertTest(CommonTests, GenerationTesterMixin, unittest.TestCase):
    model_tester = Family(
        "Bert",
        "Model ForMaskedLM LMHeadModel ForNextSentencePrediction ForMultipleChoice ForSequenceClassification "
        "ForTokenClassification ForQuestionAnswering",
        SIZES,
    )


class ViTTest(CommonTests, unittest.TestCase):
    model_tester = Family(
        "ViT",
        "Model ForImageClassification ForMaskedImageModeling",
        {**SIZES, "image_size": IMAGE, "patch_size": PATCH, "encoder_stride": PATCH},
        image,
        image_size=IMAGE,
        patch_size=PATCH,
        seq_length=PATCHES + 1,
        mask_length=PATCHES,
        num_masks=PATCHES // 2,
    )
    test_resize_embeddings = False


class T5Test(CommonTests, GenerationTesterMixin, unittest.TestCase):
    model_tester = Family("T5", "Model ForConditionalGeneration", T5, text_to_text)
    is_encoder_decoder = True


class T5HeadsTest(T5Test):
    model_tester = Family("T5", "ForSequenceClassification ForQuestionAnswering", T5, text_to_text)


class BartTest(CommonTests, GenerationTesterMixin, unittest.TestCase):
    model_tester = Family("Bart", "Model ForConditionalGeneration", BART, text_to_text)
    is_encoder_decoder = True


class BartHeadsTest(BartTest):
    model_tester = Family("Bart", "ForSequenceClassification ForQuestionAnswering", BART, text_to_text)


class WhisperTest(CommonTests, GenerationTesterMixin, unittest.TestCase):
    model_tester = Family(
        "Whisper",
        "Model ForConditionalGeneration",
        {
            **SEQ2SEQ,
            "num_mel_bins": MELS,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        speech,
        encoder_seq_length=FRAMES // 2,
        decoder_seq_length=TOKENS,
    )
    is_encoder_decoder = True
    test_resize_embeddings = False  # the tests of it look for `input_ids`

    def _prepare_for_class(self, inputs: dict[str, Any], model: type, return_labels: bool = False) -> dict[str, Any]:
        prepared = super()._prepare_for_class(inputs, model, return_labels)
        return {**prepared, "labels": prepared["decoder_input_ids"]} if return_labels else prepared
