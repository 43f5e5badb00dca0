"""The proof: every mistake in a pattern is told, every layer that cannot be routed is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from attend import Attention, Stack
from conftest import decoder
from torch import Tensor, nn
from toy import snapshot

import ltd_fx
from ltd_fx import Aligned, LayerPattern, LTDError
from ltd_fx.learn import patterns
from ltd_fx.learn.layer_pattern import argument_names
from ltd_fx.learn.observe import Call
from ltd_fx.learn.sandbox import Sandbox
from ltd_fx.prove.proof import prove

B, S, D, H = 4, 16, 16, 2


@pytest.fixture(autouse=True)
def _own_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_registered", dict(patterns._registered))
    torch.manual_seed(0)


class Custom(nn.Module):
    """Arguments of every kind, cut to the length of ``x``, so that few mistakes show in a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate = Attention(D, H), nn.Linear(D, D)

    def forward(
        self, x: Tensor, mask: Tensor, table: Tensor, joint: Tensor, bias: Tensor, scale: Tensor, style: Tensor
    ) -> tuple[Tensor, Tensor]:
        n = x.shape[1]
        mask = mask[..., :n, :n] + bias[:, :n, :n].unflatten(0, (-1, H))
        normed = x * scale[:, :n, None] + table[..., :n, :] + joint[:, 2 : 2 + n]
        return normed, x + self.attention(normed, mask) * self.gate(style)[:, None]


