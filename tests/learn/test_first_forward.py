"""Built-in patterns without example inputs: routed at once, and proven or refused at the first training forward."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SEQ, decoder, loss_of
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode
from toy import STREAM, Encoder

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


class Towers(nn.Module):
    """Two stacks, of which a batch may need one."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Encoder(4), Encoder(4)

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        return self.text(text) if image is None else self.text(torch.cat([self.image(image), text], 1))


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


def statuses(model: nn.Module) -> list[str]:
    return [site.status for site in ltd_fx.summary(model).sites if site.routed]


@contextmanager
def warned(*texts: str) -> Iterator[None]:
    """As many warnings of ours within, each with its text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [str(warning.message) for warning in caught if str(warning.message).startswith("ltd_fx")]
    assert len(ours) == len(texts), ours
    assert all(text in message for text, message in zip(texts, ours, strict=True)), ours


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


@pytest.mark.parametrize("fullgraph", [False, True])
def test_within_a_larger_compiled_program_it_routes_at_once_and_waits(fullgraph: bool) -> None:
    model, _ = transformed()
    run = torch.compile(lambda x: model(x) * 2, fullgraph=fullgraph, backend="aot_eager")
    with warned("cannot be tested within torch.compile of a larger program; pass example_inputs"):
        for _ in range(2):
            run(STREAM)
    assert [rows.shape[1] for rows in ltd_fx.sampled_indices(model).values()] == [KEEP] * 2
    assert statuses(model) == ["to be tested"] * 2
    model(STREAM)
    run(STREAM)
    assert statuses(model) == ["proven"] * 2


def test_past_the_models_own_call_it_routes_and_waits() -> None:
    model, _ = transformed()
    with warned("cannot be tested where the model's forward, or a layer, is called past the model's own call"):
        for _ in range(2):
            model.forward(STREAM)
    assert statuses(model) == ["to be tested"] * 2
    with warned():
        model(STREAM)
    assert statuses(model) == ["proven"] * 2


def test_under_torch_func_it_routes_and_waits() -> None:
    model, _ = transformed()
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).sum()

    with warned("cannot be tested within a transformation of torch.func"):
        for _ in range(2):
            vmap(grad(loss), (None, 0))(parameters, STREAM)
    assert statuses(model) == ["to be tested"] * 2
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


def test_it_waits_for_tokens() -> None:
    model, _ = transformed()
    model(STREAM[:, :3])
    assert statuses(model) == ["to be tested"] * 2
    model(STREAM)
    assert statuses(model) == ["proven"] * 2


@pytest.mark.parametrize(("padding", "status"), [(30, "proven"), (SEQ - 4, "to be tested")])
def test_it_waits_for_more_than_padding(padding: int, status: str) -> None:
    ids, mask = torch.randint(0, 64, (2, SEQ)), torch.ones(2, SEQ, dtype=torch.long)
    mask[:, :padding] = 0
    model = ltd_fx.transform(decoder("Llama")().train())
    loss_of(model(input_ids=ids, attention_mask=mask)).backward()
    assert statuses(model) == [status] * 2
    loss_of(model(input_ids=ids, attention_mask=torch.ones_like(mask))).backward()
    assert statuses(model) == ["proven"] * 2


def test_layers_that_a_batch_does_not_need_wait_for_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = transformed(Towers())
    examined: list[int] = []
    judge = proof.prove
    monkeypatch.setattr("ltd_fx.prove.examine.prove", lambda *a, **k: [examined.append(1), judge(*a, **k)][1])
    model(STREAM)
    assert statuses(model) == ["proven"] * 2 + ["to be tested"] * 2
    before = len(examined)
    model(STREAM)
    assert len(examined) == before
    model(STREAM, STREAM)
    assert statuses(model) == ["proven"] * 4


def test_what_the_user_counts_is_not_counted_twice() -> None:
    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(STREAM)
        return counter.get_total_flops()

    assert flops(transformed()[0]) == flops(transformed(example_inputs=(STREAM,))[0]) > 0
