"""Built-in patterns without example inputs, in forwards that cannot test them: they wait for one that can."""

from typing import Any

import pytest
import torch
from conftest import SEQ, decoder, loss_of
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode
from toy import STREAM, Encoder, statuses, warned

import ltd_fx
from ltd_fx import LTDScheduler
from ltd_fx.learn import observe
from ltd_fx.prove import examine

KEEP = 5


class Towers(nn.Module):
    """Two stacks, of which a batch may need one."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Encoder(4), Encoder(4)

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        return self.text(text) if image is None else self.text(torch.cat([self.image(image), text], 1))


def transformed(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return ltd_fx.transform((model or Encoder(4)).train(), LTDScheduler(KEEP, 12, 10), **options)


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_within_a_larger_compiled_program_it_routes_at_once_and_waits(fullgraph: bool) -> None:
    model = transformed()
    run = torch.compile(lambda x: model(x) * 2, fullgraph=fullgraph, backend="aot_eager")
    with warned("cannot be tested within torch.compile of a larger program; pass example_inputs"):
        for _ in range(2):
            run(STREAM)
    assert [rows.shape[1] for rows in ltd_fx.sampled_indices(model).values()] == [KEEP] * 2
    assert statuses(model) == ["to be tested"] * 2
    model(STREAM)
    run(STREAM)
    assert statuses(model) == ["proven"] * 2


def test_past_the_models_own_call_it_routes_and_waits() -> None:
    model = transformed()
    with warned("cannot be tested where the model's forward, or a layer, is called past the model's own call"):
        for _ in range(2):
            model.forward(STREAM)
    assert statuses(model) == ["to be tested"] * 2
    with warned():
        model(STREAM)
    assert statuses(model) == ["proven"] * 2


def test_under_torch_func_it_routes_and_waits() -> None:
    model = transformed()
    parameters = dict(model.named_parameters())

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).sum()

    with warned("cannot be tested within a transformation of torch.func"):
        for _ in range(2):
            vmap(grad(loss), (None, 0))(parameters, STREAM)
    assert statuses(model) == ["to be tested"] * 2
    model(STREAM)
    assert statuses(model) == ["proven"] * 2


def test_it_waits_for_tokens() -> None:
    model = transformed()
    model(STREAM[:, :3])
    assert statuses(model) == ["to be tested"] * 2
    model(STREAM)
    assert statuses(model) == ["proven"] * 2


@pytest.mark.parametrize(("padding", "status"), [(30, "proven"), (SEQ - 4, "to be tested")])
def test_it_waits_for_more_than_padding(padding: int, status: str) -> None:
    ids, mask = torch.randint(0, 64, (2, SEQ)), torch.ones(2, SEQ, dtype=torch.long)
    mask[:, :padding] = 0
    model = ltd_fx.transform(decoder("Llama")().train())
    loss_of(model(input_ids=ids, attention_mask=mask)).backward()
    assert statuses(model) == [status] * 2
    loss_of(model(input_ids=ids, attention_mask=torch.ones_like(mask))).backward()
    assert statuses(model) == ["proven"] * 2


def test_layers_that_a_batch_does_not_need_wait_for_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformed(Towers())
    watched: list[int] = []
    monkeypatch.setattr(examine, "observe", lambda *a, **k: [watched.append(1), observe(*a, **k)][1])
    model(STREAM)
    assert statuses(model) == ["proven"] * 2 + ["to be tested"] * 2
    before = len(watched)
    model(STREAM)
    assert len(watched) == before > 0
    model(STREAM, STREAM)
    assert statuses(model) == ["proven"] * 4


def test_what_the_user_counts_is_not_counted_twice() -> None:
    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(STREAM)
        return counter.get_total_flops()

    assert flops(transformed()) == flops(transformed(example_inputs=(STREAM,))) > 0