class Plain(nn.Module):
    """Attention, and what subclasses make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def custom_inputs() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    shapes = {"x": (B, S, D), "table": (S, D), "joint": (1, 2 + S, D), "bias": (B * H, S, S), "scale": (B, S)}
    inputs = {name: torch.randn(shape, generator=draws) for name, shape in {**shapes, "style": (B, D)}.items()}
    seen = (torch.rand(B, 1, S, S, generator=draws) > 0.3) | torch.eye(S, dtype=torch.bool)
    return {**inputs, "mask": torch.zeros(B, 1, S, S).masked_fill(~seen, -1e30)}


CUSTOM = LayerPattern(
    hidden="x",
    aligned={
        "mask": (2, 3),
        "table": (0,),
        "joint": Aligned((1,), prefix=2),
        "bias": (1, 2),
        "scale": (1,),
        "style": (),
    },
    output=1,
    dropped=(0,),
)
LLAMA = LayerPattern(aligned={"attention_mask": (2, 3), "position_embeddings": (1,), "position_ids": (1,)})
OMIT = "left out"
CUSTOM_MISTAKES: dict[str, Any] = {
    "output slot": {"output": 0},
    "no output slot": {"output": None},
    "weights not dropped": {"dropped": ()},
    "batch_first": {"batch_first": False},
    "hidden": {"hidden": "scale"},
    "returned": {"dropped": (), "returned": {0: "x"}},
    **{f"{name} ()": {name: ()} for name in CUSTOM.aligned if name != "style"},
    **{f"{name} omitted": {name: OMIT} for name in CUSTOM.aligned},
    **{f"mask {dims}": {"mask": dims} for dims in ((2,), (3,), (0, 1), (1, 2), (0, 2, 3))},
    **{f"mask batch {batch}": {"mask": Aligned((2, 3), batch)} for batch in (1, 2, None)},
    **{f"table {entry}": {"table": entry} for entry in ((1,), (0, 1), Aligned((0,), 1), Aligned((0,), prefix=-1))},
    **{f"joint prefix {n}": {"joint": Aligned((1,), prefix=n)} for n in (0, 1, 3, -1)},
    **{f"joint {entry}": {"joint": entry} for entry in (Aligned((1,), None, 2), Aligned((2,), 0, 2))},
    **{f"bias {entry}": {"bias": entry} for entry in ((1,), (2,), (0, 1), Aligned((1, 2), None), Aligned((1,), 2))},
    **{f"scale {entry}": {"scale": entry} for entry in ((0,), (0, 1), Aligned((1,), None), Aligned((1,), 0, -1))},
    "style (1,)": {"style": (1,)},
}
LLAMA_MISTAKES: dict[str, Any] = {
    "batch_first": {"batch_first": False},
    "hidden": {"hidden": "attention_mask"},
    **{f"attention_mask {dims}": {"attention_mask": dims} for dims in ((), (2,), (3,), (1, 2), (0, 2, 3), OMIT)},
    **{f"attention_mask batch {n}": {"attention_mask": Aligned((2, 3), n)} for n in (1, None)},
    "attention_mask per head": {"attention_mask": Aligned((2, 3), None, per_head=True)},
    **{f"position_embeddings {e}": {"position_embeddings": e} for e in ((), (0,), (2,), (1, 2), OMIT)},
    "only cosines": {"position_embeddings": ((1,), None)},
    "only sines": {"position_embeddings": (None, (1,))},
    "tables without batch": {"position_embeddings": Aligned((1,), None)},
    "tables without class token": {"position_embeddings": Aligned((1,), prefix=-1)},
}


def broken(pattern: LayerPattern, mistake: dict[str, Any]) -> LayerPattern:
    fields = {name: value for name, value in mistake.items() if hasattr(pattern, name)}
    aligned = {**pattern.aligned, **{name: value for name, value in mistake.items() if name not in fields}}
    return replace(pattern, **fields, aligned={name: entry for name, entry in aligned.items() if entry is not OMIT})


def llama() -> nn.Module:
    return decoder("Llama")().train()


def llama_inputs() -> dict[str, Tensor]:
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, :5] = mask[2, -3:] = 0
    return {"input_ids": torch.randint(64, (B, S), generator=torch.Generator().manual_seed(1)), "attention_mask": mask}


def llama_layer() -> type[nn.Module]:
    return pytest.importorskip("transformers.models.llama.modeling_llama").LlamaDecoderLayer


def llama_pattern(mistake: dict[str, Any] | None = None) -> LayerPattern:
    arguments = argument_names(llama_layer())  # releases of transformers differ in one name
    pattern = replace(LLAMA, cache="cache" if "cache" in arguments else "past_key_values")
    return pattern if mistake is None else broken(pattern, mistake)


def told(model: nn.Module, layer_class: type, pattern: LayerPattern, inputs: dict[str, Tensor], name: str) -> None:
    ltd_fx.register_pattern(layer_class, pattern)
    report = ltd_fx.verify(ltd_fx.transform(model), inputs)
    site = report.sites[0]
    assert not report.ok
    assert site.name == name
    assert site.status == "wrong", site
    assert site.reason


def refused(model: nn.Module, inputs: Any, message: str, **options: Any) -> None:
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LTDError, match=f"(?s){message}"):
        ltd_fx.transform(model, example_inputs=inputs, **options)
    assert snapshot(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not ltd_fx.is_transformed(model)


@pytest.mark.parametrize("mistake", CUSTOM_MISTAKES)
def test_a_mistake_in_a_custom_pattern_is_told(mistake: str) -> None:
    told(Stack(Custom, slot=1), Custom, broken(CUSTOM, CUSTOM_MISTAKES[mistake]), custom_inputs(), "layers.1")


@pytest.mark.parametrize("mistake", LLAMA_MISTAKES)
def test_a_mistake_in_llamas_pattern_is_told(mistake: str) -> None:
    told(llama(), llama_layer(), llama_pattern(LLAMA_MISTAKES[mistake]), llama_inputs(), "model.layers.1")


@pytest.mark.parametrize("mistake", ["returned", "output slot", "table ()", "joint prefix 1", "mask (2,)", "scale ()"])
def test_a_mistake_in_a_custom_pattern_is_refused_with_examples(mistake: str) -> None:
    ltd_fx.register_pattern(Custom, broken(CUSTOM, CUSTOM_MISTAKES[mistake]))
    refused(Stack(Custom, slot=1), custom_inputs(), r"layers\.1 \(Custom\) cannot be routed")


@pytest.mark.parametrize("mistake", ["attention_mask batch 1", "position_embeddings ()", "only sines", "batch_first"])
def test_a_mistake_in_llamas_pattern_is_refused_with_examples(mistake: str) -> None:
    ltd_fx.register_pattern(llama_layer(), llama_pattern(LLAMA_MISTAKES[mistake]))
    refused(llama(), llama_inputs(), r"model\.layers\.1 .*cannot be routed|too short to prove")


@pytest.mark.parametrize(("batch", "seq"), [(3, 10), (6, 10), (6, 6)])
def test_batch_and_sequence_mistaken_for_each_other_are_refused(batch: int, seq: int) -> None:
    ltd_fx.register_pattern(Plain, LayerPattern(hidden="x", batch_first=False))
    refused(Stack(Plain), (torch.randn(batch, seq, D),), r"layers\.1 .*cannot be routed|batch_first")


@pytest.mark.parametrize("sampling", ["per_sample", pytest.param("shared", marks=pytest.mark.slow)])
def test_the_correct_patterns_are_verified_and_reported(sampling: str) -> None:
    ltd_fx.register_pattern(Custom, CUSTOM)
    ltd_fx.register_pattern(llama_layer(), llama_pattern())
    for model, inputs in ((Stack(Custom, slot=1), custom_inputs()), (llama(), llama_inputs())):
        ltd_fx.transform(model, sampling=sampling)
        report = ltd_fx.verify(model, inputs)
        assert report.ok
        assert all(site.status in ("proven", "tested") and site.error < 1e-10 for site in report.sites), report
        assert f"{len(report.sites)} of {len(report.sites)} routed layers proven or tested" in str(report)
        assert "registered pattern, to be tested at the first training forward" in str(ltd_fx.summary(model))
        ltd_fx.restore(model)
        ltd_fx.transform(model, sampling=sampling, example_inputs=inputs)
        assert "proven, error" in str(ltd_fx.summary(model))


class ZeroGates(Custom):
    """As a diffusion transformer's: at first each block is the identity."""

    def __init__(self, gate: float = 0.0, weights: float = 1.0) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(weights)
            for parameter in self.gate.parameters():
                parameter.mul_(gate)


@pytest.mark.parametrize("weights", [{"gate": 0.0}, {"gate": 1.0, "weights": 1e-6}, {"gate": 1.0, "weights": 0.0}])
@pytest.mark.parametrize("mistake", ["table ()", "mask (2,)", "joint ()", "scale ()"])
def test_mistakes_show_whatever_the_weights(weights: dict[str, float], mistake: str) -> None:
    model = Stack(lambda: ZeroGates(**weights), slot=1)
    told(model, ZeroGates, broken(CUSTOM, CUSTOM_MISTAKES[mistake]), custom_inputs(), "layers.1")


def test_a_proof_leaves_the_layer_as_it_is() -> None:
    layer, inputs = Custom().train(), custom_inputs()
    before, random = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
    proof = prove("it", layer, CUSTOM, Call("it", (), inputs, None), sandbox=Sandbox(layer))
    assert (proof.name, proof.layer_class, proof.status) == ("it", "Custom", "tested")
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert layer.training
    assert prove("it", layer, CUSTOM, None, sandbox=Sandbox(layer)).reason == "it is never called"
    few = {**inputs, **{name: inputs[name][:, :3] for name in ("x", "scale")}, "table": inputs["table"][:3]}
    with pytest.raises(LTDError, match=r"3 tokens.*longer example inputs"):
        prove("it", layer, CUSTOM, Call("it", (), few, None), sandbox=Sandbox(layer))
