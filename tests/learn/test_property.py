"""Layers of any signature, learnt from example inputs, against their dense copies with the dropped keys blocked."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attend import Attention, check_routed, tables
from torch import Tensor, nn

pytest.importorskip("hypothesis")
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st


@dataclass(frozen=True)
class Spec:
    """A layer's signature, and a call of it; ``mask`` says whether it has a batch and heads of its own."""

    batch: int
    seq: int
    heads: int
    head_size: int
    keep: int
    mask: tuple[bool, bool] | None = None
    padding: bool = False
    rope: str = ""
    token: bool = False
    sample: bool = False
    positions: bool = False
    keywords: bool = False
    batch_first: bool = True
    shared: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def dim(self) -> int:
        return self.heads * self.head_size


class Layer(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.batch_first = spec.batch_first
        self.attention = Attention(spec.dim, spec.heads)
        self.embedding, self.style = nn.Embedding(spec.seq, spec.dim), nn.Linear(spec.dim, spec.dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        token: Tensor | None = None,
        sample: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        inner = x if self.batch_first else x.transpose(0, 1)
        if positions is not None:
            inner = inner + self.embedding(positions)
        if token is not None:
            inner = inner * token
        if sample is not None:
            inner = inner + self.style(sample)[:, None]
        if padding is not None:
            ignored = torch.zeros(padding.shape, dtype=x.dtype).masked_fill(padding, -1e30)[:, None, None]
            mask = ignored if mask is None else mask + ignored
        out = self.attention(inner, mask, rope)
        return x + (out if self.batch_first else out.transpose(0, 1))


class Model(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.keywords = spec.keywords
        self.layers = nn.ModuleList(Layer(spec) for _ in range(3))

    def forward(
        self,
        x: Any,
        mask: Any = None,
        padding: Any = None,
        rope: Any = None,
        token: Any = None,
        sample: Any = None,
        positions: Any = None,
    ) -> Tensor:
        given = {"mask": mask, "padding": padding, "rope": rope, "token": token, "sample": sample}
        given["positions"] = positions
        for layer in self.layers:
            x = (
                layer(x=x, **{k: v for k, v in given.items() if v is not None})
                if self.keywords
                else layer(x, *given.values())
            )
        return x


def arguments(spec: Spec) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=spec.dtype)

    batch, seq = spec.batch, spec.seq
    found: dict[str, Any] = {"x": noise(batch, seq, spec.dim) if spec.batch_first else noise(seq, batch, spec.dim)}
    if spec.mask is not None:
        shape = (batch if spec.mask[0] else 1, spec.heads if spec.mask[1] else 1, seq, seq)
        hidden = (noise(*shape) > 0.5) & ~torch.eye(seq, dtype=torch.bool)
        found["mask"] = noise(*shape).masked_fill(hidden, -1e30)
    if spec.padding:
        found["padding"] = torch.zeros(batch, seq, dtype=torch.bool)
        found["padding"][0, -1] = spec.batch > 1
    if spec.rope:
        places = torch.arange(seq, dtype=spec.dtype)
        rows = {"batch": batch, "one": 1}.get(spec.rope)
        places = places if rows is None else places + 3 * torch.arange(rows)[:, None]
        found["rope"] = tables(places, spec.head_size)
    if spec.token:
        found["token"] = noise(batch, seq, spec.dim)
    if spec.sample:
        found["sample"] = noise(batch, spec.dim)
    if spec.positions:
        found["positions"] = torch.rand(batch, seq, generator=draws).argsort(1)
    return found


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    batch, seq, shared, heads = (
        draw(s) for s in (st.integers(1, 4), st.integers(4, 9), st.booleans(), st.integers(1, 3))
    )
    return Spec(
        batch=batch,
        seq=seq,
        heads=heads,
        # not S = D, nor S = B with tables [S, D]: all arguments are the model's inputs, and which
        # dimensions are the sequence would be a guess
        head_size=draw(st.sampled_from([4, 6, 8]).filter(lambda d: seq not in (d, d * heads))),
        keep=draw(st.integers(1, seq - 1)),
        mask=draw(st.none() | st.tuples(st.booleans(), st.booleans())),
        padding=draw(st.booleans()),
        rope=draw(st.sampled_from(["", "batch", "one", *["flat"] * (shared and batch != seq)])),
        token=draw(st.booleans()),
        sample=draw(st.booleans()),
        positions=draw(st.booleans()),
        keywords=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        shared=shared,
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


# without shrinking, which takes minutes: an example is small anyway
@settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
@given(specs())
@example(Spec(batch=4, seq=4, heads=2, head_size=6, keep=3, mask=(True, True), rope="batch", token=True, sample=True))
@example(Spec(batch=4, seq=4, heads=1, head_size=6, keep=2, padding=True, positions=True, sample=True))
@example(Spec(batch=1, seq=8, heads=2, head_size=4, keep=1, mask=(False, False), rope="one", shared=True))
@example(Spec(batch=4, seq=4, heads=3, head_size=8, keep=3, mask=(True, True), padding=True, batch_first=False))
def test_a_routed_layer_equals_its_dense_copy_with_dropped_keys_blocked(spec: Spec) -> None:
    torch.manual_seed(0)
    inputs = arguments(spec)
    output, *_ = check_routed(  # the values
        Model(spec).to(spec.dtype),
        inputs,
        spec.keep,
        batch_first=spec.batch_first,
        real=~inputs["padding"] if spec.padding else None,
        tolerance=1e-5 if spec.dtype == torch.float32 else 1e-11,
        sampling="shared" if spec.shared else "per_sample",
    )
    assert (output.shape, output.dtype) == (inputs["x"].shape, spec.dtype)
