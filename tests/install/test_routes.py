"""Routes over several layers and shares of the tokens, against the dense model with dropped keys blocked."""

import copy
import inspect
import operator
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from attend import Attention, Stack
from conftest import CASES, SEQ, Case, bert, checkpoint_layers, decoder, gpt2, loss_of
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy import PATTERN, Block

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

ROUTES = [(1, 3, 0.25), (4, -2, None)]
BUILDS = {
    "llama": decoder("Llama", num_hidden_layers=8, use_cache=False),
    "gpt2": lambda: gpt2(8),
    "bert": lambda: bert(8),
}


def deep(family: str) -> Case:
    """The case with eight layers."""
    return replace(CASES[family], build=BUILDS[family])


def reference(model: nn.Module, layers: str, kept: dict[str, Tensor], routes: list[tuple[int, int]]) -> nn.Module:
    """Dense layers whose attention to dropped tokens is blocked; what was dropped comes back after each route."""
    stack = model.get_submodule(layers)
    for start, end in routes:
        indices = kept[f"{layers}.{start}"]
        stored: list[Tensor] = []

        def enter(_: nn.Module, args: Any, stored: Any = stored) -> None:
            stored.append(args[0])

        def block(layer: nn.Module, args: Any, kwargs: Any, indices: Tensor = indices) -> Any:
            seen = torch.zeros(args[0].shape[:2], dtype=torch.bool).scatter(1, indices, True)[:, None, None]
            bound = inspect.signature(layer.forward).bind(*args, **kwargs)
            mask = bound.arguments.get("attention_mask")
            bound.arguments["attention_mask"] = seen if mask is None else mask & seen
            return bound.args, bound.kwargs

        def leave(_: nn.Module, args: Any, out: Any, stored: Any = stored, indices: Tensor = indices) -> Any:
            seen = torch.zeros(out.shape[:2], dtype=torch.bool).scatter(1, indices, True)
            return torch.where(seen[..., None], out, stored.pop())

        stack[start].register_forward_pre_hook(enter)
        for layer in stack[start : end + 1]:
            layer.register_forward_pre_hook(block, with_kwargs=True)
        stack[end].register_forward_hook(leave)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("sampling", ["per_sample", "shared"])
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "bert"))])
def test_a_routed_model_equals_the_blocked_dense_one(family: str, sampling: str) -> None:
    case = deep(family)
    routed, inputs = case.model(), case.inputs()
    dense = copy.deepcopy(routed)
    ltd_fx.transform(routed, routes=ROUTES, sampling=sampling, example_inputs=inputs)
    ours = loss_of(routed(**inputs))
    ours.backward()
    kept = ltd_fx.sampled_indices(routed)
    assert [kept[f"{case.layers}.{i}"].shape[1] for i in range(1, 7)] == [SEQ // 4] * 3 + [SEQ // 2] * 3
    assert torch.equal(kept[f"{case.layers}.1"], kept[f"{case.layers}.3"])
    assert not torch.equal(kept[f"{case.layers}.3"], kept[f"{case.layers}.4"][:, : SEQ // 4])
    theirs = loss_of(reference(dense, case.layers, kept, [(1, 3), (4, 6)])(**inputs))
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    largest = max(float(g.abs().max()) for g in gradients(dense))  # a key's bias has none
    for a, b in zip(gradients(routed), gradients(dense), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_route_gathers_and_samples_once() -> None:
    case = deep("llama")
    counts = []
    for routes in (None, [(1, 6, None)], [(i, i, None) for i in range(1, 7)]):
        model, inputs = case.model(), case.inputs()
        if routes is not None:
            ltd_fx.transform(model, routes=routes, example_inputs=inputs)
        with Copies() as copies:
            loss_of(model(**inputs)).backward()
        names = ["sample_tokens", "aten.gather.", "aten.scatter.src", "gather_aligned", "gather_mask"]
        counts.append(torch.tensor([sum(name in call for call in copies.calls) for name in names]))
    dense, one, six = counts
    assert (one - dense).tolist() == [1, 2, 1, 1, 1]  # a gather and a scatter forward, and a gather backward
    assert (six - dense).tolist() == [1, 12, 6, 0, 0]  # one draw; arguments by torch's own indexing


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
def test_compiled_with_routes(regional: bool) -> None:
    case = replace(deep("llama"), build=decoder("Llama", num_hidden_layers=7, use_cache=False))
    eager, inputs = case.model(), case.inputs()
    scheduler = LTDScheduler(8, SEQ, 20, multiple_of=4)
    ltd_fx.transform(eager, scheduler, routes=[(1, 3, 0.25), (4, -2, None)], example_inputs=inputs)
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = model
    if regional:
        ltd_fx.compile_layers(model, backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in (*range(4), 16, 24):
        scheduler.set_step(step)
        ours = loss_of(compiled(**inputs))
        if step % 8 == 0:
            scheduler.set_step(step)
            theirs = loss_of(eager(**inputs))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
            for one in (model, eager):
                one.zero_grad()
            theirs.backward()
            ours.backward()
            for a, b in zip(gradients(model), gradients(eager), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    # one by one: the dense layer, and of a route the first, the inner and the last, each routed and dense
    assert counter.frame_count == (7 if regional else 2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Between(Stack):
    """Adds something to the hidden states between two layers, or hands them to a third."""

    def __init__(self, what: str) -> None:
        super().__init__(Layer, depth=5)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i == 2:
                early = x
                x = x * 2 if self.what == "scaled" else x
            x = layer(early if self.what == "skipping" and i == 3 else x)
        return x


@pytest.mark.parametrize(
    ("what", "message"), [("scaled", "does not take its hidden states"), ("skipping", "others take the hidden states")]
)
def test_layers_that_are_no_chain_are_refused(what: str, message: str) -> None:
    x = torch.randn(2, 12, 16)
    model = Between(what)
    with pytest.raises(LTDError, match=f"layers.[23] follows layers.[12] on a route, but {message}"):
        ltd_fx.transform(model, routes=[(1, 3, None)], example_inputs=(x,))
    assert not ltd_fx.is_transformed(model)
    ltd_fx.transform(model, routes=[(1, 1, None), (3, 3, None)], example_inputs=(x,))


def test_a_graph_whose_hidden_states_others_read_is_refused() -> None:
    def net(read: bool) -> fx.GraphModule:
        graph = fx.Graph()
        root = nn.ModuleDict({f"l{i}": Block() for i in range(5)})
        hidden = [graph.placeholder("x")]
        for i in range(5):
            hidden.append(graph.call_function(operator.getitem, (graph.call_module(f"l{i}", (hidden[-1],)), 0)))
        graph.output((hidden[-1], hidden[3]) if read else hidden[-1])
        return fx.GraphModule(root, graph)

    ltd_fx.register_pattern(Block, PATTERN)
    torch.manual_seed(0)
    routed, x = net(False).train(), torch.randn(2, 12, 8)
    dense = copy.deepcopy(routed)
    ltd_fx.transform(routed, layers=Block, routes=[(1, 3, None)])
    code = routed.code
    assert (code.count("draw_tokens("), code.count("split_hidden("), code.count("take_over(")) == (1, 1, 0)
    out = routed(x)
    kept = torch.zeros(2, 12, dtype=torch.bool).scatter(1, ltd_fx.sampled_indices(routed)["l1"], True)[..., None]
    before = dense.l0(x)[0]
    inner = dense.l3(dense.l2(dense.l1(before)[0])[0])[0]
    torch.testing.assert_close(dense.l4(torch.where(kept, inner, before))[0], out)
    with pytest.raises(LTDError, match="others take the hidden states between them too"):
        ltd_fx.transform(net(True), layers=Block, routes=[(1, 3, None)])


def test_without_examples_a_route_is_learnt_at_the_first_forward() -> None:
    case = deep("llama")
    model, inputs = case.model(), case.inputs()
    ltd_fx.transform(model, routes=[(2, 5, None)])
    loss_of(model(**inputs)).backward()
    report = str(ltd_fx.summary(model))
    assert report.count("as model.layers.2") == 3
    assert ltd_fx.verify(model, inputs).ok
    plain = ltd_fx.restore(model).eval()
    assert torch.equal(plain(**inputs).logits, case.model().eval()(**inputs).logits)


def test_copies_keep_their_routes() -> None:
    case = deep("llama")
    model, inputs = case.model(), case.inputs()
    ltd_fx.transform(model, LTDScheduler(16, SEQ, 10), routes=ROUTES, example_inputs=inputs)
    first = loss_of(model(**inputs))
    for clone in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        clone.__dict__["_ltd_rewrite"].state.set_forward(0)
        assert torch.equal(loss_of(clone(**inputs)), first)


class Skipping(Stack):
    """Leaves a layer out in training, as LayerDrop does."""

    skipped = -1

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x if i == self.skipped else layer(x)
        return x


@pytest.mark.parametrize("compiled", [False, True])
def test_a_route_whose_ends_are_skipped_is_refused(compiled: bool) -> None:
    x = torch.randn(2, 12, 16)
    model = ltd_fx.transform(Skipping(Layer, depth=5).train(), routes=[(1, 3, None)], example_inputs=(x,))
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    last = "without its last layer" if compiled else r"layers\.4 is given the hidden states from within"
    for skipped, message in ((3, last), (1, "without the layers before it")):
        model.skipped = skipped
        with pytest.raises(Exception, match=message):
            run(x)
    for skipped in (-1, 2):
        model.skipped = skipped
        assert run(x).shape == x.shape
    ltd_fx.restore(model)
    assert not model._forward_hooks


class Checkpointed(Stack):
    def __init__(self, size: int) -> None:
        super().__init__(Layer, depth=6)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        for i in range(0, 6, self.size):
            group = nn.Sequential(*self.layers[i : i + self.size])
            x = checkpoint(group, x, use_reentrant=False) if self.size else group(x)
        return x


def test_checkpoints_hold_whole_routes() -> None:
    x = torch.randn(2, 12, 16, requires_grad=True)
    torch.manual_seed(0)
    model = Checkpointed(2)
    plain = Stack(Layer, depth=6)
    plain.load_state_dict(model.state_dict())
    grads = []
    for one in (model, plain):
        ltd_fx.transform(one, skip_first=0, skip_last=0, routes=[(2, 3, None)], example_inputs=(x.detach(),))
        (grad,) = torch.autograd.grad(loss_of(one(x)), x)
        grads.append(grad)
    torch.testing.assert_close(*grads)
    single = ltd_fx.transform(Checkpointed(1), routes=[(2, 3, None)], example_inputs=(x.detach(),))
    out = single(x)
    with pytest.raises(LTDError, match="checkpoint the whole route"):
        loss_of(out).backward()


def test_transformers_checkpointing_with_routes() -> None:
    case = deep("llama")
    model, inputs = case.model(), case.inputs()
    ltd_fx.transform(model, routes=ROUTES, example_inputs=inputs)
    loss_of(model(**inputs)).backward()
    expected = [g.clone() for g in gradients(model)]
    model.zero_grad()
    checkpoint_layers(model, use_reentrant=False)
    model.__dict__["_ltd_rewrite"].state.set_forward(0)
    loss_of(model(**inputs)).backward()
    for a, b in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(a, b)
