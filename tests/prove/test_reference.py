"""Routed layers against the independent reference: the dense layer with attention to the dropped keys blocked."""

import copy
import inspect
from typing import Any

import pytest
import torch
from attend import block_keys
from conftest import BATCH, CASES, DECODERS, SEQ, Case, decoder, text
from torch import Tensor, nn

import ltd_fx

ALL = {**CASES, **DECODERS}
CAUSAL = {"llama", "gpt2", *DECODERS}


def captured_call(model: nn.Module, layer: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states and other arguments with which the untransformed model calls ``layer``."""
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    ((args, kwargs),) = calls
    names = list(inspect.signature(layer.forward).parameters)
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return named.pop(names[0]), {
        name: value for name, value in named.items() if name not in ("cache", "past_key_values")
    }


def compare(name: str, case: Case, inputs: dict[str, Any], length: int | None, mask_name: str, **options: Any) -> None:
    model = case.model()
    layer = model.get_submodule(f"{case.layers}.1")
    hidden, kwargs = captured_call(model, layer, inputs)
    dense = copy.deepcopy(layer)
    scheduler = None if length is None else ltd_fx.LTDScheduler(length, case.seq_len, 10, kind="constant")
    ltd_fx.transform(model, scheduler, **options)
    with torch.no_grad():
        model(**inputs)
    ours = hidden.clone().requires_grad_()
    output = layer(ours, **kwargs)
    indices = ltd_fx.sampled_indices(model)[f"{case.layers}.1"]
    kept = torch.zeros(hidden.shape[:2], dtype=torch.bool).scatter(1, indices, True)
    assert kept.sum(1).eq(length or case.seq_len // 2).all()
    theirs = hidden.clone().requires_grad_()
    blocked = block_keys(kwargs.pop(mask_name, None), kept, name in CAUSAL)
    reference = dense(theirs, **kwargs, **{mask_name: blocked})
    reference = torch.where(kept[..., None], reference, theirs)

    assert torch.equal(output[~kept], hidden[~kept])
    real = kept
    if "attention_mask" in inputs:  # padding queries see nothing at all; what a layer makes of them is nobody's concern
        real = kept & inputs["attention_mask"].bool()
    torch.testing.assert_close(output[real], reference[real], rtol=1e-5, atol=1e-5 * reference[real].abs().max().item())

    weight = torch.linspace(-1, 1, output.numel()).view_as(output) * real[..., None]
    (output * weight).nan_to_num().sum().backward()
    (reference * weight).nan_to_num().sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    for (key, parameter), (_, expected) in zip(layer.named_parameters(), dense.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=lambda text, key=key: f"{key}: {text}", **close)


def mask_name(name: str) -> str:
    return "attn_mask" if name == "timm_vit" else "attention_mask"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("length", [None, 1, 5, "all but one"])
def test_kept_rows_equal_the_dense_layer_with_dropped_keys_blocked(name: str, length: Any) -> None:
    case = ALL[name]
    length = case.seq_len - 1 if length == "all but one" else length
    compare(name, case, case.inputs(), length, mask_name(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_without_padding(name: str) -> None:
    inputs = text()
    inputs["attention_mask"].fill_(1)
    compare(name, ALL[name], inputs, 7, mask_name(name))


@pytest.mark.parametrize("name", ["llama", "timm_vit"])
def test_shared_sampling(name: str) -> None:
    case = ALL[name]
    compare(name, case, case.inputs(), 7, mask_name(name), sampling="shared")


def test_packed_documents() -> None:
    """Positions that restart; transformers makes a block-diagonal mask of them."""
    inputs = text()
    positions = torch.cat([torch.arange(20), torch.arange(SEQ - 20)]).expand(BATCH, -1)
    packed = {"input_ids": inputs["input_ids"], "position_ids": positions, "use_cache": False}
    model = ALL["llama"].model()
    _, kwargs = captured_call(model, model.get_submodule("model.layers.1"), packed)
    assert not kwargs["attention_mask"][0, 0, 30, 10]  # the second document does not see the first
    compare("llama", ALL["llama"], packed, 7, "attention_mask")


def test_eager_attention_with_additive_masks() -> None:
    build = decoder("Llama", attn_implementation="eager")
    compare("llama", Case(build, text, "model.layers", SEQ), text(), 7, "attention_mask")


def test_one_sequence_and_coinciding_sizes() -> None:
    """B = 1, and S equal to the head size, the hidden size and the number of heads times two in turn."""
    for seq in (8, 32, 4):
        inputs = {"input_ids": torch.randint(0, 64, (1, seq)), "attention_mask": torch.ones(1, seq, dtype=torch.long)}
        compare("llama", Case(decoder("Llama"), text, "model.layers", seq), inputs, 3, "attention_mask")


@pytest.mark.compat("torch")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sampling", ["per_sample", "shared"])
def test_transformer_encoder_layer(batch_first: bool, causal: bool, sampling: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).train()
    dense = copy.deepcopy(model.layers[1])
    ltd_fx.transform(model, None, sampling=sampling)
    hidden = torch.randn(BATCH, SEQ, 32)
    padding = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    padding[1, -4:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(SEQ) if causal else None
    stream = hidden if batch_first else hidden.transpose(0, 1)
    float_padding = torch.zeros(BATCH, SEQ).masked_fill(padding, -torch.inf)
    model(stream, mask=mask, src_key_padding_mask=float_padding, is_causal=causal)
    output = model.layers[1](stream, src_mask=mask, src_key_padding_mask=float_padding, is_causal=causal)
    indices = ltd_fx.sampled_indices(model)["layers.1"]
    kept = torch.zeros(BATCH, SEQ, dtype=torch.bool).scatter(1, indices, True)
    reference = dense(stream, src_mask=mask, src_key_padding_mask=float_padding.masked_fill(~kept, -torch.inf))
    if not batch_first:
        output, reference = output.transpose(0, 1), reference.transpose(0, 1)
    assert torch.equal(output[~kept], hidden[~kept])
    real = (kept & ~padding) & ~reference.isnan().any(-1)
    assert real.sum() > BATCH * SEQ // 4
    torch.testing.assert_close(output[real], reference[real], rtol=1e-5, atol=1e-5)


def test_a_step_of_the_whole_model_with_hooked_reference(llama: Case) -> None:
    """End to end: the untransformed model with every middle layer's keys blocked and its dropped rows put back."""
    inputs = text()
    routed, dense = llama.model(), llama.model()
    ltd_fx.transform(routed, ltd_fx.LTDScheduler(6, SEQ, 10))
    output = routed(**inputs).logits
    for name, indices in ltd_fx.sampled_indices(routed).items():
        kept = torch.zeros(BATCH, SEQ, dtype=torch.bool).scatter(1, indices, True)
        layer = dense.get_submodule(name)

        def block(_: Any, args: Any, kwargs: Any, kept: Tensor = kept) -> Any:
            return args, {**kwargs, "attention_mask": block_keys(kwargs["attention_mask"], kept, True)}

        def skip(_: Any, args: Any, out: Tensor, kept: Tensor = kept) -> Tensor:
            return torch.where(kept[..., None], out, args[0])

        layer.register_forward_pre_hook(block, with_kwargs=True)
        layer.register_forward_hook(skip)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(output[real], dense(**inputs).logits[real], rtol=1e-5, atol=1e-5)
