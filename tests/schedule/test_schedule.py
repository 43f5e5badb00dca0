"""The schedule against DeepSpeed's published facts and hand-computed lengths; its counting, its state, its refusals."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ltd_fx import LTDError, LTDScheduler
from ltd_fx.runtime.state import RouteState


def attached(scheduler, *, seed=0, routed=10, dense=2):
    state = RouteState(scheduler, seed=seed, shared=False, routed=routed, dense=dense)
    scheduler._attach(state)
    return state


def bert():
    scheduler = LTDScheduler(32, 197, 3910, multiple_of=8, global_batch_size=32)
    attached(scheduler)
    return scheduler


def walk(scheduler, steps):
    for _ in range(steps):
        scheduler.step()
    return scheduler


# ---- DeepSpeed's fixed_linear


@pytest.mark.parametrize("total_steps", [200, 10_000])
def test_128_to_2048_by_16_is_121_lengths(total_steps):
    scheduler = LTDScheduler(128, 2048, total_steps, multiple_of=16)
    lengths = [scheduler.length_at(step) for step in range(total_steps + 1)]
    assert sorted(set(lengths)) == list(range(128, 2049, 16))
    assert len(set(lengths)) == 121


def test_lengths_of_a_maximum_that_is_no_multiple():
    scheduler = bert()
    assert scheduler.length_at(0) == 32
    assert scheduler.length_at(3910) == 192
    assert min(step for step in range(5000) if scheduler.length_at(step) == 197) == 3982


def test_layer_tokens():
    scheduler = bert()
    assert scheduler.total_layer_tokens(5474) == 305_784_192
    assert scheduler.consumed_layer_tokens == 0
    assert walk(scheduler, 5474).consumed_layer_tokens == 305_784_192
    scheduler.set_step(5474)
    assert scheduler.consumed_layer_tokens == 305_784_192


@pytest.mark.parametrize("global_batch_size", [None, 1, 7])
def test_layer_tokens_are_those_of_the_steps_taken(global_batch_size):
    scheduler = LTDScheduler(2, 9, 5, kind=lambda step: 2 + step, global_batch_size=global_batch_size)
    attached(scheduler, routed=3, dense=4)
    consumed = 0
    for length in (2, 3, 4, 5, 6, 7, 8, 9, 9, 9):
        assert (scheduler.reserved_length, scheduler.consumed_layer_tokens) == (length, consumed)
        consumed += (global_batch_size or 1) * (length * 3 + 9 * 4)
        scheduler.step()
    assert scheduler.total_layer_tokens(10) == consumed


@pytest.mark.parametrize("count", [lambda s: s.consumed_layer_tokens, lambda s: s.total_layer_tokens(3)])
def test_layer_tokens_need_a_model(count):
    with pytest.raises(LTDError, match=r"layer counts.*ltd_fx\.transform"):
        count(LTDScheduler(2, 8, 4))


STEPS = (0, 1, 36, 50, 64, 81, 99, 100, 10**6)
LENGTHS = {
    "constant": (10, 10, 10, 10, 10, 10, 10, 10, 10),
    "linear": (10, 12, 82, 110, 138, 172, 208, 210, 210),
    "root": (10, 30, 130, 151, 170, 190, 208, 210, 210),
    "cosine": (10, 10, 67, 110, 152, 192, 209, 210, 210),
    "step": (10, 10, 10, 10, 10, 10, 10, 210, 210),
}


@pytest.mark.parametrize("multiple_of", [1, 7])
@pytest.mark.parametrize("kind", LENGTHS)
def test_lengths_of_each_kind(kind, multiple_of):
    """200 tokens above 10: of root at 36 of 100 steps 6/10 of them; of cosine sin(pi/2 * 36/100) ** 2."""
    scheduler = LTDScheduler(10, 210, 100, kind=kind, multiple_of=multiple_of)
    expected = [
        max(length // multiple_of * multiple_of, math.ceil(10 / multiple_of) * multiple_of) for length in LENGTHS[kind]
    ]
    assert [scheduler.length_at(step) for step in STEPS] == expected


def test_degree_is_the_roots():
    lengths = [LTDScheduler(10, 210, 64, kind="root", degree=degree).length_at(16) for degree in (1, 2, 3)]
    assert lengths == [60, 110, 135]


@pytest.mark.parametrize("multiple_of", [1, 8, 50])
@pytest.mark.parametrize("kind", [*LENGTHS, lambda step: step * step, lambda step: -5, lambda step: 10**9])
def test_lengths_never_fall_and_stay_in_bounds(kind, multiple_of):
    scheduler = LTDScheduler(13, 197, 300, kind=kind, multiple_of=multiple_of)
    lengths = [scheduler.length_at(step) for step in range(900)]
    assert lengths == sorted(lengths)
    assert lengths[0] >= 13
    assert lengths[-1] <= 197
    assert all(length % multiple_of == 0 or length == 197 for length in lengths)


def test_a_callable_is_rounded_and_clamped():
    scheduler = LTDScheduler(5, 20, 100, kind=[3, 9, 11, 25].__getitem__, multiple_of=4)
    assert [scheduler.length_at(step) for step in range(4)] == [8, 8, 8, 20]


@pytest.mark.parametrize(
    ("minimum", "maximum", "multiple", "first"), [(5, 20, 4, 8), (8, 20, 4, 8), (5, 6, 16, 6), (1, 9, 4, 4)]
)
def test_the_first_length_is_a_multiple_at_or_above_the_minimum(minimum, maximum, multiple, first):
    assert LTDScheduler(minimum, maximum, 10, multiple_of=multiple).reserved_length == first


# ---- stepping, and what the compiled graph reads


@pytest.mark.parametrize("step", [0, 1, 17, 400])
def test_set_step_is_stepping(step):
    stepped, jumped = bert(), walk(bert(), 23)
    walk(stepped, step)
    jumped.set_step(step)
    assert jumped.reserved_length == stepped.reserved_length == stepped.length_at(step)
    assert jumped.consumed_layer_tokens == stepped.consumed_layer_tokens == stepped.total_layer_tokens(step)
    assert torch.equal(jumped._state.key, stepped._state.key)


def test_every_step_has_a_key_of_its_own():
    scheduler = bert()
    keys = [int(walk(scheduler, 1)._state.key) for _ in range(200)]
    assert len(set(keys)) == 200


def test_the_length_is_the_shape_of_one_zero_byte_tensor():
    scheduler = LTDScheduler(1, 64, 32, multiple_of=8, kind=lambda step: step)
    carriers = []
    for step in range(80):
        carrier = scheduler._lengths[None]._carrier
        assert (carrier.shape, carrier.nbytes) == ((scheduler.length_at(step), 0), 0)
        if not carriers or carriers[-1] is not carrier:
            carriers.append(carrier)
        scheduler.step()
    assert [carrier.shape[0] for carrier in carriers] == list(range(8, 65, 8))


def test_a_compiled_graph_serves_every_length():
    torch._dynamo.reset()
    scheduler = LTDScheduler(2, 64, 62)
    counter = CompileCounter()
    compiled = torch.compile(lambda x: x[: scheduler._lengths[None].tokens(64)] * 2, backend=counter, fullgraph=True)
    for length in range(2, 60):
        assert compiled(torch.ones(64)).shape == (length,)
        scheduler.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("forwards", [0, 3])
def test_state_resumes_step_count_and_draws(forwards):
    scheduler = walk(bert(), 41)
    root = torch.nn.Linear(1, 1)
    for _ in range(forwards):
        scheduler._state.begin_forward(root, (), {})
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    resumed = bert()
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for _ in range(3):
        assert resumed.reserved_length == scheduler.reserved_length
        assert resumed.consumed_layer_tokens == scheduler.consumed_layer_tokens
        assert torch.equal(resumed._state.key, scheduler._state.key)
        for each in (resumed, scheduler):
            each._state.begin_forward(root, (), {})
            each.step()


def test_state_of_an_unattached_scheduler():
    state = walk(LTDScheduler(2, 40, 30, kind="root"), 12).state_dict()
    resumed = LTDScheduler(2, 40, 30, kind="root")
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.reserved_length == resumed.length_at(12)


CONFIG = {"min_length": 2, "max_length": 40, "total_steps": 30, "multiple_of": 1, "degree": 2, "global_batch_size": 4}


@pytest.mark.parametrize("field", [*CONFIG, "kind"])
def test_state_of_another_configuration(field):
    other = {**CONFIG, field: "cosine" if field == "kind" else CONFIG[field] + 1}
    scheduler = walk(LTDScheduler(**CONFIG), 3)
    before = scheduler.state_dict()
    with pytest.raises(LTDError, match=rf"state_dict has {field}={other[field]!r}.* this scheduler {field}="):
        scheduler.load_state_dict(LTDScheduler(**other).state_dict())
    assert scheduler.state_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "7"}, "step"),
        ({"step": -1}, "step"),
        ({"step": None}, "step"),
        ({"config": None}, "config"),
        ({"config": [1]}, "config"),
        ({"config": {}}, "config lacks the field 'degree'"),
        ({"config": {**bert().state_dict()["config"], 3: 1}}, "config has the unknown field 3"),
        ({"draws": {}}, "draws|seed|forward"),
        ({"draws": {"seed": 0}}, "draws|forward"),
        ({"draws": {"seed": 0, "forward": "x"}}, "draws|forward"),
        ({"draws": {"seed": 1, "forward": 0}}, "seed=1.*seed=0"),
        ({"more": 1}, "more"),
    ],
    ids=str,
)
def test_malformed_state_is_refused_and_changes_nothing(change, message):
    scheduler = walk(bert(), 3)
    before, key = scheduler.state_dict(), scheduler._state.key
    with pytest.raises(LTDError, match=message):
        scheduler.load_state_dict({**walk(bert(), 5).state_dict(), **change})
    assert scheduler.state_dict() == before
    assert torch.equal(scheduler._state.key, key)


@pytest.mark.parametrize("state", [None, {}, {"step": 3}, 7])
def test_no_state_at_all(state):
    with pytest.raises(LTDError, match=r"config.*draws.*step"):
        bert().load_state_dict(state)


def test_draws_need_a_model():
    with pytest.raises(LTDError, match=r"ltd_fx\.transform before load_state_dict"):
        LTDScheduler(32, 197, 3910, multiple_of=8, global_batch_size=32).load_state_dict(bert().state_dict())


@pytest.mark.parametrize("clone", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("build", [bert, lambda: LTDScheduler(32, 197, 3910, multiple_of=8)], ids=["attached", "bare"])
def test_copies_are_independent(build, clone):
    scheduler = walk(build(), 100)
    before, carrier, key = (
        scheduler.state_dict(),
        scheduler._lengths[None]._carrier,
        scheduler._state and scheduler._state.key,
    )
    copied = clone(scheduler)
    assert copied.state_dict()["config"] == before["config"]
    assert copied.reserved_length == scheduler.reserved_length
    walk(copied, 1000)
    assert copied.reserved_length == copied.length_at(1100)
    assert scheduler.state_dict() == before
    assert scheduler._lengths[None]._carrier is carrier
    assert (scheduler._state and scheduler._state.key) is key


@pytest.mark.parametrize(
    "name", ["min_length", "max_length", "total_steps", "multiple_of", "degree", "global_batch_size"]
)
@pytest.mark.parametrize("value", [0, -3, 2.0, math.nan, math.inf, True, "8", [8]], ids=repr)
def test_arguments_that_are_no_positive_integers(name, value):
    with pytest.raises(LTDError, match=rf"{name} must be an integer >= 1, got "):
        LTDScheduler(**{**CONFIG, name: value})


def test_minimum_above_maximum():
    with pytest.raises(LTDError, match="min_length=41 is above max_length=40"):
        LTDScheduler(**{**CONFIG, "min_length": 41})


@pytest.mark.parametrize("kind", ["Linear", "", None, 3, ["linear"]])
def test_unknown_kind(kind):
    with pytest.raises(LTDError, match=r"unknown kind .*constant, cosine, linear, root, step"):
        LTDScheduler(**CONFIG, kind=kind)


@pytest.mark.parametrize("result", [None, 3.0, math.nan, True, "5", torch.tensor(4)], ids=repr)
def test_a_callable_that_returns_no_length(result):
    with pytest.raises(LTDError, match=r"kind\(0\) must return an integer length, got "):
        LTDScheduler(**CONFIG, kind=lambda step: result)
    late = LTDScheduler(**CONFIG, kind=lambda step: result if step == 2 else 4)
    with pytest.raises(LTDError, match=r"kind\(2\) must return"):
        late.length_at(2)


@pytest.mark.parametrize("step", [-1, 1.0, True, None, "3"], ids=repr)
@pytest.mark.parametrize("method", ["length_at", "set_step", "total_layer_tokens"])
def test_steps_are_non_negative_integers(method, step):
    with pytest.raises(LTDError, match=r"steps? must be an integer >= 0"):
        getattr(bert(), method)(step)
