"""Packed rows whose documents are told by their boundaries, against dense attention with a mask a document."""

import copy
from typing import Any

import pytest
import torch
from attend import Attention, Stack, block, causal, check_routed
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx.runtime import Draw, RouteState, Site, gather_extra

B, S, D = 2, 16, 16
# a document of one token, and one that is a whole row
LENGTHS = [5, 1, 10, 16]
DOCUMENT = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).view(B, S)


class Varlen(nn.Module):
    """As the kernels do it: all rows in one, each document by itself; ``seq_idx`` shifts what a document adds."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(D)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        rows = x.flatten(0, 1)[None]
        numbers = torch.arange(rows.shape[1])
        of_query, of_key = (torch.bucketize(numbers, kwargs[f"cu_seq_lens_{which}"], right=True) for which in "qk")
        mask = causal(1, rows.shape[1]) & (of_query[:, None] == of_key)
        return x + self.attention(rows, mask).view_as(x) + 0.1 * kwargs["seq_idx"][..., None]


def by_mask(layer: nn.Module, kept: Tensor, args: Any, kwargs: Any) -> Tensor:
    (x,) = args
    mask = causal(B, S) & (DOCUMENT[:, None, :, None] == DOCUMENT[:, None, None])
    found: Tensor = block(layer, kept).attention(x, mask)
    return x + found + 0.1 * DOCUMENT[..., None]


def batch(lengths: list[int]) -> dict[str, Any]:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(B, S)
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))
    boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": S, "max_length_k": S}
    return {"x": x, **boundaries, "seq_idx": number}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltd_fx.learn.patterns._registered", {Varlen: ltd_fx.LayerPattern(hidden="x", output=None)})


@pytest.mark.parametrize("sampling", ["per_sample", "shared"])
def test_boundaries_are_those_of_the_kept_tokens(sampling: str) -> None:
    torch.manual_seed(0)
    inputs = batch(LENGTHS)
    _, _, given = check_routed(Stack(Varlen), inputs, 7, dense=by_mask, example_inputs=None, sampling=sampling)
    assert given["cu_seq_lens_q"].equal(inputs["cu_seq_lens_q"])  # a hook sees all tokens


@pytest.mark.slow
def test_compiled_once_for_any_number_of_documents() -> None:
    torch.manual_seed(0)
    plain = Stack(Varlen).train()
    model, twin = ltd_fx.transform(copy.deepcopy(plain)), ltd_fx.transform(plain)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    for lengths in (LENGTHS, [16, 16], [1, 2, 3, 4, 6, 7, 9], [10, 6, 16]):
        inputs = batch(lengths)
        torch.testing.assert_close(step(**inputs), twin(**inputs))
    assert counter.frame_count <= 2


def test_boundaries_of_another_form_are_refused() -> None:
    state = RouteState(None, seed=0, shared=False, routed=1, dense=0)
    draw = Draw(Site("layers.1", 0, nn.Identity(), state), torch.tensor([[0, 2], [1, 3]]), B, 4)
    assert gather_extra(draw, torch.tensor([0, 1, 4, 8]), "cu_seqlens").tolist() == [0, 1, 2, 4]
    with pytest.raises(ltd_fx.LTDError, match=r"layers\.1: .* lengths \[documents \+ 1\].*shape \(2, 3\)"):
        gather_extra(draw, torch.tensor([[0, 1, 4], [0, 2, 4]]), "cu_seqlens")
