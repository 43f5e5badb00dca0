"""The contract of transform, restore and summary: in place, names kept, refused before anything changes."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from conftest import SEQ, Case, loss_of, text
from torch import Tensor, fx, nn

import ltd_fx
from ltd_fx import LayerPattern, LTDError, LTDScheduler


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, stream: Tensor, scale: Tensor | None = None, *, shift: float = 0.0) -> tuple[Tensor, None]:
        out = stream + self.linear(stream) + shift
        return (out if scale is None else out * scale[..., None]), None


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, stream: Tensor, scale: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            stream, _ = block(stream, scale)
        return stream


PATTERN = LayerPattern(hidden="stream", aligned={"scale": (1,)}, output=0)


@pytest.fixture(autouse=True)
def _known_block() -> None:
    ltd_fx.register_pattern(Block, PATTERN)


def snapshot(model: nn.Module) -> Any:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()], list(model.state_dict()), hooks


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


def test_example_inputs_give_the_graph_of_call_sites(case: Case) -> None:
    model = ltd_fx.transform(case.model(), example_inputs=case.inputs())
    graph = ltd_fx.summary(model).graph
    calls = [node for node in graph.nodes if node.op == "call_module"]
    assert [node.target for node in calls] == [f"{case.layers}.1", f"{case.layers}.2"]
    merges = [node for node in graph.nodes if getattr(node.target, "__name__", "") == "merge_output"]
    splits = [node for node in graph.nodes if getattr(node.target, "__name__", "") == "split_hidden"]
    assert splits[1].args[1] is merges[0]  # an edge from the first routed layer to the second


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


REFUSED = {
    "no match": ({"layers": "block"}, r"layers='block'.*did you mean 'blocks"),
    "no such name": ({"layers": ["blocks.9"]}, r"no layer 'blocks.9'; did you mean"),
    "bad regex": ({"layers": "("}, "not a regular expression"),
    "bad layers": ({"layers": 3}, "layers=3"),
    "nested": ({"layers": r"blocks\.1(\.linear)?"}, "blocks.1.linear within blocks.1"),
    "unknown class": ({"layers": nn.Linear}, r"Linear, for which no LayerPattern.*register_pattern\(Linear"),
    "all skipped": ({"skip_first": 3}, r"skip_first=3.*4 in blocks"),
    "negative skip": ({"skip_last": -1}, "skip_last"),
    "float seed": ({"seed": 1.5}, "seed"),
    "sampling": ({"sampling": "random"}, "sampling.*per_sample"),
    "examples do not run": ({"example_inputs": (torch.zeros(2, 6, 7),)}, "fake tensors"),
    "examples do not fit": ({"example_inputs": (torch.zeros(2, 6, 8), torch.zeros(6))}, "blocks.1.*scale"),
    "hidden not 3-D": ({"example_inputs": (torch.zeros(6, 8),)}, "blocks.1.*3-D floating"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_and_untouched(why: str) -> None:
    options, message = REFUSED[why]
    model, scheduler = Net(), LTDScheduler(2, 6, 4)
    before = snapshot(model)
    with pytest.raises(LTDError, match=f"(?s){message}"):
        ltd_fx.transform(model, scheduler, **options)
    assert snapshot(model) == before
    assert not scheduler.attached
    ltd_fx.transform(model, scheduler)


def test_no_known_layer_names_what_was_seen() -> None:
    with pytest.raises(LTDError, match=r"Linear in 0.*register_pattern"):
        ltd_fx.transform(nn.Sequential(nn.ModuleList(nn.Linear(2, 2) for _ in range(3))))


def test_twice_shared_scheduler_compiled_and_not_transformed() -> None:
    model, scheduler = Net(), LTDScheduler(2, 6, 4)
    ltd_fx.transform(model, scheduler)
    with pytest.raises(LTDError, match=r"transformed already.*restore"):
        ltd_fx.transform(model)
    other = Net()
    with pytest.raises(LTDError, match="drives another model"):
        ltd_fx.transform(other, scheduler)
    with pytest.raises(LTDError, match="routed already"):
        ltd_fx.transform(nn.Sequential(model.blocks[1], model.blocks[2]), skip_first=0, skip_last=0)
    ltd_fx.restore(model)
    ltd_fx.transform(other, scheduler)
    with pytest.raises(LTDError, match="compile"):
        ltd_fx.transform(torch.compile(Net(), backend="eager"))
    for function in (ltd_fx.restore, ltd_fx.summary, ltd_fx.sampled_indices):
        with pytest.raises(LTDError, match="not transformed"):
            function(Net())


def test_patterns_that_do_not_fit_the_layer() -> None:
    for pattern in (LayerPattern(hidden="x"), LayerPattern(hidden="stream", aligned={"mask": (1,)})):
        with pytest.raises(LTDError, match=r"Block has .* argument '(x|mask)'.*\(stream, scale, shift\)"):
            ltd_fx.register_pattern(Block, pattern)
    with pytest.raises(LTDError, match=r"subclass of nn\.Module"):
        ltd_fx.register_pattern("Block", PATTERN)


@pytest.mark.parametrize(
    ("stream", "scale", "message"),
    [
        (torch.zeros(2, 6), None, "blocks.1.*3-D floating"),
        (torch.zeros(2, 6, 8), torch.zeros(2, 5, 1), "'scale'.*6.*dimension 1"),
        (torch.zeros(2, 6, 8), torch.zeros(3, 6, 1), "'scale'.*batch size 2"),
        (torch.zeros(2, 6, 8), {"a": 1}, "'scale' is a dict"),
    ],
)
def test_what_a_forward_refuses(stream: Tensor, scale: Any, message: str) -> None:
    model = ltd_fx.transform(Net()).train()
    with pytest.raises(LTDError, match=message):
        model.blocks[1](stream, scale)


def test_a_wrong_output_slot_and_further_tensors_are_refused() -> None:
    class Attending(Block):
        def forward(self, stream: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return stream, stream @ stream.mT

    ltd_fx.register_pattern(Attending, LayerPattern(hidden="stream", output=0))
    model = ltd_fx.transform(nn.Sequential(*(Attending() for _ in range(3))))
    with pytest.raises(LTDError, match=r"slot 1.*attention weights"):
        model[1](torch.zeros(2, 6, 8))
    ltd_fx.register_pattern(Attending, LayerPattern(hidden="stream", output=None))
    model = ltd_fx.transform(nn.Sequential(*(Attending() for _ in range(3))))
    with pytest.raises(LTDError, match=r"returned a tuple.*output=None"):
        model[1](torch.zeros(2, 6, 8))


def test_unlisted_tensors_in_kwargs_that_carry_the_sequence_are_refused(llama: Case) -> None:
    model = ltd_fx.transform(llama.model())
    model(**text(), scores=torch.zeros(2, 3))
    with pytest.raises(LTDError, match=r"'scores'.*aligned"):
        model(**text(), scores=torch.zeros(SEQ))


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
