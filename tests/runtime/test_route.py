"""The split/merge pair against torch indexing, values and gradients, and what it costs the backward pass."""

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltd_fx import LTDError
from ltd_fx.runtime.records import Draw, Site
from ltd_fx.runtime.split_merge import merge_output, merge_tokens, split_hidden, split_tokens
from ltd_fx.runtime.state import RouteState

BATCH, SEQ, DIM = 3, 6, 4
INDICES = torch.tensor([[0, 2, 5], [1, 2, 3], [2, 4, 5]])
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False], ids=["BSD", "SBD"])


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hidden_of(batch_first, seq_len=SEQ, grad=True, **options):
    return randn(*((BATCH, seq_len) if batch_first else (seq_len, BATCH)), DIM, **options).requires_grad_(grad)


def draw_of(indices=INDICES):
    state = RouteState(None, seed=0, shared=indices.shape[0] == 1, routed=1, dense=0)
    return Draw(Site("layers.1", 0, nn.Identity(), state), indices, BATCH, SEQ)


def layer(hidden, weight, batch_first):
    """Mixes tokens of a sequence, so that a gradient at the wrong place shows."""
    mixed = hidden.cumsum(1 if batch_first else 0) @ weight
    return mixed.sin() * hidden


def routed(hidden, indices, weight, batch_first):
    rest, kept = split_tokens(hidden, indices, batch_first)
    return merge_tokens(rest, indices, layer(kept, weight, batch_first), batch_first)


def plain(hidden, indices, weight, batch_first):
    """The same with torch indexing and its own gradients."""
    rows = torch.arange(indices.shape[0])[:, None]
    at = (rows, indices) if batch_first else (indices.T, rows.T)
    return hidden.index_put(at, layer(hidden[at], weight, batch_first))


def with_residual(function):
    return lambda hidden, *args: hidden + function(hidden, *args)


@LAYOUTS
@pytest.mark.parametrize("around", [lambda function: function, with_residual], ids=["bare", "residual"])
@pytest.mark.parametrize("indices", [INDICES, INDICES.int(), INDICES[:, :0], torch.arange(SEQ).expand(BATCH, SEQ)])
def test_equals_torch_indexing(indices, around, batch_first):
    hidden, weight = hidden_of(batch_first), randn(DIM, DIM, seed=1).requires_grad_()
    out, expected = (around(function)(hidden, indices, weight, batch_first) for function in (routed, plain))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    grads, expected_grads = (torch.autograd.grad(each.cos().sum(), (hidden, weight)) for each in (out, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-14, atol=1e-14)


@LAYOUTS
def test_gradcheck(batch_first):
    def function(hidden, weight):
        return with_residual(routed)(hidden, INDICES, weight, batch_first)

    args = hidden_of(batch_first), randn(DIM, DIM, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


@LAYOUTS
def test_func_grad_and_per_sample_gradients(batch_first):
    weight = randn(DIM, DIM, seed=1)
    hidden = torch.stack([hidden_of(batch_first, seed=seed, grad=False) for seed in range(4)], dim=1)
    indices = torch.stack([INDICES, INDICES.flip(0), INDICES.roll(1, 0), INDICES])

    def loss(function):
        return lambda weight, hidden, indices: with_residual(function)(hidden, indices, weight, batch_first).cos().sum()

    first = weight, hidden[:, 0], indices[0]
    torch.testing.assert_close(torch.func.grad(loss(routed))(*first), torch.func.grad(loss(plain))(*first))
    args, in_dims = (weight, hidden, indices), (None, 1, 0)
    for argnums in (0, 1):
        per_sample = torch.vmap(torch.func.grad(loss(routed), argnums), in_dims)(*args)
        each = [torch.func.grad(loss(plain), argnums)(weight, hidden[:, i], indices[i]) for i in range(4)]
        torch.testing.assert_close(per_sample, torch.stack(each))
    shared = torch.vmap(torch.func.grad(loss(routed), 1), (None, 1, None))(weight, hidden, INDICES)
    each = [torch.func.grad(loss(plain), 1)(weight, hidden[:, i], INDICES) for i in range(4)]
    torch.testing.assert_close(shared, torch.stack(each))


@LAYOUTS
def test_compiled_in_one_graph_with_the_same_gradients(batch_first):
    torch._dynamo.reset()
    hidden, weight = hidden_of(batch_first), randn(DIM, DIM, seed=1)
    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)
    out, expected = (function(hidden, INDICES, weight, batch_first) for function in (compiled, plain))
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(each.cos().sum(), hidden)[0] for each in (out, expected)]
    torch.testing.assert_close(*grads)


@LAYOUTS
def test_unread_outputs_have_zero_gradient(batch_first):
    ones = torch.zeros(BATCH, SEQ, DIM, dtype=torch.float64).scatter(1, INDICES[..., None].expand(-1, -1, DIM), 1.0)
    hidden = hidden_of(batch_first)
    rest, kept = split_tokens(hidden, INDICES, batch_first)
    (grad,) = torch.autograd.grad(kept.sum(), hidden, retain_graph=True)
    assert torch.equal(grad, ones if batch_first else ones.transpose(0, 1))
    merged = merge_tokens(rest, INDICES, kept.detach(), batch_first)
    (grad,) = torch.autograd.grad(merged.sum(), hidden)
    assert torch.equal(grad, 1 - (ones if batch_first else ones.transpose(0, 1)))


