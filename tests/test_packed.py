"""Packed rows whose documents are told by their boundaries, against dense attention with a mask a document."""

from typing import Any

import pytest
import torch
from attend import Attention, Stack, block, causal, check_routed
from torch import Tensor, nn

import ltd_fx

B, S, D = 2, 16, 16
# a document of one token, and one that is a whole row
LENGTHS = [5, 1, 10, 16]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
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


@pytest.mark.parametrize("sampling", ["per_sample", "shared"])
def test_boundaries_are_those_of_the_kept_tokens(sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltd_fx.patterns._registered", {Varlen: ltd_fx.LayerPattern(hidden="x", output=None)})
    inputs = {
        "x": torch.randn(B, S, D, generator=torch.Generator().manual_seed(0)),
        **{"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 16, "max_length_k": 16, "seq_idx": DOCUMENT},
    }
    torch.manual_seed(0)
    _, _, given = check_routed(Stack(Varlen), inputs, 7, dense=by_mask, example_inputs=None, sampling=sampling)
    assert given["cu_seq_lens_q"].equal(ENDS)  # a hook sees all tokens
