"""Patterns learnt from example inputs, and the values that layers routed by them compute."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attend import Attention, block_keys, causal, check_routed, tables
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LTDError

D, H = 16, 2
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 64, "dropout_rate": 0.0}
BART = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 3), ("ffn_dim", 48))}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "vocab_size": 64, "dropout": 0.0}
# model class, config, the layer that is checked, whether its attention is causal
FAMILIES: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, "model.decoder.layers", True),
    "gpt_neox": ("GPTNeoXForCausalLM", {"intermediate_size": 48}, "gpt_neox.layers", True),
    "phi": ("PhiForCausalLM", {"intermediate_size": 48, "num_key_value_heads": 2}, "model.layers", True),
    "t5 encoder": ("T5ForConditionalGeneration", T5, "encoder.block", False),
    "t5 decoder": ("T5ForConditionalGeneration", T5, "decoder.block", True),
    "bart encoder": ("BartForConditionalGeneration", BART, "model.encoder.layers", False),
    "bart decoder": ("BartForConditionalGeneration", BART, "model.decoder.layers", True),
}


def build(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    name, config, _, _ = FAMILIES[family]
    sizes = ENDS | config if "d_model" in config else ENDS | SIZES | {"num_hidden_layers": 3} | config
    torch.manual_seed(0)
    config_class = getattr(transformers, name.partition("For")[0] + "Config")
    model: nn.Module = getattr(transformers, name)(config_class(**sizes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def text(batch: int, seq: int, padding: str = "") -> dict[str, Any]:
    mask = torch.ones(batch, seq, dtype=torch.long)
    if "left" in padding:
        mask[-1, : seq // 4] = 0
    if "right" in padding:
        mask[0, -seq // 4 :] = 0
    if "empty" in padding:
        mask[batch // 2] = 0
    draws = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 64, (batch, seq), generator=draws), "attention_mask": mask}


def with_mask(causal: bool) -> Callable[..., Any]:
    """Calls a layer of transformers with the dropped keys blocked in its attention mask."""

    def call(layer: nn.Module, kept: Tensor, args: Any, kwargs: Any) -> Any:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        bound.arguments["attention_mask"] = block_keys(bound.arguments.get("attention_mask"), kept, causal)
        return layer(*bound.args, **bound.kwargs)

    return call


def check(family: str, inputs: dict[str, Any], real: Tensor, keep: int | None = None, **options: Any) -> Any:
    _, _, layers, causal = FAMILIES[family]
    options = {"real": real, "dense": with_mask(causal), "layers": rf"{layers}\.\d", **options}
    output, args, kwargs = check_routed(
        build(family),
        {**inputs, "use_cache": False},
        keep,
        name=f"{layers}.1",
        slot=options.pop("slot", None),
        **options,
    )
    return output, args, kwargs


@pytest.mark.parametrize(
    ("family", "padding"), [("opt", ""), ("opt", "left right"), ("gpt_neox", "left right"), ("phi", "left empty")]
)
def test_decoders(family: str, padding: str) -> None:
    inputs = text(3, 16, padding)
    check(family, inputs, inputs["attention_mask"])


@pytest.mark.parametrize(
    ("batch", "seq", "keep"),
    [(3, 32, 5), (8, 8, 1), (1, 11, 10)],
)
def test_sizes_that_coincide(batch: int, seq: int, keep: int) -> None:
    """S the hidden size; S the head and the batch size, k = 1; B = 1, k = S - 1."""
    inputs = text(batch, seq, "left")
    check("phi", inputs, inputs["attention_mask"], keep)


@pytest.mark.parametrize(
    ("family", "encoded", "decoded"),
    [
        pytest.param("t5 encoder", 9, 14, marks=pytest.mark.slow),
        ("t5 decoder", 12, 12),
        ("bart encoder", 12, 12),
        ("bart decoder", 12, 12),
    ],
)
def test_encoder_decoders(family: str, encoded: int, decoded: int) -> None:
    target = {f"decoder_{name}": value for name, value in text(3, decoded, "right").items()}
    inputs = {**text(3, encoded, "left right"), **target}
    real = inputs["attention_mask" if "encoder" in family else "decoder_attention_mask"]
    slot = 0 if "t5" in family else None
    output, args, kwargs = check(family, inputs, real, slot=slot)
    if "t5" in family:  # the position bias comes back as it was given, for the next layer
        bias = args[2] if len(args) > 2 else kwargs["position_bias"]
        assert bias.shape[-2:] == real.shape[-1:] * 2
        assert output[1] is bias


class Base(nn.Module):
    """Builds a causal, padded mask and rotary tables once; ``call`` hands them to its layers."""

    def __init__(self, layer: Callable[[], nn.Module], slot: int | None = None) -> None:
        super().__init__()
        self.slot, self.layers = slot, nn.ModuleList(layer() for _ in range(3))

    def rope(self, seq: int) -> Any:
        return tables(torch.arange(seq), D // H)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        seq = x.shape[1]
        mask = torch.ones(seq, seq, dtype=torch.bool, device=x.device).tril() & padding[:, None, None].bool()
        rope = tuple(t.expand(x.shape[0], seq, -1) for t in self.rope(seq))
        for layer in self.layers:
            out = self.call(layer, x, mask, rope)
            x = out if self.slot is None else out[self.slot]
        return x

    def call(self, layer: nn.Module, x: Tensor, mask: Tensor, rope: Any) -> Any:
        return layer(x, mask, rope=rope)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(D, H)

    def forward(self, x: Tensor, mask: Tensor, *, rope: Any = None) -> Any:
        return x + self.attention(x, mask, rope)


@dataclass
class Context:
    tables: Any
    mask: Tensor
    eps: float = 0.1


class TakesDataclass(Plain):
    def forward(self, x: Tensor, context: Context) -> Any:  # type: ignore[override]
        return super().forward(x, context.mask, rope=context.tables) + context.eps


class TakesDict(Plain):
    def forward(self, x: Tensor, **given: Any) -> Any:  # type: ignore[override]
        return super().forward(x, given["masks"]["full"][0], rope=given["tables"])


class TakesNested(Plain):
    def forward(self, extra: Any, x: Tensor) -> Any:  # type: ignore[override]
        (mask, _), [(cos, sin), scale] = extra
        return super().forward(x, mask, rope=(cos, sin)) * scale


class Starred(Plain):
    def forward(self, x: Tensor, *rest: Any) -> Any:  # type: ignore[override]
        return super().forward(x, rest[0], rope=rest[1:])


class SecondSlot(Plain):
    """Returns attention weights, then the hidden states, then the mask it was given, then something of no length."""

    def forward(self, x: Tensor, mask: Tensor, *, rope: Any = None) -> Any:
        weights = (x @ x.mT / 8).softmax(-1)
        return weights, super().forward(x, mask, rope=rope), mask, x.new_ones(3), None


CALLS: dict[str, tuple[type[nn.Module], Callable[..., Any]]] = {
    "positional and keyword": (Plain, lambda layer, x, mask, rope: layer(x, mask, rope=rope)),
    "keywords": (Plain, lambda layer, x, mask, rope: layer(rope=rope, mask=mask, x=x)),
    "a list": (Plain, lambda layer, x, mask, rope: layer(x, mask, rope=list(rope))),
    "a dataclass": (TakesDataclass, lambda layer, x, mask, rope: layer(x, Context(rope, mask))),
    "dicts": (TakesDict, lambda layer, x, mask, rope: layer(x, masks={"full": (mask,)}, tables=rope, flag=True)),
    "nested": (TakesNested, lambda layer, x, mask, rope: layer(((mask, None), [rope, 2.0]), x=x)),
}


def toy_inputs(batch: int = 3, seq: int = 10) -> dict[str, Tensor]:
    mask = text(batch, seq, "left right")["attention_mask"]
    return {"padding": mask, "x": torch.randn(batch, seq, D, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("way", CALLS)
def test_ways_to_hand_over_arguments(way: str) -> None:
    layer, call = CALLS[way]
    model = Base(layer)
    model.call = call
    inputs = toy_inputs()
    check_routed(model, inputs, 4, real=inputs["padding"])


def test_tensors_without_a_name_are_refused() -> None:
    model = Base(Starred)
    model.call = lambda layer, x, mask, rope: layer(x, mask, *rope)
    with pytest.raises(LTDError, match=r"layers\.1 \(Starred\) cannot be routed.*'\*args'.*give it a name"):
        ltd_fx.transform(model, example_inputs=toy_inputs())


def test_hidden_states_in_the_second_slot_weights_dropped_inputs_handed_on() -> None:
    model, inputs = Base(SecondSlot, slot=1), toy_inputs()
    output, args, _ = check_routed(model, inputs, 4, slot=1, real=inputs["padding"])
    assert output[0] is None
    assert output[2] is args[1]
    assert torch.equal(output[3], torch.ones(3))
    assert output[4] is None
    model.eval()
    assert model.layers[1](inputs["x"], args[1])[0].shape == (3, 10, 10)


@pytest.mark.parametrize(
    ("batch", "seq", "keep"), [(4, 16, 4), (3, 8, 1), (6, 6, 3), (1, 5, 4), (2, 4, 2), (16, 16, 7)]
)
def test_sizes_that_coincide_in_a_toy(batch: int, seq: int, keep: int) -> None:
    inputs = toy_inputs(batch, seq)
    check_routed(Base(Plain), inputs, keep, real=inputs["padding"])


class Given(Base):
    """Its mask is given from outside, so what to resize for another length is ambiguous where S = D."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = layer(x, mask)
        return x


@pytest.mark.parametrize(("batch", "seq"), [(3, 10), (3, D), (10, 10), (1, D // H)])
def test_a_mask_that_is_the_models_input(batch: int, seq: int) -> None:
    check_routed(Given(Plain), {"x": toy_inputs(batch, seq)["x"], "mask": causal(batch, seq)}, 3)


def test_learnt_at_the_first_training_forward() -> None:
    inputs = toy_inputs()
    check_routed(Base(Plain), inputs, 4, real=inputs["padding"], example_inputs=None)
