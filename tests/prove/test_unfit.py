"""Layers that no pattern can route are refused, with a reason."""

import pytest
import torch
from attend import Attention, Stack, tables
from test_verify import B, D, H, Plain, S, refused
from torch import Tensor, nn
from torch.nn import functional as F

import ltd_fx
from ltd_fx import LayerPattern, LTDError


class Convolving(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.convolution(x.mT).mT


class State(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.cumsum(1)


class LinearAttention(Plain):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.elu(f(x)) + 1 for f in (self.attention.q, self.attention.k, self.attention.v))
        return x + q @ (k.mT @ v) / (q @ k.sum(1)[..., None])


class Sigmoid(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.attention.q(x) @ self.attention.k(x).mT).sigmoid() @ self.attention.v(x)


class Tokenwise(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention.o(x).relu()


class Pooling(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.mean(1, keepdim=True)


class Shift(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.pad(x, (0, 0, 1, -1))


class OwnRotary(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, rope=tables(torch.arange(x.shape[1]), D // H))


class OwnWindow(Plain):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return x + self.attention(x, (places[:, None] - places).abs() <= 3)


class OwnBias(Plain):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return x + self.attention(x, (places[:, None] - places).abs() * -0.3)


class OwnTemperature(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, (x @ x.mT)[:, None] * x.shape[1] / 100)


class BatchMixing(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean(0)


class BatchAttention(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.attention(x.transpose(0, 1)).transpose(0, 1)


class TopKeys(Plain):
    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT
        return x + self.attention(x, (scores >= scores.topk(3).values[..., -1:])[:, None])


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x.flatten(1, 2)).view_as(x)


NOT_SOFTMAX, DIFFER = ", not verifiable: kept tokens see dropped ones", ", wrong: kept tokens differ"
UNFIT = {
    Convolving: ": a convolution over the tokens: conv1d, in .*self.convolution",
    State: ": it goes along the tokens: cumsum",
    Pooling: ": it is computed over all tokens: mean",
    LinearAttention: ": it is computed over all tokens: sum, in .*k.sum",
    **dict.fromkeys((Sigmoid, Shift), NOT_SOFTMAX),
    **dict.fromkeys((OwnRotary, OwnWindow, OwnBias, OwnTemperature, TopKeys), DIFFER),
    BatchMixing: ", (wrong: sequences see each other|not verifiable)",
    BatchAttention: ", wrong: sequences see each other",
    Tokenwise: ", not verifiable: no token attends to another",
}


@pytest.mark.parametrize("layer", UNFIT)
def test_layers_that_must_see_all_tokens_are_refused(layer: type[nn.Module]) -> None:
    message = rf"layers\.1 \({layer.__name__}\) cannot be routed{UNFIT[layer]}"
    refused(Stack(layer), (torch.randn(B, S, D),), message)


@pytest.mark.parametrize("layer", [BatchMixing, State, OwnRotary])
def test_layers_are_refused_with_one_draw_for_the_batch(layer: type[nn.Module]) -> None:
    refused(Stack(layer), (torch.randn(B, S, D),), rf"layers\.1.*{UNFIT[layer]}", sampling="shared")


def test_hidden_states_of_four_dimensions_are_refused() -> None:
    refused(Stack(Swin), (torch.randn(B, 4, 4, D),), "layers.1.*no argument holds 3-D")


def test_the_reports_say_what_is_not_verifiable() -> None:
    ltd_fx.register_pattern(Sigmoid, LayerPattern(hidden="x"))
    x = (torch.randn(B, S, D),)
    model = ltd_fx.transform(Stack(Sigmoid), example_inputs=x)
    assert "trusted, by its LayerPattern; not verifiable: kept tokens see dropped ones" in str(ltd_fx.summary(model))
    report = ltd_fx.verify(model, x)
    assert not report.ok
    assert "layers.1  not verifiable" in str(report)
    assert "0 of 1 routed layers proven or tested" in str(report)


def test_a_window_that_only_shows_at_full_length_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "vocab_size": 32, "max_position_embeddings": 128}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    kinds = [[["global", "local"], 2]]
    config = transformers.GPTNeoConfig(**sizes, **ends, attention_types=kinds, window_size=40, intermediate_size=16)
    model = transformers.GPTNeoForCausalLM(config).train()
    short = {"input_ids": torch.randint(3, 32, (2, 36))}
    ltd_fx.restore(ltd_fx.transform(model, example_inputs=short))  # no window matters yet
    with pytest.raises(LTDError, match=r"transformer\.h\.1 \(GPTNeoBlock\).*differ"):
        ltd_fx.transform(model, example_inputs={"input_ids": torch.randint(3, 32, (2, 100))})

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[1])
            near = (place[:, None] - place).abs() < 40
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return x + nn.functional.scaled_dot_product_attention(q, k, v, near)[:, 0]

    with pytest.raises(LTDError, match="differ"):
        ltd_fx.transform(nn.Sequential(*(Windowed() for _ in range(3))), example_inputs=(torch.randn(2, 100, 8),))


def test_a_layer_that_differs_from_its_like_in_a_buffer_only_is_proven_by_itself() -> None:
    class Masked(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            place = torch.arange(64)
            self.register_buffer("near", (place[:, None] - place).abs() < width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            near = self.near[: x.shape[1], : x.shape[1]]
            return x + F.scaled_dot_product_attention(q, k, v, near)[:, 0]

    inputs = (torch.randn(2, 64, 8),)
    ltd_fx.transform(nn.Sequential(*(Masked(64) for _ in range(6))), example_inputs=inputs)
    with pytest.raises(LTDError, match=r"4 \(Masked\).*differ"):
        ltd_fx.transform(nn.Sequential(*(Masked(20 if i == 4 else 64) for i in range(6))), example_inputs=inputs)
