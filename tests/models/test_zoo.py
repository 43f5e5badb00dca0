"""Every model of the zoo is right, or refused with the expected reason; a sample of them in the default run."""

import re
from typing import Any

import pytest
import torch
from zoo import ENTRIES
from zoo.entry import Entry
from zoo.table import examine

import ltd_fx

SAMPLE = {
    "Qwen2VLTextModel",
    "GPTNeoForCausalLM",
    "BloomForCausalLM",
    "GptOssForCausalLM",
    "swin_tiny_patch4_window7_224",
    "Llama3Model",
    "FluxTransformer2DModel",
    "TransformerDecoder (batch_first=False)",
}


def marked(entry: Entry) -> Any:
    marks: list[Any] = [] if entry.name in SAMPLE else [pytest.mark.slow]
    if entry.library == "diffusers" and entry.name in SAMPLE:
        marks += [pytest.mark.compat("diffusers"), pytest.mark.slow]
    return pytest.param(entry, id=f"{entry.library}: {entry.name}", marks=marks)


def test_the_sample_is_of_the_zoo() -> None:
    assert {entry.name for entry in ENTRIES} >= SAMPLE


@pytest.mark.parametrize("entry", [marked(entry) for entry in ENTRIES])
def test_right_or_refused(entry: Entry) -> None:
    # RuntimeError: a torchvision that does not fit the installed torch
    pytest.importorskip(entry.library.replace("-", "_"), exc_type=(ImportError, RuntimeError))
    row = examine(entry)
    if entry.refused is None:
        assert row.error is not None, row.reason
        assert row.error < 1e-10
    else:
        assert row.error is None
        assert re.search(entry.refused, row.reason)


@pytest.mark.parametrize(
    "name",
    [
        "MixtralForCausalLM",
        pytest.param("Qwen2MoeForCausalLM", marks=pytest.mark.slow),
        pytest.param("GptOssForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_experts_in_bfloat16_are_routed(name: str) -> None:
    """They sort the tokens by expert and put each one's result back, in other operators than in float32."""
    pytest.importorskip("transformers")
    (entry,) = (entry for entry in ENTRIES if entry.name == name)
    model, inputs = entry.build().to(torch.bfloat16).train(), entry.inputs()
    ltd_fx.transform(model, layers=entry.layers, example_inputs=inputs)
    assert "tested" in str(ltd_fx.summary(model))