def test_only_the_indices_are_saved():
    saved = []
    hidden, kept_grad = hidden_of(True), torch.zeros(BATCH, 3, DIM, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        rest, kept = split_tokens(hidden, INDICES, True)
        merge_tokens(rest, INDICES, kept + kept_grad, True)
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} == {INDICES.untyped_storage().data_ptr()}
    assert max(tensor.nbytes for tensor in saved) == INDICES.nbytes


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called[function] += 1
        return function(*args, **(kwargs or {}))


def test_backward_is_one_gather_and_one_scatter():
    hidden = hidden_of(True)
    rest, kept = split_tokens(hidden, INDICES, True)
    out = merge_tokens(rest, INDICES, kept, True)
    gradient = torch.ones_like(out)
    with Operators() as operators:
        torch.autograd.grad(out, hidden, gradient)
    called = {name: count for name, count in operators.called.items() if not name.is_view}
    assert called == {torch.ops.ltd_fx.gather_tokens.default: 1, torch.ops.ltd_fx.scatter_tokens.default: 1}


@LAYOUTS
def test_incoming_gradients_and_inputs_are_left_as_they_were(batch_first):
    hidden = hidden_of(batch_first)
    out = routed(hidden, INDICES, randn(DIM, DIM, seed=1), batch_first)
    tensors = [hidden.detach(), out.detach(), torch.ones_like(out)]
    before = [tensor.clone() for tensor in tensors]
    torch.autograd.grad(out, hidden, tensors[-1])
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))


# ---- what the rewritten graphs call


@LAYOUTS
@pytest.mark.parametrize("indices", [INDICES, INDICES[:1]], ids=["per_sample", "shared"])
def test_split_and_merge_of_a_draw(indices, batch_first):
    hidden = hidden_of(batch_first)
    rest, kept = split_hidden(draw_of(indices), hidden, batch_first)
    out = merge_output(draw_of(indices), rest, kept.exp(), None, batch_first)
    bsd = hidden if batch_first else hidden.transpose(0, 1)
    expected = bsd.clone()
    for b, row in enumerate(indices.expand(BATCH, -1).tolist()):
        expected[b, row] = bsd[b, row].exp()
    torch.testing.assert_close(out, expected if batch_first else expected.transpose(0, 1), rtol=0, atol=0)


def test_without_a_draw_everything_passes_through():
    hidden, output = hidden_of(True), (object(), object())
    rest, kept = split_hidden(None, hidden, True)
    assert rest is hidden
    assert kept is hidden
    assert merge_output(None, rest, output, 0, True) is output


@LAYOUTS
def test_merge_casts_to_the_streams_dtype(batch_first):
    hidden = hidden_of(batch_first, dtype=torch.float32)
    rest, kept = split_hidden(draw_of(), hidden, batch_first)
    low = kept.bfloat16()
    low.retain_grad()
    out = merge_output(draw_of(), rest, low, 0, batch_first)
    out.sum().backward()
    assert (out.dtype, low.grad.dtype, hidden.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert torch.equal(split_tokens(out, INDICES, batch_first)[1], low.float())


Output = collections.namedtuple("Output", "states cache")


@pytest.mark.parametrize(
    ("output_of", "slot"),
    [
        (lambda kept: (kept, None, "cache"), 0),
        (lambda kept: ["cache", kept], 1),
        (lambda kept: Output(kept, "cache"), 0),
    ],
    ids=["tuple", "list", "namedtuple"],
)
def test_merge_into_the_slot_of_a_sequence(output_of, slot):
    hidden = hidden_of(True)
    rest, kept = split_hidden(draw_of(), hidden, True)
    output = output_of(kept * 2)
    out = merge_output(draw_of(), rest, output, slot, True)
    assert type(out) is type(output)
    assert [item for i, item in enumerate(out) if i != slot] == [item for i, item in enumerate(output) if i != slot]
    assert torch.equal(out[slot], plain_doubled(hidden))


def plain_doubled(hidden):
    rows = torch.arange(BATCH)[:, None]
    return hidden.index_put((rows, INDICES), hidden[rows, INDICES] * 2)


KEPT = torch.zeros(BATCH, 3, DIM, dtype=torch.float64)


@pytest.mark.parametrize(
    ("output", "slot", "message"),
    [
        ((KEPT,), None, r"layers\.1 returned a tuple, .* output=None"),
        ((None, KEPT), 2, r"layers\.1 returned a tuple, .* output=2"),
        (object(), 0, r"layers\.1 returned a object, .* output=0"),
        (None, 0, r"layers\.1 returned a NoneType"),
        ((KEPT, torch.zeros(BATCH, 2, 3, 3)), 0, r"layers\.1 also returns a tensor of shape \(3, 2, 3, 3\) in slot 1"),
        ((torch.zeros(7), KEPT), 1, r"layers\.1 also returns a tensor of shape \(7,\) in slot 0"),
        ((None, KEPT), 0, r"layers\.1 .*slot 1|layers\.1 .*output=0"),
    ],
)
def test_outputs_that_cannot_be_merged(output, slot, message):
    with pytest.raises(LTDError, match=message):
        merge_output(draw_of(), hidden_of(True), output, slot, True)
