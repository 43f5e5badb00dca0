"""What transform and a routed layer refuse, with the model left as it was."""

from typing import Any

import pytest
import torch
from conftest import SEQ, Case, text
from torch import Tensor, fx, nn
from toy import PATTERN, Block, Net, snapshot

import ltd_fx
from ltd_fx import LayerPattern, LTDError, LTDScheduler


@pytest.fixture(autouse=True)
def _known_block() -> None:
    ltd_fx.register_pattern(Block, PATTERN)


REFUSED = {
    "no match": ({"layers": "block"}, r"layers='block'.*did you mean 'blocks"),
    "no such name": ({"layers": ["blocks.9"]}, r"no layer 'blocks.9'; did you mean"),
    "bad regex": ({"layers": "("}, "not a regular expression"),
    "bad layers": ({"layers": 3}, "layers=3"),
    "nested": ({"layers": r"blocks\.1(\.linear)?"}, "blocks.1.linear within blocks.1"),
    "no attention": (
        {"layers": nn.Linear, "skip_first": 0, "skip_last": 0, "example_inputs": (torch.zeros(2, 6, 8),)},
        r"blocks.0.linear \(Linear\) cannot be routed, not verifiable: no token attends.*register a LayerPattern",
    ),
    "all skipped": ({"skip_first": 3}, r"skip_first=3.*4 in blocks"),
    "negative skip": ({"skip_last": -1}, "skip_last"),
    "float seed": ({"seed": 1.5}, "seed"),
    "sampling": ({"sampling": "random"}, "sampling.*per_sample"),
    "examples do not run": ({"example_inputs": (torch.zeros(2, 6, 7),)}, "forward fails: RuntimeError"),
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
    with pytest.raises(LTDError, match=r"Linear in 0.*layers=\.\.\."):
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
        (torch.zeros(2, 6, 8), {"a": 1}, "'scale' is a int"),
    ],
)
def test_what_a_forward_refuses(stream: Tensor, scale: Any, message: str) -> None:
    model = ltd_fx.transform(Net()).train()
    with pytest.raises(LTDError, match=message):
        model.blocks[1](stream, scale)


def test_a_pattern_that_does_not_fit_the_very_class_is_refused() -> None:
    class Renamed(Block):
        def forward(self, stream: Tensor, factor: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return stream

    class Open(nn.Module):
        def forward(self, stream: Tensor, **options: Any) -> Tensor:
            return stream

    model = nn.Sequential(*(Renamed() for _ in range(3)))
    before = snapshot(model)
    with pytest.raises(LTDError, match=r"Renamed has aligned argument 'scale'.*\(stream, factor\)"):
        ltd_fx.register_pattern(Renamed, PATTERN)
    ltd_fx.register_pattern(Renamed, lambda layer: LayerPattern(hidden="x"))  # made per layer: checked per layer
    with pytest.raises(LTDError, match="Renamed has hidden argument 'x'"):
        ltd_fx.transform(model)
    assert snapshot(model) == before
    with pytest.raises(LTDError, match="Open has aligned argument 'mask'"):
        ltd_fx.register_pattern(Open, LayerPattern(hidden="stream", aligned={"mask": lambda draw, mask: mask}))


def test_unmentioned_tensors_in_args_and_in_a_graphs_kwargs_are_refused() -> None:
    class Open(nn.Module):
        def forward(self, stream: Tensor, *rest: Any, **options: Any) -> Tensor:
            return stream

    def graph_module() -> fx.GraphModule:
        graph, root = fx.Graph(), nn.Module()
        root.blocks = nn.ModuleList(Open() for _ in range(3))
        stream, rest, scores = (graph.placeholder(name) for name in ("stream", "rest", "scores"))
        for i in range(3):
            stream = graph.call_module(f"blocks.{i}", (stream, rest), {"scores": scores, "scale": 2.0})
        graph.output(stream)
        return fx.GraphModule(root, graph)

    stream, long, short = torch.zeros(2, 6, 8), torch.zeros(2, 6), torch.zeros(2, 5)
    ltd_fx.register_pattern(Open, LayerPattern(hidden="stream"))
    model = ltd_fx.transform(graph_module())
    model(stream, short, short)
    with pytest.raises(LTDError, match=r"'\*args\[0\]'.*aligned"):
        model(stream, long, short)
    with pytest.raises(LTDError, match=r"'scores'.*aligned"):
        model(stream, short, long)
    layers = [ltd_fx.transform(nn.Sequential(*(Open() for _ in range(3)))) for _ in range(2)]
    layers[0][1](stream, short, scores=short)
    with pytest.raises(LTDError, match=r"'\*args'.*aligned"):
        layers[1][1](stream, long)
    ltd_fx.register_pattern(Open, LayerPattern(hidden="stream", aligned={"scores": (1,)}))
    model = ltd_fx.transform(graph_module())
    model(stream, short, long)
    with pytest.raises(LTDError, match=r"'scores'.*dimension 1"):
        model(stream, short, short)


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
