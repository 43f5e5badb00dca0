"""Without a pattern and without example inputs: learnt, proven and routed at the first training forward."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from toy import Wrapper, snapshot

import ltd_fx
from ltd_fx import LTDError, LTDScheduler
from ltd_fx.prove import Examination

BATCH, LENGTH, KEEP = 3, 12, 5
ROUTED = ["layers.1", "layers.2"]


class Layer(nn.Module):
    """Of no class that ltd_fx knows: no test may register a pattern for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.output = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, stream: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.inputs(stream).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return stream + self.output(out.transpose(1, 2).flatten(2))


class Counting(Layer):
    """Adds positions that it counts itself, so on fewer tokens they would be others."""

    def forward(self, stream: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(stream + torch.arange(stream.shape[1])[:, None].to(stream), mask)


class Net(nn.Module):
    def __init__(self, layer: type[nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(4))

    def forward(self, stream: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = None if mask is None else mask[:, None, None, :].bool()
        for layer in self.layers:
            stream = layer(stream, mask)
        return stream


def net(**options: Any) -> tuple[Net, LTDScheduler]:
    torch.manual_seed(0)
    scheduler = LTDScheduler(KEEP, LENGTH, 10)
    return ltd_fx.transform(Net(), scheduler, **options), scheduler


def inputs() -> tuple[Tensor, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[-1, 9:] = 0
    return torch.randn(BATCH, LENGTH, 8, generator=torch.Generator().manual_seed(1)), mask


def pending(model: nn.Module) -> bool:
    report = ltd_fx.summary(model)
    text, routed = "to be inferred at the first training forward", [site for site in report.sites if site.routed]
    assert [site.name for site in routed] == ROUTED
    assert {site.pattern is None for site in routed} == {str(report).count(text) == 2} == {text in str(report)}
    return text in str(report)


def kept_by(model: nn.Module) -> dict[str, Tensor]:
    """The rows that each routed layer changes in one forward."""
    kept: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: kept.update({name: (out != args[0]).any(-1)})
        )
        for name in ROUTED
    ]
    model(*inputs())
    for handle in handles:
        handle.remove()
    return kept


def assert_routed(model: nn.Module, kept: dict[str, Tensor]) -> None:
    drawn = ltd_fx.sampled_indices(model)
    assert drawn.keys() == kept.keys() == set(ROUTED)
    for name, rows in kept.items():
        assert drawn[name].shape == (BATCH, KEEP)
        assert torch.equal(rows, torch.zeros_like(rows).scatter(1, drawn[name], True))


def test_eval_forwards_stay_plain_and_the_first_training_forward_routes() -> None:
    plain = Net().eval()
    model, _ = net()
    plain.load_state_dict(model.state_dict())
    before = snapshot(model)
    assert ltd_fx.is_transformed(model)
    assert pending(model)
    with torch.inference_mode():
        assert torch.equal(model.eval()(*inputs()), plain(*inputs()))
    assert pending(model)
    assert snapshot(model) == before
    assert_routed(model, kept_by(model.train()))
    assert not pending(model)
    sites = [site for site in ltd_fx.summary(model).sites if site.routed]
    assert [site.proof.status for site in sites] == ["proven"] * 2
    assert [site.aligned for site in sites] == [{"mask": (3,)}] * 2
    assert torch.equal(model.eval()(*inputs()), plain(*inputs()))
    assert snapshot(ltd_fx.restore(model)) == snapshot(plain)


def test_an_evaluation_before_the_first_step_is_learnt_from() -> None:
    """So that what is compiled of it need not be compiled again once the layers change their class."""
    model, _ = net()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        out = model.eval()(*inputs())
    assert torch.equal(out, ltd_fx.restore(plain).eval()(*inputs()))
    assert not pending(model)
    classes = [type(layer) for layer in model.layers]
    assert_routed(model, kept_by(model.train()))
    assert [type(layer) for layer in model.layers] == classes


def test_an_evaluation_by_other_arguments_is_no_example_of_training() -> None:
    """Without a mask nothing is learnt of masks; with one, each sequence's tokens must take theirs."""
    model, _ = net()
    stream, mask = inputs()
    model.eval()(stream)
    assert not pending(model)
    assert_routed(model, kept_by(model.train()))
    assert [site.aligned for site in ltd_fx.summary(model).sites if site.routed] == [{"mask": (3,)}] * 2
    plain = ltd_fx.restore(copy.deepcopy(model)).eval()
    assert torch.equal(model.eval()(stream, mask), plain(stream, mask))


def test_a_second_evaluation_by_other_arguments_changes_nothing() -> None:
    model, _ = net()
    stream, mask = inputs()
    model.eval()(stream, mask)
    before = snapshot(model)
    model(stream)
    assert snapshot(model) == before
    assert_routed(model, kept_by(model.train()))


def test_an_evaluation_that_shows_nothing_is_waited_after() -> None:
    """A token alone tells no dimension of tokens."""
    model, _ = net()
    model.eval()(inputs()[0][:, :1])
    assert pending(model)
    assert_routed(model, kept_by(model.train()))


def test_an_evaluation_that_cannot_be_learnt_from_is_none_the_less_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong."""
    model, _ = net()
    before = snapshot(model)
    with monkeypatch.context() as patched:
        patched.setattr(Examination, "rehearse", lambda *_: 1 / 0)
        model.eval()(*inputs())
    assert snapshot(model) == before
    assert_routed(model, kept_by(model.train()))


def test_the_first_forward_equals_that_of_example_inputs_and_moves_no_generator() -> None:
    (lazy, scheduler), (eager, _) = net(), net(example_inputs=inputs())
    state = torch.get_rng_state()
    for _ in range(3):
        ours, theirs = lazy(*inputs()), eager(*inputs())
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)
    position = scheduler.state_dict()["draws"]
    assert position == eager._ltd_rewrite.state.scheduler.state_dict()["draws"] == {"seed": 0, "forward": 3}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "wrapped"])
def test_compiled_and_wrapped_models_learn_at_their_first_training_forward(compiled: bool, wrap: bool) -> None:
    reference, _ = net(example_inputs=inputs())
    model, scheduler = net()
    run: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    run = Wrapper(run) if wrap else run
    torch.testing.assert_close(run(*inputs()), reference(*inputs()))
    theirs = ltd_fx.sampled_indices(reference)
    assert all(torch.equal(indices, theirs[name]) for name, indices in ltd_fx.sampled_indices(run).items())
    assert not pending(run)
    scheduler.set_step(3)
    run(*inputs())
    assert [rows.shape for rows in ltd_fx.sampled_indices(run).values()] == [(BATCH, 7)] * 2


def test_a_wrong_layer_is_refused_at_the_first_training_forward_and_every_further_one() -> None:
    model, scheduler = Net(Counting), LTDScheduler(KEEP, LENGTH, 10)
    plain = copy.deepcopy(model)
    before = snapshot(model)
    ltd_fx.transform(model, scheduler)
    draws = scheduler.state_dict()
    unmarked = set(vars(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    marks = vars(model).keys() - unmarked  # torch.compile's own
    for run in (model, model, compiled):
        with pytest.raises(LTDError, match=r"layers\.1 \(Counting\) cannot be routed, wrong: kept tokens differ"):
            run(*inputs())
    assert scheduler.state_dict() == draws
    assert pending(model)
    ltd_fx.restore(model)
    for mark in marks:
        del model.__dict__[mark]
    assert snapshot(model) == before
    assert not scheduler.attached
    assert torch.equal(model(*inputs()), plain(*inputs()))


def test_restore_before_the_first_forward() -> None:
    model, before = Net(), snapshot(Net())
    scheduler = LTDScheduler(KEEP, LENGTH, 10)
    ltd_fx.transform(model, scheduler)
    ltd_fx.restore(model)
    assert snapshot(model) == before
    assert not ltd_fx.is_transformed(model)
    assert_routed(model, kept_by(ltd_fx.transform(model, scheduler)))


@pytest.mark.parametrize("training", [True, False])
def test_verify_completes_it(training: bool) -> None:
    model, scheduler = net()
    draws = scheduler.state_dict()
    assert ltd_fx.verify(model.train(training), inputs()).ok
    assert not pending(model)
    assert scheduler.state_dict() == draws
    assert model.training == training
    assert_routed(model, kept_by(model.train()))


def test_within_a_larger_compiled_function_it_asks_for_example_inputs() -> None:
    model, _ = net()
    with pytest.raises(Exception, match=r"first training forward.*example_inputs to ltd_fx\.transform"):
        torch.compile(lambda *args: model(*args) * 2, fullgraph=True, backend="aot_eager")(*inputs())
    assert pending(model)
    assert_routed(model, kept_by(model))


def test_before_the_first_forward_there_are_no_sampled_indices() -> None:
    model, _ = net()
    model.eval()(*inputs())
    with pytest.raises(LTDError, match="no training forward"):
        ltd_fx.sampled_indices(model.train())


def test_an_fx_graph_module_needs_example_inputs() -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Layer)

    net = Net()
    model, scheduler = fx.GraphModule(net, Tracer().trace(net, concrete_args={"mask": None})), LTDScheduler(5, 12, 9)
    code = model.code
    with pytest.raises(LTDError, match=r"layers\.1 is a Layer, .* pass example_inputs .*ltd_fx\.register_pattern"):
        ltd_fx.transform(model, scheduler, layers=Layer)
    assert model.code == code
    assert not scheduler.attached
    assert not ltd_fx.is_transformed(model)
    ltd_fx.transform(model, scheduler, layers=Layer, example_inputs=inputs()[:1])(inputs()[0])
    assert [rows.shape for rows in ltd_fx.sampled_indices(model).values()] == [(BATCH, 5)] * 2


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_pending_model_is_routed_itself_or_refused(how: str) -> None:
    """Never a copy that says it is transformed and trains dense, or that rewrites the model it was copied from."""
    model, _ = net()
    try:
        copied = copy.deepcopy(model) if how == "deepcopy" else saved_and_loaded(model)
    except LTDError:
        assert pending(model)
    else:
        assert_routed(copied, kept_by(copied))
        assert type(model.layers[1]) is Layer
    assert_routed(model, kept_by(model))


def test_consumed_layer_tokens_count_as_if_routed_from_the_start() -> None:
    (model, scheduler), (_, other) = net(), net(example_inputs=inputs())
    for consumed in (0, 2 * 5 + 2 * 12, 4 * 5 + 4 * 12, 4 * 5 + 2 * 6 + 6 * 12):  # lengths 5, 5, 6
        assert scheduler.consumed_layer_tokens == other.consumed_layer_tokens == consumed
        model(*inputs())
        scheduler.step()
        other.step()
