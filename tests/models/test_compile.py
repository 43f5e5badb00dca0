"""One routed graph for every length, one dense graph; compiled results equal eager ones with the same draws."""

from typing import Any

import pytest
import torch
from conftest import BATCH, CASES, SEQ, Case, loss_of, text
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ltd_fx


def step(run: Any, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients of one training step."""
    model.zero_grad()
    loss = loss_of(run(**inputs))
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_walk_over_61_lengths_compiles_two_graphs(case: Case) -> None:
    """Each length's own graph would be 61; torch's default limit is 8."""
    model, inputs, seq_len = case.model(), case.inputs(), case.seq_len
    scheduler = ltd_fx.LTDScheduler(4, seq_len, seq_len - 4)
    ltd_fx.transform(model, scheduler)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    lengths = set()
    for i in range(seq_len - 2):
        saved = scheduler.state_dict()
        ours = step(compiled, model, inputs)
        if i % 20 == 0 or scheduler.reserved_length >= seq_len - 1:
            scheduler.load_state_dict(saved)
            assert_same(ours, step(model, model, inputs))
        lengths.add(scheduler.reserved_length)
        scheduler.step()
    assert len(lengths) >= 61
    assert scheduler.reserved_length == seq_len
    assert counter.frame_count == 2


def test_inductor_fuses_the_route_and_agrees(llama: Case) -> None:
    from torch._inductor.utils import run_and_get_code

    model = ltd_fx.transform(llama.model(), ltd_fx.LTDScheduler(4, SEQ, 4))
    scheduler = model._ltd_rewrite.state.scheduler
    compiled = torch.compile(model, fullgraph=True)
    eager = step(model, model, text())
    scheduler.set_step(0)
    ours, code = run_and_get_code(lambda: step(compiled, model, text()))
    assert_same(ours, eager, 1e-4)
    assert code
    sampling = "ops.ltd_fx._sample_on_cpu"  # faster than what Inductor makes of it on the CPU
    assert not any("ops.ltd_fx" in kernel.replace(sampling, "") for kernel in code)


@pytest.mark.compat("torch")
def test_layers_compiled_one_by_one_share_their_graphs(llama: Case) -> None:
    model = CASES["llama"].model()
    scheduler = ltd_fx.LTDScheduler(4, SEQ, 4)
    model.model.layers.extend(llama.model().model.layers)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = 0 if i in (0, 7) else i
    model.config.use_cache = False
    ltd_fx.transform(model, scheduler)
    counter = CompileCounterWithBackend("aot_eager")
    assert ltd_fx.compile_layers(model, fullgraph=True, backend=counter) is model
    for _ in range(6):
        saved = scheduler.state_dict()
        ours = step(model, model, text())
        scheduler.load_state_dict(saved)
        with torch.compiler.set_stance("force_eager"):
            assert_same(ours, step(model, model, text()))
        scheduler.step()
    assert counter.frame_count <= 3  # the dense layer class, the routed one routed, the routed one dense


@pytest.mark.slow
def test_layers_of_an_untransformed_model_compile_one_by_one(llama: Case) -> None:
    plain = llama.model()
    model = ltd_fx.compile_layers(llama.model(), backend="aot_eager")
    assert_same(step(model, model, text()), step(plain, plain, text()))
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    assert compiled == list(model.get_submodule(llama.layers))


def test_what_has_no_layers_to_compile_is_refused() -> None:
    with pytest.raises(ltd_fx.LTDError, match="neither a layer"):
        ltd_fx.compile_layers(nn.Linear(2, 2))
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ltd_fx.LTDError, match=r"torch\.compile on it"):
        ltd_fx.compile_layers(graph)


class Blocks(nn.Module):
    """A nanoGPT-style model that checkpoints its own blocks."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True) for _ in range(4))
        self.use_reentrant = use_reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            if self.use_reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.use_reentrant)
        return hidden


@pytest.mark.slow
def test_a_users_own_checkpoint_inside_the_compiled_graph() -> None:
    torch.manual_seed(0)
    plain, checkpointed = Blocks(None).train(), Blocks(False).train()
    checkpointed.load_state_dict(plain.state_dict())
    inputs = {"hidden": torch.randn(BATCH, SEQ, 16)}
    results = []
    for model in (plain, checkpointed):
        ltd_fx.transform(model, ltd_fx.LTDScheduler(5, SEQ, 10))
        results.append(step(torch.compile(model, fullgraph=True, backend="aot_eager"), model, inputs))
    assert_same(*results)


@pytest.mark.slow
def test_two_compiled_forwards_before_one_backward(llama: Case) -> None:
    model = ltd_fx.transform(llama.model(), ltd_fx.LTDScheduler(4, SEQ, 4))
    scheduler = model._ltd_rewrite.state.scheduler
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, model):
        scheduler.set_step(0)
        model.zero_grad()
        (loss_of(run(**text())) + 2 * loss_of(run(**text()))).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_same(*results)


@pytest.mark.compat("torch")
def test_layers_of_torchs_own_compile_two_graphs() -> None:
    scheduler = ltd_fx.LTDScheduler(4, SEQ, 10)
    model = ltd_fx.transform(Blocks(None).train(), scheduler)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(12):
        compiled(torch.zeros(BATCH, SEQ, 16))
        scheduler.step()
    assert counter.frame_count == 2


@pytest.mark.slow
def test_changing_batch_sizes_and_lengths_compile_no_more_than_the_plain_model(llama: Case) -> None:
    routed = ltd_fx.transform(llama.model(), ltd_fx.LTDScheduler(4, SEQ, 60))
    counts = []
    for model in (llama.model(), routed):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
        for batch, seq in ((2, 16), (3, 24), (4, 40), (5, 17), (2, 64)):
            compiled(input_ids=torch.zeros(batch, seq, dtype=torch.long))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("sampling", ["per_sample", pytest.param("shared", marks=pytest.mark.slow)])
def test_eval_and_full_length_are_the_untransformed_model_bit_for_bit(case: Case, sampling: str) -> None:
    plain, model = case.model(), case.model()
    ltd_fx.transform(model, ltd_fx.LTDScheduler(3, case.seq_len, 10), sampling=sampling)
    inputs = case.inputs()
    routed = loss_of(model(**inputs))
    assert not torch.equal(routed, loss_of(plain(**inputs)))
    model._ltd_rewrite.state.scheduler.set_step(10)
    assert torch.equal(loss_of(model(**inputs)), loss_of(plain(**inputs)))
    model._ltd_rewrite.state.scheduler.set_step(0)
    assert torch.equal(loss_of(model.eval()(**inputs)), loss_of(plain.eval()(**inputs)))
