"""DeepSpeed's surface against the dense layer whose dropped keys the mask blocks."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ltd_fx import LTDError, LTDScheduler, transform
from ltd_fx.deepspeed import (
    RandomLayerTokenDrop,
    convert_to_random_ltd,
    remove_random_ltd_state_dict,
    save_without_random_ltd,
)

BATCH, SEQ, DIM, KEEP = 3, 10, 8, 4


class Layer(nn.Module):
    """Attention over ``[B, S, D]`` or ``[S, B, D]``; returns a tensor, or a tuple with something after it."""

    def __init__(self, batch_first=True, returns_tuple=False):
        super().__init__()
        self.batch_first, self.returns_tuple = batch_first, returns_tuple
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, ltd_mask=None):
        bsd = x if self.batch_first else x.transpose(0, 1)
        q, k, v = self.qkv(bsd)[:, None].chunk(3, -1)
        mask = ltd_mask if ltd_mask is None or ltd_mask.ndim == 4 else ltd_mask[:, None, None]
        out = bsd + self.out(scaled_dot_product_attention(q, k, v, mask)[:, 0])
        out = out if self.batch_first else out.transpose(0, 1)
        return (out, None, "cache") if self.returns_tuple else out


def layer_of(**options):
    torch.manual_seed(0)
    return Layer(**options).double()


def hidden_of(batch_first=True):
    hidden = torch.randn(BATCH, SEQ, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (hidden if batch_first else hidden.transpose(0, 1).contiguous()).requires_grad_()


def padding():
    """True where a token may be looked at; the first always may."""
    allowed = torch.ones(BATCH, SEQ, dtype=torch.bool)
    allowed[1, 7:], allowed[2, 1:3] = False, False
    return allowed


MASKS = {
    "encoder without a mask": lambda: None,
    "encoder": lambda: padding()[:, None, None].expand(BATCH, 1, SEQ, SEQ),
    "encoder 2-D": padding,
    "encoder broadcast": lambda: padding()[:, None, None],
    "decoder": lambda: torch.ones(SEQ, SEQ, dtype=torch.bool).tril()[None, None],
    "decoder padded": lambda: torch.ones(SEQ, SEQ, dtype=torch.bool).tril() & padding()[:, None, None],
}


def scheduler_of(length=KEEP, **options):
    return LTDScheduler(length, SEQ, 10, kind="constant", **options)


def wrapped(layer, scheduler=None, layer_id=1, **config):
    wrapper = RandomLayerTokenDrop(layer)
    wrapper.init_config({"model_mask_name": "ltd_mask", **config}, scheduler or scheduler_of(), layer_id)
    return wrapper


def tensor_of(output):
    return output[0] if isinstance(output, tuple) else output


def flip(value, batch_first):
    return value if batch_first else value.transpose(0, 1)


def kept_by(out, hidden, batch_first=True):
    """``[B, S]``, True where the layer changed its input."""
    return flip((out != hidden).any(-1), batch_first).detach()


def reference(layer, hidden, kept, mask, batch_first):
    """The dense layer at the kept rows, with the keys of the others blocked; the input at the others."""
    allowed = torch.ones(SEQ, dtype=torch.bool) if mask is None else mask[:, None, None] if mask.ndim == 2 else mask
    blocked = kept[:, None, None] & allowed
    return torch.where(flip(kept, batch_first)[..., None], tensor_of(layer(hidden, ltd_mask=blocked)), hidden)


@pytest.mark.parametrize("returns_tuple", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_seq_dim", "seq_batch_dim"])
@pytest.mark.parametrize("kind", MASKS)
def test_equals_the_dense_layer_with_dropped_keys_blocked(kind, batch_first, returns_tuple):
    options = {"batch_first": batch_first, "returns_tuple": returns_tuple}
    layer, hidden, mask = layer_of(**options), hidden_of(batch_first), MASKS[kind]()
    order = "batch_seq_dim" if batch_first else "seq_batch_dim"
    wrapper = wrapped(layer_of(**options), hidden_state_order=order, model_type=kind.split()[0])
    result = wrapper(hidden, ltd_mask=mask)
    assert not returns_tuple or result[1:] == (None, "cache")
    out = tensor_of(result)
    assert torch.equal(tensor_of(wrapper(hidden, mask)), out)
    kept = kept_by(out, hidden, batch_first)
    assert kept.sum(1).tolist() == [KEEP] * BATCH
    assert len(set(map(tuple, kept.tolist()))) > 1

    expected = reference(layer, hidden, kept, mask, batch_first)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(flip(out, batch_first)[~kept], flip(hidden, batch_first)[~kept])

    for around in (lambda out: out, lambda out: hidden + out):
        each = [
            torch.autograd.grad(around(value).cos().sum(), (hidden, *module.parameters()), retain_graph=True)
            for value, module in ((out, wrapper), (expected, layer))
        ]
        torch.testing.assert_close(*each, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomLayerTokenDrop(layer_of()),
        lambda: wrapped(layer_of()).eval(),
        lambda: wrapped(layer_of(), scheduler_of(SEQ)),
    ],
    ids=["before init_config", "eval", "full length"],
)
def test_passes_through_bit_for_bit(make):
    mask = MASKS["decoder padded"]()
    assert torch.equal(make()(hidden_of(), ltd_mask=mask), layer_of()(hidden_of(), ltd_mask=mask))


def test_the_scheduler_moves_length_and_draws():
    scheduler = LTDScheduler(2, SEQ, 8)
    wrappers = [wrapped(layer_of(), scheduler, layer_id) for layer_id in (3, 4)]
    drawn = []
    for length in (2, 3, 4, 5, 6, 7, 8, 9):
        for wrapper in wrappers:
            kept = kept_by(wrapper(hidden_of(), ltd_mask=padding()), hidden_of())
            assert kept.sum(1).tolist() == [length] * BATCH
            drawn.append(tuple(kept.flatten().tolist()))
        scheduler.step()
    assert len(set(drawn)) == len(drawn)
    assert torch.equal(wrappers[0](hidden_of(), ltd_mask=padding()), layer_of()(hidden_of(), ltd_mask=padding()))


class Model(nn.Module):
    def __init__(self, depth=5):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x, mask=None):
        states = [self.embed(x)]
        for layer in self.layers:
            states.append(layer(states[-1], ltd_mask=mask))
        return states


def lengths(model):
    """How many tokens each layer changed."""
    states = model(torch.randn(2, SEQ, DIM))
    return [int(kept_by(after, before).sum(1).float().mean()) for before, after in itertools.pairwise(states)]


@pytest.mark.parametrize("around", [lambda model: model, nn.DataParallel], ids=["model", "wrapped"])
@pytest.mark.parametrize(("config", "routed"), [({}, [1, 2, 3]), ({"random_ltd_layer_id": [0, 3]}, [0, 3])])
def test_convert_by_class(around, config, routed):
    model = Model()
    scheduler = scheduler_of(global_batch_size=2)
    converted = around(model)
    assert convert_to_random_ltd(converted, Layer, scheduler, {"model_mask_name": "ltd_mask", **config}) is converted
    assert all(type(layer) is RandomLayerTokenDrop for layer in model.layers)
    assert lengths(model) == [KEEP if i in routed else SEQ for i in range(5)]
    scheduler.step()
    assert scheduler.consumed_layer_tokens == 2 * (KEEP * len(routed) + SEQ * (5 - len(routed)))


def test_each_forward_of_a_converted_model_has_its_own_draws():
    model = convert_to_random_ltd(Model(), Layer, scheduler_of(), {})
    drawn = []
    for _ in range(6):
        states = model(torch.ones(1, SEQ, DIM) + torch.randn(SEQ, DIM))
        drawn += [tuple(kept_by(states[i + 1], states[i])[0].tolist()) for i in (1, 2, 3)]
    assert len(set(drawn)) > 12  # of 210 subsets: some may come twice by chance


def test_without_a_scheduler_the_layers_are_only_wrapped():
    model = convert_to_random_ltd(Model(), Layer)
    assert lengths(model) == [SEQ] * 5
    model.layers[2].init_config({}, scheduler_of(), 2)
    assert lengths(model) == [SEQ, SEQ, KEEP, SEQ, SEQ]


def test_saved_keys_are_the_plain_models():
    plain = Model().state_dict()
    model = convert_to_random_ltd(Model(), Layer, scheduler_of(), {})
    assert model.state_dict().keys() != plain.keys()
    wrapped_states = save_without_random_ltd(model), save_without_random_ltd(nn.DataParallel(model))
    for state in (*wrapped_states, remove_random_ltd_state_dict(model.state_dict())):
        assert state.keys() == plain.keys()
        assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_a_submodule_called_module_is_the_models_own():
    for others in ({}, {"head": nn.Linear(DIM, 2)}):
        model = nn.ModuleDict({"module": Model(), **others})
        assert save_without_random_ltd(model).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_state_order": "bsd"}, "hidden_state_order must be one of batch_seq_dim, seq_batch_dim, got 'bsd'"),
        ({"model_type": "diffusion"}, "model_type must be one of encoder, decoder, got 'diffusion'"),
        ({"max_tokens": 3}, "unknown key 'max_tokens'"),
        ({"model_mask_name": "attention_mask"}, "'attention_mask'"),
    ],
    ids=str,
)
def test_configuration_that_is_refused(config, message):
    wrapper, scheduler = RandomLayerTokenDrop(layer_of()), scheduler_of()
    with pytest.raises(LTDError, match=message):
        wrapper.init_config({"random_ltd_layer_num": 10, **config}, scheduler, 0)
    assert not scheduler.attached
    assert torch.equal(wrapper(hidden_of()), layer_of()(hidden_of()))
    model = Model()
    with pytest.raises(LTDError, match=message):
        convert_to_random_ltd(model, Layer, scheduler, config)
    assert model.state_dict().keys() == Model().state_dict().keys()


def test_configured_twice():
    wrapper = wrapped(layer_of())
    with pytest.raises(LTDError, match="layer 5 is configured already"):
        wrapper.init_config({}, scheduler_of(), 5)


def transformed_elsewhere():
    scheduler = scheduler_of()
    transform(nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 2, 8, batch_first=True), 3), scheduler)
    return scheduler


@pytest.mark.parametrize(
    ("layer_class", "scheduler", "ids", "message"),
    [
        (nn.LSTM, scheduler_of, [1], "matches nothing in the model"),
        (Layer, scheduler_of, [1, 5], "5.* 0 to 4"),
        (Layer, scheduler_of, [-1], "-1"),
        (Layer, scheduler_of, ["1"], "'1'"),
        (Layer, transformed_elsewhere, [1], "drives a transformed model"),
    ],
)
def test_a_refused_conversion_changes_nothing(layer_class, scheduler, ids, message):
    model, before = Model(), list(map(type, Model().modules()))
    with pytest.raises(LTDError, match=message):
        convert_to_random_ltd(model, layer_class, scheduler(), {"random_ltd_layer_id": ids})
    assert list(map(type, model.modules())) == before


def test_a_layer_without_a_graph_is_refused_before_any_is_wrapped():
    class KeywordOnly(Layer):
        def forward(self, hidden_states, *, scale):
            return hidden_states * scale

    model = Model()
    model.layers[2] = KeywordOnly()
    with pytest.raises(LTDError, match="keyword-only argument 'scale'"):
        convert_to_random_ltd(model, Layer, scheduler_of())
    assert not any(isinstance(module, RandomLayerTokenDrop) for module in model.modules())


def test_a_model_converted_twice_is_refused_and_stays_as_it_was():
    model = convert_to_random_ltd(Model(), Layer, scheduler_of(), {})
    before = list(model.state_dict())
    with pytest.raises(LTDError, match="already"):
        convert_to_random_ltd(model, Layer, scheduler_of(), {})
    assert list(model.state_dict()) == before
