"""Graphs that break, layers that mix, and models that are none: routed rightly, or refused with the user's line."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import HEADS, LENGTH, Block, D, Net, TakesBoth, TwoResults, words
from test_backend import step, whole
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


def broken(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


class TwoHalves(Net):
    def forward(self, ids: Tensor) -> Tensor:
        x, places = self.embed(ids), torch.arange(ids.shape[1])
        rope, mask = (
            (places[None, :, None] * 0.1).cos().expand(1, -1, D // HEADS),
            (places[:, None] >= places)[None, None],
        )
        x = self.layers[1](self.layers[0](x, rope, mask), rope, mask)
        torch._dynamo.graph_break()
        return self.head(self.layers[3](self.layers[2](x, rope, mask), rope, mask))


class BrokenLoop(Net):
    def forward(self, ids: Tensor) -> Tensor:
        x, places = self.embed(ids), torch.arange(ids.shape[1])
        rope, mask = (
            (places[None, :, None] * 0.1).cos().expand(1, -1, D // HEADS),
            (places[:, None] >= places)[None, None],
        )
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x, rope, mask)
        return self.head(x)


@pytest.mark.slow
@pytest.mark.parametrize("make", [TwoHalves, BrokenLoop])
def test_a_forward_of_several_graphs_draws_as_one(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().train()
    twin, schedulers = copy.deepcopy(model), [LTDScheduler(5, LENGTH, 4) for _ in range(2)]
    ltd_fx.transform(twin, schedulers[1], example_inputs=(words(LENGTH),))
    backend = ltd_fx.backend(schedulers[0], inner="aot_eager")
    run = broken(model, backend)
    for length in (LENGTH, 16, LENGTH, LENGTH):
        torch.testing.assert_close(step(run, model, length), step(twin, twin, length), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ltd_fx.sampled_indices(backend), ltd_fx.sampled_indices(twin), rtol=0, atol=0)
        for scheduler in schedulers:
            scheduler.step()


def test_a_route_over_several_graphs_is_refused() -> None:
    run = broken(TwoHalves().train(), ltd_fx.backend(inner="aot_eager", routes=[(1, 2, None)]))
    with pytest.raises(LTDError, match="one graph"):
        run(words(LENGTH))
    run = broken(BrokenLoop().train(), ltd_fx.backend(inner="aot_eager", routes=[(1, 2, None)]))
    with pytest.raises(LTDError, match="one graph"):
        run(words(LENGTH))


class Breaks(Block):
    def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        y = super().forward(x, rope, mask)
        torch._dynamo.graph_break()  # here
        return y * 2


class BreaksAtTheEnd(Block):
    """What follows is no graph: nothing but the break tells that the first one is not the layer."""

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        return _twice(super().forward(x, rope, mask))  # here


@torch.compiler.disable
def _twice(x: Tensor) -> Tensor:
    return x * 2


class Mixes(Block):
    def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, rope, mask) + x.roll(1, 1)  # here


class WritesIntoItsInput(Block):
    def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        x.add_(1)  # here
        return super().forward(x, rope, mask)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "break": (lambda: Net(Breaks), "breaks the graph within it at .*test_graphs.py:{}"),
    "break at the end": (lambda: Net(BreaksAtTheEnd), "breaks the graph within it at .*test_graphs.py:{}"),
    "mixes": (lambda: Net(Mixes), r"along the tokens: roll, .*test_graphs.py:{}"),
    "writes": (lambda: Net(WritesIntoItsInput), "writes into its input: .*test_graphs.py:{}"),
    "two results": (lambda: TakesBoth(TwoResults), "of it is used outside"),
}


def line_of(make: Callable[[], nn.Module]) -> int:
    """Of the first line of the layer's class that is marked."""
    code = type(next(m for m in make().modules() if isinstance(m, Block))).forward.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    return next(i + 1 for i in range(code.co_firstlineno, len(lines)) if lines[i].endswith("# here"))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_routed_is_refused_each_time(what: str) -> None:
    make, message = REFUSED[what]
    run = broken(make().train(), ltd_fx.backend(inner="aot_eager", layers=Block))
    for _ in range(2):
        with pytest.raises(LTDError, match=message.format(line_of(make) if "{}" in message else "")):
            run(words(LENGTH))


def test_eval_needs_no_proof() -> None:
    model = Net(Mixes).eval()
    run = broken(model, ltd_fx.backend(inner="aot_eager", layers=Block))
    torch.testing.assert_close(run(words(LENGTH)), model(words(LENGTH)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "some"}, "sampling"),
        ({"seed": 1.5}, "seed"),
        ({"skip_first": -1}, "skip_first"),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LTDError, match=message):
        ltd_fx.backend(**options)


