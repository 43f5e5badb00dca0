"""Packed rows through models of transformers, on attention by masks and by kernels that count documents."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dense import documents_mask, run_blocked
from flash import flash, use_flash  # noqa: F401 (the fixture)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

transformers = pytest.importorskip("transformers")
slow = pytest.mark.slow

S = 32
WINDOW = 6
DOCUMENTS = {"four": [5, 9, 4, 14], "of one token": [1] * S, "one": [S]}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def mistral(window: int | None = None) -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=window))


def gemma3(window: int = 512) -> nn.Module:
    kinds = ["full_attention", "sliding_attention"] * 2
    config = transformers.Gemma3TextConfig(**SIZES, sliding_window=window, layer_types=kinds)
    return transformers.Gemma3ForCausalLM(config)


def made(make: Callable[[], nn.Module], attention: str) -> tuple[nn.Module, nn.Module]:
    """A model, and a copy of it whose attention takes any mask."""
    torch.manual_seed(0)
    model = make().train()
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    if attention == "flash":
        return use_flash(model), dense
    model.set_attn_implementation(attention)
    return model, dense


def packed(lengths: list[int], given: str) -> dict[str, Any]:
    """A row of documents, told apart by what ``given`` names, besides positions that restart."""
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(1, 64, (1, S), generator=torch.Generator().manual_seed(1)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "use_cache": False,
    }
    if given == "cu_seq_lens":
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths)}
        inputs["max_length_k"] = max(lengths)
    if given == "no longest":  # transformers goes by the positions then
        inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = torch.tensor([0, S], dtype=torch.int32)
    if given == "seq_idx":
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        inputs["seq_idx"] = number[None].to(torch.int32)
    return inputs


def check(model: nn.Module, dense: nn.Module, lengths: list[int], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """A training forward against the dense reference; the tokens it kept."""
    with torch.no_grad():
        ours = model(**inputs).logits
    draws = ltd_fx.sampled_indices(model)
    plain = {name: inputs[name] for name in ("input_ids", "position_ids", "use_cache")}
    every = {f"model.layers.{i}": torch.arange(S).expand(len(ours), S) for i in range(4)} | draws
    theirs = run_blocked(copy.deepcopy(dense), every, dict.fromkeys(every, documents_mask(lengths)), plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return draws


@pytest.mark.parametrize(
    "lengths", [DOCUMENTS["four"], *(pytest.param(d, marks=slow) for d in list(DOCUMENTS.values())[1:])]
)
@pytest.mark.parametrize(
    "given", ["position_ids", *(pytest.param(g, marks=slow) for g in ("cu_seq_lens", "seq_idx", "no longest"))]
)
@pytest.mark.parametrize("make", [llama, *(pytest.param(m, marks=slow) for m in (qwen3, mistral, gemma3))])
@pytest.mark.parametrize("examples", [False, pytest.param(True, marks=slow)], ids=["first forward", "examples"])
@pytest.mark.usefixtures("flash")
def test_kernels_are_given_the_kept_tokens_documents(
    make: Callable[[], nn.Module], given: str, lengths: list[int], examples: bool
) -> None:
    model, dense = made(make, "flash")
    inputs = packed(lengths, given)
    scheduler = LTDScheduler(6, S, 4)
    if make is gemma3 and max(lengths) == 1:  # Of a class that is not known, nothing can be learnt from such a row.
        with pytest.raises(LTDError, match="no token attends to another"):
            ltd_fx.transform(model, scheduler, example_inputs=inputs)
        return
    ltd_fx.transform(model, scheduler, example_inputs=inputs if examples else None)
    for _ in range(3):
        check(model, dense, lengths, inputs)
        scheduler.step()
    assert all(site.proof and site.proof.right for site in ltd_fx.summary(model).sites if site.routed)


@pytest.mark.parametrize(
    "given", ["position_ids", pytest.param("cu_seq_lens", marks=slow), pytest.param("seq_idx", marks=slow)]
)
@pytest.mark.parametrize("make", [mistral, *(pytest.param(m, marks=slow) for m in (llama, qwen3, gemma3))])
def test_masks_keep_documents_apart(make: Callable[[], nn.Module], given: str) -> None:
    lengths = DOCUMENTS["four"]
    model, dense = made(make, "sdpa")
    ltd_fx.transform(model, LTDScheduler(9, S, 9))
    check(model, dense, lengths, packed(lengths, given))


def test_a_document_that_lost_all_its_tokens_merges_with_none(flash: Any) -> None:  # noqa: F811
    lengths = [1] * 20 + [12]
    model, dense = made(llama, "flash")
    ltd_fx.transform(model, LTDScheduler(5, S, 9))
    check(model, dense, lengths, packed(lengths, "position_ids"))
    flash.clear()
    model(**packed(lengths, "position_ids"))
    draws = ltd_fx.sampled_indices(model)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    expected = [(rows[0][None] < starts[:, None]).sum(1).tolist() for rows in draws.values()]
    assert [ends for tokens, ends in flash if tokens == 5] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("flash")
def test_rows_of_a_batch_are_whole_to_the_kernel() -> None:
    """Where there are several rows, transformers does not look in the positions, nor do we."""
    model, dense = made(llama, "flash")
    ltd_fx.transform(model, LTDScheduler(9, S, 9))
    inputs = packed(DOCUMENTS["four"], "position_ids")
    inputs = {name: v.repeat(2, 1) if isinstance(v, Tensor) else v for name, v in inputs.items()}
    check(model, dense, [S], inputs)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("make", [mistral, pytest.param(gemma3, marks=slow)])
def test_a_window_that_a_kernel_counts_is_refused(make: Callable[..., nn.Module], examples: bool) -> None:
    """The window of a layer that looks back no further than the sequence is long leaves nothing out."""
    inputs = packed(DOCUMENTS["four"], "position_ids")
    model, _ = made(lambda: make(WINDOW), "flash")
    refused = pytest.raises(LTDError, match=r"a window of 6 tokens .*attn_implementation='sdpa' or 'flex_attention'")
    if examples:
        with refused:
            ltd_fx.transform(model, LTDScheduler(9, S, 9), example_inputs=inputs)
    else:
        ltd_fx.transform(model, LTDScheduler(9, S, 9))
        with refused:
            model(**inputs)
    if not examples:
        model, dense = made(lambda: make(S), "flash")
        ltd_fx.transform(model, LTDScheduler(9, S, 9))
        check(model, dense, DOCUMENTS["four"], inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("flash")
def test_another_kernel_may_be_set_between_forwards() -> None:
    model, dense = made(llama, "sdpa")
    ltd_fx.transform(model, LTDScheduler(9, S, 9))
    inputs = packed(DOCUMENTS["four"], "position_ids")
    check(model, dense, DOCUMENTS["four"], inputs)
    check(use_flash(model), dense, DOCUMENTS["four"], inputs)


def by_positions(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
    """An attention function of one's own: documents begin where positions are at their least."""
    number = (given["position_ids"] == given["position_ids"].min()).cumsum(1)
    allowed = (number[:, None, :, None] == number[:, None, None]) & torch.ones(q.shape[2], q.shape[2]).tril().bool()
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2), None


