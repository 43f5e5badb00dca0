"""The contract of transform, restore and summary: in place, names kept, refused before anything changes."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from conftest import Case, loss_of
from torch import fx, nn
from toy import PATTERN, Block, Net, snapshot

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


@pytest.fixture(autouse=True)
def _known_block() -> None:
    ltd_fx.register_pattern(Block, PATTERN)


def test_names_keys_and_classes_survive_and_restore_undoes_everything(case: Case) -> None:
    model = case.model()
    classes = [type(m) for m in model.modules()]
    before = snapshot(model)
    assert not ltd_fx.is_transformed(model)
    assert ltd_fx.transform(model) is model
    assert ltd_fx.is_transformed(model)
    assert ltd_fx.is_transformed(nn.Sequential(model))
    assert list(model.state_dict()) == before[1]
    assert [name for name, _ in model.named_modules()] == [name for name, *_ in before[0]]
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    assert ltd_fx.restore(model) is model
    assert snapshot(model) == before
    ltd_fx.transform(model)


def test_summary_is_a_table_of_every_layer(case: Case) -> None:
    report = ltd_fx.summary(ltd_fx.transform(case.model()))
    assert [site.routed for site in report.sites] == [False, True, True, False]
    assert [site.name for site in report.sites] == [f"{case.layers}.{i}" for i in range(4)]
    assert "2 of 4 layers routed" in str(report)
    assert "skip_first=1" in str(report)
    targets = [getattr(node.target, "__name__", node.target) for node in report.sites[1].graph.nodes]
    for step in ("draw_tokens", "split_hidden", "_ltd_layer", "merge_output"):
        assert step in targets
    assert "split_hidden" in str(report.sites[1].graph)


def test_selecting_layers() -> None:
    def routed(**options: Any) -> list[str]:
        model = ltd_fx.transform(Net(), **options)
        return [site.name for site in ltd_fx.summary(model).sites if site.routed]

    assert routed() == ["blocks.1", "blocks.2"]
    assert routed(skip_first=0, skip_last=2) == ["blocks.0", "blocks.1"]
    everything = {"skip_first": 0, "skip_last": 0}
    assert routed(layers=Block, **everything) == [f"blocks.{i}" for i in range(4)]
    assert routed(layers=(Block, nn.Conv1d), **everything) == [f"blocks.{i}" for i in range(4)]
    assert routed(layers=r"blocks\.[02]", **everything) == ["blocks.0", "blocks.2"]
    assert routed(layers=["blocks.3", "blocks.1"], **everything) == ["blocks.1", "blocks.3"]
    assert routed(layers=lambda name, module: name.endswith("2"), **everything) == ["blocks.2"]


def test_every_stack_keeps_its_own_first_and_last() -> None:
    model = ltd_fx.transform(nn.ModuleDict({"encoder": Net(3), "decoder": Net(4)}))
    routed = [site.name for site in ltd_fx.summary(model).sites if site.routed]
    assert routed == ["encoder.blocks.1", "decoder.blocks.1", "decoder.blocks.2"]


def test_one_warning_where_the_schedule_never_becomes_dense() -> None:
    model = ltd_fx.transform(Net(), LTDScheduler(2, 5, 4))
    with pytest.warns(UserWarning, match=r"6 tokens.*max_length=5"):
        model(torch.zeros(2, 6, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(2, 6, 8))
    compiled = torch.compile(ltd_fx.transform(Net(), LTDScheduler(2, 5, 4)), fullgraph=True, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            compiled(torch.zeros(2, 6, 8))
    assert [str(w.message) for w in caught if "6 tokens" in str(w.message) and "max_length=5" in str(w.message)]


def test_an_fx_graph_module_is_rewritten_itself() -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Block)

    net = Net()
    plain = fx.GraphModule(net, Tracer().trace(net, concrete_args={"scale": None}))
    model, code = copy.deepcopy(plain), plain.code
    scheduler = LTDScheduler(2, 6, 4)
    ltd_fx.transform(model, scheduler, example_inputs=(torch.zeros(3, 6, 8),))
    assert "split_hidden" in model.code
    assert "split_hidden" in str(ltd_fx.summary(model).sites[1].graph)
    stream = torch.randn(3, 6, 8)
    output = model(stream)
    (first, second) = ltd_fx.sampled_indices(model).values()
    expected = net.blocks[0](stream)[0]
    for block, kept in ((1, first), (2, second)):
        rows = torch.zeros(3, 6, dtype=torch.bool).scatter(1, kept, True)[..., None]
        expected = torch.where(rows, net.blocks[block](expected)[0], expected)
    torch.testing.assert_close(output, net.blocks[3](expected)[0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    scheduler.set_step(0)
    torch.testing.assert_close(compiled(stream), output)
    assert torch.equal(model.eval()(stream), plain(stream))
    ltd_fx.restore(model)
    assert model.code == code
    plain.graph = fx.symbolic_trace(nn.Identity()).graph
    with pytest.raises(LTDError, match="never called"):
        ltd_fx.transform(plain)


def test_pickle_and_deepcopy(case: Case) -> None:
    model = ltd_fx.transform(case.model(), LTDScheduler(5, case.seq_len, 10), example_inputs=case.inputs())
    state = copy.deepcopy(model._ltd_rewrite.state.scheduler.state_dict())
    expected = loss_of(model(**case.inputs()))
    model._ltd_rewrite.state.scheduler.load_state_dict(state)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    copied = copy.deepcopy(model)
    for other in (loaded, copied):
        assert ltd_fx.is_transformed(other)
        assert other is not model
        assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(loss_of(loaded(**case.inputs())), expected)
    assert torch.equal(loss_of(copied(**case.inputs())), expected)
    assert copied._ltd_rewrite.state is model._ltd_rewrite.state  # the user's one scheduler drives both
    ltd_fx.restore(loaded)
