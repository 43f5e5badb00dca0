"""What a layer returns besides hidden states: ``LayerPattern.returned`` and ``.dropped``."""

import dataclasses
from typing import Any

import pytest
import torch
from test_aligned import BATCH, DIM, INDICES, SEQ, draw_of, randn
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LayerPattern, LTDError, LTDScheduler
from ltd_fx.runtime.split_merge import merge_output, split_hidden


@dataclasses.dataclass
class Output:
    hidden: Any
    bias: Any = None
    weights: Any = None
    loss: Any = None


class Layer(nn.Module):
    """Returns a bias that it hands on, attention weights, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.record = nn.Linear(8, 8), False

    def forward(self, stream: Tensor, bias: Tensor | None = None) -> Any:
        weights = (stream @ stream.mT + (0 if bias is None else bias)).softmax(-1)
        out = (stream + self.linear(weights @ stream), bias, weights, stream.square().mean())
        return Output(*out) if self.record else out


PATTERN = LayerPattern("stream", {"bias": (1, 2)}, returned={1: "bias", 3: None}, dropped=(2,))


@pytest.mark.parametrize("record", [False, True], ids=["tuple", "dataclass"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layers_further_outputs(record: bool, compiled: bool) -> None:
    ltd_fx.register_pattern(Layer, PATTERN)
    model = ltd_fx.transform(nn.ModuleList(Layer() for _ in range(3)), LTDScheduler(4, SEQ, 9))
    layer, state = model[1], model._ltd_rewrite.state
    layer.record = record
    stream, bias = randn(BATCH, SEQ, 8), randn(BATCH, SEQ, SEQ)
    output = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(stream, bias)
    hidden, handed, weights, loss = vars(output).values() if record else output
    layer.record = False
    rows = torch.ops.ltd_fx.sample_tokens(state.key, layer._ltd_site.number, stream, BATCH, SEQ, 4)
    kept = torch.stack([stream[b, rows[b]] for b in range(BATCH)])
    inner = torch.stack([bias[b][rows[b]][:, rows[b]] for b in range(BATCH)])
    wanted, out = stream.clone(), Layer.forward(layer, kept, inner)[0]
    for b in range(BATCH):
        wanted[b, rows[b]] = out[b]
    torch.testing.assert_close(hidden, wanted)
    assert torch.equal(handed, bias)
    assert weights is None
    torch.testing.assert_close(loss, kept.square().mean())
    assert layer.eval()(stream)[2].shape == (BATCH, SEQ, SEQ)  # dense: as the layer returns it


def test_merge_output_by_slots() -> None:
    draw, hidden = draw_of(), randn(BATCH, SEQ, DIM)
    rest, kept = split_hidden(draw, hidden, True)
    full, scores = randn(SEQ), randn(BATCH, 4)
    output = (kept * 2, scores, None, "text", (scores,))
    returned = ((1, full), (2, full), (4, None))
    merged = merge_output(draw, rest, output, 0, True, returned, dropped=())
    wanted = hidden.clone().scatter(1, INDICES[..., None].expand_as(kept), kept * 2)
    assert torch.equal(merged[0], wanted)
    assert merged[1] is full
    assert merged[2:] == (None, "text", (scores,))
    merged = merge_output(draw, rest, [scores, kept * 2, scores], 1, True, ((2, None),), dropped=(0,))
    assert type(merged) is list
    assert torch.equal(merged[1], wanted)
    assert merged[0] is None
    assert merged[2] is scores
    assert merge_output(None, hidden, output, 0, True, returned, dropped=(0, 1)) is output
    for other in ((kept, scores), {"hidden": kept, "cache": [None, {"k": scores}]}, Output(kept, loss=scores)):
        with pytest.raises(LTDError, match=r"layers\.1 also returns a tensor .* in slot [13].*`dropped`"):
            merge_output(draw, rest, other, 0, True, ((2, full),), dropped=(2,))
