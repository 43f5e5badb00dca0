"""Built-in patterns without example inputs: routed at once, and proven or refused at the first training forward."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from toy import STREAM, Encoder, statuses, warned

import ltd_fx
from ltd_fx import LayerPattern, LTDError, LTDScheduler
from ltd_fx.learn import patterns
from ltd_fx.prove import proof

KEEP = 5
WAITS = "built-in pattern, to be tested at the first training forward"
RIGHT, WRONG = LayerPattern(hidden="x", aligned={"mask": (3,)}), LayerPattern(hidden="x", aligned={"mask": ()})


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.output = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.inputs(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Averaging(Layer):
    """Of what mixes tokens in training only, numbers in eval mode say nothing."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + x.mean(1, keepdim=True) if self.training else x, mask)


class Sigmoid(Layer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.inputs(x).chunk(3, -1)
        return x + self.output((q @ k.mT).sigmoid() @ v)


class Kernel(Layer):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.dtype in (torch.float64, torch.float32):
            raise NotImplementedError("no such kernel")
        return super().forward(x, mask)


class Net(nn.Module):
    def __init__(self, layer: type[nn.Module] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, None if mask is None else mask[:, None, None, :])
        return x


@pytest.fixture
def build_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module], LayerPattern], None]:
    """Put a pattern into the table of those that are built in."""

    def put(layer_class: type[nn.Module], pattern: LayerPattern) -> None:
        monkeypatch.setitem(patterns._BUILT_IN, (layer_class.__module__, layer_class.__qualname__), pattern)

    return put


def transformed(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, LTDScheduler]:
    scheduler = LTDScheduler(KEEP, 12, 10)
    return ltd_fx.transform((model or Encoder(4)).train(), scheduler, **options), scheduler


def masked() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    return STREAM, mask


def test_a_right_one_is_proven_at_the_first_training_forward() -> None:
    (model, scheduler), (given, _) = transformed(), transformed(example_inputs=(STREAM,))
    given.load_state_dict(model.state_dict())
    model.eval()(STREAM)
    assert statuses(model) == ["to be tested"] * 2
    assert str(ltd_fx.summary(model)).count(WAITS) == 2
    model.train()
    state, hooks = torch.get_rng_state(), len(given._forward_pre_hooks)
    with warned():
        assert torch.equal(model(STREAM), given(STREAM))
    assert torch.equal(torch.get_rng_state(), state)
    assert statuses(model) == ["proven"] * 2
    assert len(model._forward_pre_hooks) == hooks
    assert scheduler.state_dict()["draws"]["forward"] == 1
    assert scheduler.consumed_layer_tokens == 0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_wrong_one_is_refused(compiled: bool, build_in: Any) -> None:
    build_in(Layer, WRONG)
    model, scheduler = transformed(Net())
    draws = scheduler.state_dict()
    run: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for _ in range(2):
        with pytest.raises(LTDError, match=r"layers\.1 \(Layer\) cannot be .*built-in pattern, wrong.*example_inputs"):
            run(*masked())
    assert scheduler.state_dict() == draws
    assert statuses(model) == ["to be tested"] * 2
    ltd_fx.transform(ltd_fx.restore(model), scheduler, example_inputs=masked())
    assert statuses(model) == ["proven"] * 2  # learnt in its stead
    assert ltd_fx.summary(model).sites[1].aligned == {"mask": (3,)}


@pytest.mark.parametrize(
    ("layer_class", "why"),
    [
        (Averaging, r"cannot be routed: .*mean"),
        (Kernel, r"built-in pattern, not verifiable: the dense layer fails: NotImplementedError: no such kernel"),
        (Sigmoid, r"built-in pattern, not verifiable: kept tokens see dropped ones.*register a LayerPattern"),
    ],
)
@pytest.mark.parametrize("given", [False, True], ids=["first forward", "example inputs"])
def test_a_layer_that_is_not_right_is_refused_though_it_is_known(
    layer_class: type[nn.Module], why: str, given: bool, build_in: Any
) -> None:
    build_in(layer_class, RIGHT)
    if given:
        with pytest.raises(LTDError, match=why.replace("built-in pattern, ", "")):
            transformed(Net(layer_class).bfloat16(), example_inputs=(STREAM.bfloat16(),))
    else:
        model, _ = transformed(Net(layer_class).bfloat16())
        with pytest.raises(LTDError, match=why):
            model(STREAM.bfloat16())


def test_a_registered_one_is_trusted_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(patterns._registered, Sigmoid, LayerPattern(hidden="x"))
    with warned("the pattern registered for Sigmoid is trusted"):
        model, _ = transformed(Net(Sigmoid))
        model(STREAM)
    assert statuses(model) == ["trusted"] * 2
    with warned("the pattern registered for Sigmoid is trusted"):
        model, _ = transformed(Net(Sigmoid), example_inputs=(STREAM,))
    assert statuses(model) == ["trusted"] * 2
    monkeypatch.setitem(patterns._registered, Averaging, LayerPattern(hidden="x"))
    with pytest.raises(LTDError, match=r"layers\.1 .* cannot be routed: .*mean"):
        transformed(Net(Averaging), example_inputs=(STREAM,))


def test_what_we_raise_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = transformed()
    monkeypatch.setattr(proof, "_difference", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        model(STREAM)
    assert statuses(model) == ["to be tested"] * 2
    monkeypatch.undo()
    model(STREAM)
    assert statuses(model) == ["proven"] * 2


def traced() -> fx.GraphModule:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.TransformerEncoderLayer)

    model = Encoder(4)
    return fx.GraphModule(model, Tracer().trace(model))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("build", [lambda: Encoder(4), traced], ids=["model", "graph"])
def test_copies_are_tested_themselves(build: Callable[[], nn.Module], how: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = transformed(build())
    copied = how(model).train()
    copied(STREAM)
    assert statuses(copied) == ["proven"] * 2
    assert statuses(model) == ["to be tested"] * 2
    model(STREAM)
    assert statuses(model) == ["proven"] * 2


def test_a_graph_stays_as_it_was_compiled() -> None:
    model, _ = transformed(traced())
    code, forward = model.code, type(model).forward
    model(STREAM)
    assert (model.code, type(model).forward) == (code, forward)
    assert [rows.shape[1] for rows in ltd_fx.sampled_indices(model).values()] == [KEEP] * 2
