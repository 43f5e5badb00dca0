"""A layer that a forward calls several times draws anew at each call, and each call counts in layer tokens."""

import copy
from typing import Any

import pytest
import torch
from conftest import loss_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy import LOOPS, STREAM, Looped, Rows

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

SEQ = STREAM.shape[1]


def looped(*args: Any) -> tuple[Any, LTDScheduler]:
    torch.manual_seed(0)
    scheduler = LTDScheduler(4, SEQ, 100)
    return ltd_fx.transform(Looped(*args).train(), scheduler, example_inputs=(STREAM,)), scheduler


def blocked(model: Looped, kept: dict[str, Tensor]) -> Tensor:
    """What the untransformed model gives where nobody attends to the tokens that ``blocks.1`` dropped, call by call."""
    hidden = STREAM
    for rows in kept.values():
        seen = torch.zeros(hidden.shape[:2], dtype=torch.bool).scatter(1, rows, True)
        hidden = model.blocks[0](hidden)
        out = model.blocks[1](hidden, src_key_padding_mask=~seen)
        hidden = model.blocks[2](torch.where(seen[..., None], out, hidden))
    return hidden


def test_each_call_has_rows_of_its_own_and_counts() -> None:
    model, scheduler = looped()
    dense = ltd_fx.restore(copy.deepcopy(model))
    drawn = []
    for _ in range(2):
        out = model(STREAM)
        kept = ltd_fx.sampled_indices(model)
        assert list(kept) == ["blocks.1", "blocks.1#1", "blocks.1#2"]
        drawn += [str(rows) for rows in kept.values()]
        torch.testing.assert_close(out, blocked(dense, kept))
    assert len(set(drawn)) == 2 * LOOPS
    scheduler.step()
    # a step at length 4: one layer routed and two dense, each called three times
    assert scheduler.consumed_layer_tokens == LOOPS * (4 + 2 * SEQ)
    assert scheduler.total_layer_tokens(1) == LOOPS * (4 + 2 * SEQ)


@pytest.mark.parametrize(
    "how", ["whole", "layers", *(pytest.param(how, marks=pytest.mark.slow) for how in ("checkpointed", "inlined"))]
)
def test_compiled_as_eager(how: str) -> None:
    # of a class of our own: Dynamo compiles no layer of torch.nn by itself
    (eager, each), (model, scheduler) = looped(False, Rows), looped(how == "checkpointed", Rows)
    counter = CompileCounterWithBackend("aot_eager")
    if how == "layers":
        run = ltd_fx.compile_layers(model, backend=counter, fullgraph=True)
    else:
        called = model if how != "inlined" else lambda hidden: model(hidden) * 1
        run = torch.compile(called, backend=counter, fullgraph=True)
    for _ in range(4):
        ours, theirs = run(STREAM), eager(STREAM)
        torch.testing.assert_close(ours, theirs)
        loss_of(ours).backward()
        loss_of(theirs).backward()
        assert str(ltd_fx.sampled_indices(model)) == str(ltd_fx.sampled_indices(eager))
        each.step()
        scheduler.step()
    for mine, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)
    assert counter.frame_count == (3 if how == "layers" else 1)  # without and with gradients of the input; routed
    assert scheduler.consumed_layer_tokens == each.consumed_layer_tokens


def test_in_a_graph() -> None:
    model, _ = looped()
    torch.manual_seed(0)
    plain = Looped().train()

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.TransformerEncoderLayer)

    graph = ltd_fx.transform(torch.fx.GraphModule(plain, Leaves().trace(plain)), LTDScheduler(4, SEQ, 100))
    for _ in range(2):
        torch.testing.assert_close(graph.train()(STREAM), model(STREAM))
        assert str(ltd_fx.sampled_indices(graph)) == str(ltd_fx.sampled_indices(model))


def test_a_recompute_of_one_of_several_calls_is_refused() -> None:
    model, _ = looped(True)
    with pytest.raises(LTDError, match=r"recomputes blocks\.1, which the forward called 3 times"):
        loss_of(model(STREAM)).backward()


def test_albert() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4}
    config = transformers.AlbertConfig(
        **sizes, intermediate_size=48, num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = transformers.AlbertModel(config).train()
    inputs = {"input_ids": torch.randint(64, (2, SEQ))}
    scheduler = LTDScheduler(4, SEQ, 100)
    layers = r".*albert_layers\.0"
    ltd_fx.transform(model, scheduler, layers=layers, skip_first=0, skip_last=0, example_inputs=inputs)
    model(**inputs)
    kept = ltd_fx.sampled_indices(model)
    assert len({str(rows) for rows in kept.values()}) == len(kept) == 4
    scheduler.step()
    assert scheduler.consumed_layer_tokens == 4 * 4