def test_a_scheduler_is_of_one_model() -> None:
    scheduler = LTDScheduler(5, LENGTH, 4)
    ltd_fx.backend(scheduler)
    with pytest.raises(LTDError, match="drives another model"):
        ltd_fx.backend(scheduler)
    with pytest.raises(LTDError, match="drives another model"):
        ltd_fx.transform(Net(), scheduler)


def test_a_backend_is_of_one_model() -> None:
    backend = ltd_fx.backend(inner="aot_eager")
    first, second = Net().train(), TwoHalves().train()
    whole(first, backend)(words(LENGTH))
    with pytest.raises(LTDError, match="a backend of its own"):
        broken(second, backend)(words(LENGTH))


def test_settings_that_do_not_fit_are_refused_at_the_first_forward() -> None:
    run = whole(Net().train(), ltd_fx.backend(inner="aot_eager", keep={"layers.9": 0.5}))
    with pytest.raises(LTDError, match=r"layers\.9"):
        run(words(LENGTH))


def test_a_fixed_length_is_refused() -> None:
    class Fixed(Net):
        def forward(self, ids: Tensor) -> Tensor:
            assert ids.shape[1] == LENGTH
            return super().forward(ids)

    run = whole(Fixed().train(), ltd_fx.backend(inner="aot_eager"))
    with pytest.raises(LTDError, match="dynamic sequence dimension"):
        run(words(LENGTH))


def test_layers_outside_of_graphs_are_not_silently_dense() -> None:
    class Outside(Block):
        @torch.compiler.disable
        def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, rope, mask)

    scheduler = LTDScheduler(5, LENGTH, 4)
    broken(Net(Outside).train(), ltd_fx.backend(scheduler, inner="aot_eager", layers=Block))(words(LENGTH))
    with pytest.warns(UserWarning, match="no training forward was compiled"):
        scheduler.step()

    model = Net().train()
    model.layers[2].forward = torch.compiler.disable(model.layers[2].forward)
    run = broken(model, ltd_fx.backend(inner="aot_eager", layers=Block))
    run(words(LENGTH))
    with pytest.raises(LTDError, match=r"layers\.2 was in no graph"):
        run(words(LENGTH))


def test_a_model_without_layers_is_compiled_as_it_is() -> None:
    model = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            torch.compile(model, backend=ltd_fx.backend(inner="aot_eager"))(torch.ones(2, 4)), model(torch.ones(2, 4))
        )


def test_a_transformed_model_is_refused() -> None:
    model = ltd_fx.transform(Net().train(), example_inputs=(words(LENGTH),))
    with pytest.raises(LTDError, match="transformed already"):
        broken(model, ltd_fx.backend(inner="aot_eager", layers=Block))(words(LENGTH))


class Masked(Net):
    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(ids)  # It does not use the mask.


class Passed(Net):
    """As decorators make it, which hand on ``*args``."""

    def forward(self, *args: Any, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(args[0]) * (args[1] if len(args) > 1 else 1)


@pytest.mark.slow
def test_a_mask_that_the_graph_is_not_given_is_refused() -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for compiled, make, given in (
        (whole, Masked, {"attention_mask": mask}),
        (lambda model, backend: ltd_fx.compile_layers(model, backend=backend), Masked, {"attention_mask": mask}),
    ):
        run = compiled(make().train(), ltd_fx.backend(inner="aot_eager", protect="attention_mask"))
        with pytest.raises(LTDError, match="protect='attention_mask' names an argument"):
            run(words(LENGTH), **given)
    run = whole(Masked().train(), ltd_fx.backend(inner="aot_eager", protect="attention_mask"))
    run(words(LENGTH))  # Nothing is padded.
    run = whole(Passed().train(), ltd_fx.backend(inner="aot_eager", protect="attention_mask"))
    with pytest.raises(LTDError, match="pass it by its name"):
        run(words(LENGTH), torch.ones(3, LENGTH, 1))


def test_what_is_shown_of_a_layer_is_not_said_of_another_kind_of_its_class() -> None:
    class Kinds(Block):
        mixes = False

        def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
            made = super().forward(x, rope, mask)
            return made + x.roll(1, 1) if self.mixes else made

    model, backend = Net(Kinds).train(), ltd_fx.backend(inner="aot_eager")
    model.layers[2].mixes = True
    run = ltd_fx.compile_layers(model, backend=backend, fullgraph=True)
    with pytest.raises(LTDError, match=r"layers\.2 .*along the tokens"):
        run(words(LENGTH))
    assert [site.status for site in ltd_fx.summary(backend).sites if site.routed] == ["proven", "to be tested"]