@pytest.mark.parametrize(
    "lengths", [DOCUMENTS["four"], *(pytest.param(d, marks=slow) for d in list(DOCUMENTS.values())[1:])]
)
def test_an_attention_function_of_ones_own_finds_documents_in_the_positions(lengths: list[int]) -> None:
    transformers.AttentionInterface.register("by_positions", by_positions)
    model, dense = made(llama, "by_positions")
    ltd_fx.transform(model, LTDScheduler(7, S, 9))
    check(model, dense, lengths, packed(lengths, "position_ids"))
    check(model, dense, [S], packed([S], "position_ids"))


def flash_by_distance(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any
) -> tuple[Tensor, None]:
    place = torch.arange(q.shape[2])
    bias = -0.1 * (place[:, None] - place).abs() + torch.ones(len(place), len(place)).tril().log()
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    return out.transpose(1, 2), None


def test_a_function_is_not_known_by_its_name_alone() -> None:
    """One that a user registered as some flash attention is what is shown right or wrong, not transformers' own."""
    transformers.AttentionInterface.register("my_flash", flash_by_distance)
    model = use_flash(llama().train(), "my_flash")
    with pytest.raises(LTDError, match="cannot be routed"):
        ltd_fx.transform(model, LTDScheduler(9, S, 9), example_inputs=packed([S], "position_ids"))


@pytest.mark.parametrize("backend", [None, *(pytest.param(b, marks=slow) for b in ("aot_eager", "inductor"))])
@pytest.mark.parametrize("given", ["position_ids", *(pytest.param(g, marks=slow) for g in ("cu_seq_lens", "seq_idx"))])
@pytest.mark.parametrize("make", [mistral, *(pytest.param(m, marks=slow) for m in (gemma3, llama, qwen3))])
def test_flex_attention_knows_where_a_token_was(
    make: Callable[..., nn.Module], given: str, backend: str | None
) -> None:
    """A window over the tokens of the whole row, within documents, over a schedule."""
    lengths = DOCUMENTS["four"]
    sliding = make in (mistral, gemma3)
    model, dense = made(partial(make, WINDOW) if sliding else make, "flex_attention")
    scheduler = LTDScheduler(9, S, 3)
    ltd_fx.transform(model, scheduler)
    inputs = packed(lengths, given)
    plain = packed(lengths, "position_ids")
    step = model
    if backend is not None:
        with torch.no_grad():
            model(**inputs)  # The layers are tested.
        counter = CompileCounterWithBackend(backend)
        step = torch.compile(model, backend=counter)
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention" if sliding else ""] * 4
    windows = {f"model.layers.{i}": WINDOW if kind == "sliding_attention" else None for i, kind in enumerate(kinds)}
    allowed = {name: documents_mask(lengths, window) for name, window in windows.items()}
    graphs = []
    for _ in range(1 if backend is None else 4):
        with torch.no_grad():  # Its backward has no kernel on the CPU.
            ours = step(**inputs).logits
        every = {name: torch.arange(S)[None] for name in windows} | ltd_fx.sampled_indices(model)
        reference = run_blocked(copy.deepcopy(dense), every, allowed, plain)
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
        scheduler.step()
        graphs.append(0 if backend is None else counter.frame_count)
    # As many as the dense model's, which a warning of transformers breaks; one more of the dense end.
    assert backend is None or graphs == [graphs[0]] * 3 + [graphs[0] + 1]


@pytest.mark.slow
def test_boundaries_that_are_given_take_two_graphs() -> None:
    model, _ = made(llama, "sdpa")
    scheduler = LTDScheduler(6, S, 6)
    ltd_fx.transform(model, scheduler)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    for lengths in [[5, 9, 4, 14], [1, 1, 29, 1], [8, 8, 8, 8]] * 3:
        longest = dict.fromkeys(("max_length_q", "max_length_k"), S)  # A number that varies would cost a graph.
        step(**{**packed(lengths, "cu_seq_lens"), **longest}).logits.sum().backward()
        scheduler.step()
    assert counter.frame_count == 2
