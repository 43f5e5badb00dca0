"""``LTDScheduler(relative=True)``: the reserved length as a share of each batch's sequence length."""

import io
import warnings
from typing import Any

import pytest
import torch
from conftest import CASES, SEQ
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from toy import PATTERN, Block, Net

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


@pytest.fixture(autouse=True)
def _known_block() -> None:
    ltd_fx.register_pattern(Block, PATTERN)


def net(scheduler: LTDScheduler, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return ltd_fx.transform(Net(), scheduler, **options)


def stream(batch: int, seq_len: int) -> Tensor:
    return torch.randn(batch, seq_len, 8, generator=torch.Generator().manual_seed(1))


def kept(model: nn.Module) -> list[int]:
    return [indices.shape[1] for indices in ltd_fx.sampled_indices(model).values()]


@pytest.mark.parametrize(
    ("seq_len", "expected"), [(2, 1), (3, 1), (7, 3), (10, 5), (16, 8), (20, 10), (33, 16), (400, 200)]
)
def test_half_of_any_length(seq_len: int, expected: int) -> None:
    """8 of 16 tokens, in proportion; the layers change so many rows, and none is warned of that is longer than 16."""
    model, changed = net(LTDScheduler(8, 16, 9, kind="constant", relative=True)), []
    model.blocks[1].register_forward_hook(lambda _, args, out: changed.append((out[0] != args[0]).any(-1).sum(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "ltd_fx: the pattern registered for Block is trusted")  # no token attends
        model(stream(3, seq_len))
    assert changed[0].tolist() == [expected] * 3
    assert kept(model) == [expected] * 2


@pytest.mark.parametrize("seq_len", [1, 5, 16, 40])
def test_dense_from_max_length_on_whatever_the_length(seq_len: int) -> None:
    scheduler = LTDScheduler(4, 16, 9, kind="step", relative=True)
    model, plain, inputs = net(scheduler), ltd_fx.restore(net(LTDScheduler(4, 16, 9))), stream(2, seq_len)
    assert torch.equal(model(inputs), plain(inputs)) == (seq_len == 1)
    scheduler.set_step(9)
    assert torch.equal(model(inputs), plain(inputs))


def test_without_it_lengths_are_tokens() -> None:
    model = net(LTDScheduler(8, 16, 9, kind="constant"))
    for seq_len, expected in ((7, 7), (9, 8), (16, 8)):
        model(stream(2, seq_len))
        assert kept(model) == [expected] * 2


def test_shares_of_layers_and_stacks_of_different_lengths() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Net(), Net()

        def forward(self, long: Tensor, short: Tensor) -> Tensor:
            return self.encoder(long).mean() + self.decoder(short).mean()

    scheduler = LTDScheduler(8, 32, 2, relative=True)
    model = ltd_fx.transform(Pair(), scheduler, keep={"encoder.blocks.2": 0.5})
    for expected in ([15, 30, 5, 5], [37, 45, 12, 12], [60, 60, 20, 20]):
        model(stream(2, 60), stream(2, 20))
        assert kept(model) == expected
        scheduler.step()


def test_as_many_as_are_protected_must_fit_the_batch() -> None:
    model = net(LTDScheduler(8, 16, 9, relative=True), protect=4)
    model(stream(2, 8))
    with pytest.raises(LTDError, match="a reserved length of 3 cannot hold the 4 protected tokens"):
        model(stream(2, 6))


def test_it_is_part_of_the_state() -> None:
    scheduler = LTDScheduler(4, 16, 9, relative=True)
    model = net(scheduler)
    scheduler.set_step(3)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    expected = [model(stream(2, seq_len)) for seq_len in (9, 12)]
    other = LTDScheduler(4, 16, 9, relative=True)
    resumed = net(other)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert all(torch.equal(resumed(stream(2, n)), want) for n, want in zip((9, 12), expected, strict=True))
    whole = torch.load(io.BytesIO(_pickled(model)), weights_only=False)
    whole(stream(2, 9))
    assert kept(whole) == [9 * other.reserved_length // 16] * 2
    with pytest.raises(LTDError, match="relative=True, this scheduler relative=False"):
        LTDScheduler(4, 16, 9).load_state_dict({**scheduler.state_dict(), "draws": None})
    with pytest.raises(LTDError, match="relative must be True or False, got 1"):
        LTDScheduler(4, 16, 9, relative=1)


def _pickled(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


SIZES = ((2, 16), (3, 24), (4, 40), (5, 17), (2, 64), (7, 33))


def graphs(model: nn.Module, scheduler: LTDScheduler, name: str, dynamic: bool | None, steps: tuple[int, ...]) -> int:
    """Compiled over batches of every size at every length; results are those of the model run eagerly."""
    used: set[Any] = set()  # not those compiled: one may be thrown away for another at once

    def backend(graph: Any, inputs: Any) -> Any:
        function = lookup_backend("aot_eager")(graph, inputs)
        return lambda *args: (used.add(function), function(*args))[1]

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for step in steps:
        for batch, seq_len in SIZES:
            inputs = stream(batch, seq_len) if name == "stream" else torch.zeros(batch, seq_len, dtype=torch.long)
            outputs = []
            for run in (compiled, model):
                scheduler.set_step(step)
                outputs.append(run(**{name: inputs}))
            ours, theirs = (out if name == "stream" else out.logits for out in outputs)
            torch.testing.assert_close(ours, theirs)
    return len(used)


@pytest.mark.parametrize("relative", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("dynamic", "most"), [(True, 2), (None, 3)])
def test_graphs_over_batch_sizes_sequence_lengths_and_reserved_lengths(
    dynamic: bool | None, most: int, relative: bool
) -> None:
    """One routed and one dense; and without ``dynamic``, one for the sizes of the first batch alone."""
    scheduler = LTDScheduler(8, 64, 5, relative=relative)
    assert graphs(net(scheduler), scheduler, "stream", dynamic, (0, 3, 5)) == most


@pytest.mark.slow
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("dynamic", "most"), [(True, 2), (None, 3)])
def test_graphs_of_a_llama(dynamic: bool | None, most: int, relative: bool) -> None:
    scheduler = LTDScheduler(8, SEQ, 5, relative=relative)
    model = ltd_fx.transform(CASES["llama"].model(), scheduler)
    assert graphs(model, scheduler, "input_ids", dynamic, (0, 3, 5)) == most
