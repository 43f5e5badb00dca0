"""What people do with a model besides training it: generate, save, export, per-sample gradients, autocast."""

from pathlib import Path

import pytest
import torch
from conftest import BATCH, SEQ, Case, decoder, loss_of, text

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


@pytest.mark.compat("transformers")
def test_generate_with_a_cache(llama: Case) -> None:
    plain, model = llama.model().eval(), ltd_fx.transform(llama.model(), LTDScheduler(9, SEQ, 10)).eval()
    prompt = {"input_ids": text()["input_ids"][:2, :12], "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(**prompt), plain.generate(**prompt))
    with pytest.raises(LTDError, match=r"eval\(\) before generating"):
        model.train().generate(**prompt)


@pytest.mark.compat("transformers")
def test_save_pretrained_loads_in_plain_transformers(llama: Case, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = ltd_fx.transform(llama.model(), LTDScheduler(9, SEQ, 10))
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[1]) is type(loaded.model.layers[0])
    assert torch.equal(loss_of(loaded(**text())), loss_of(model.eval()(**text())))


def test_export_in_eval_is_clean_and_in_training_refused(case: Case) -> None:
    model = ltd_fx.transform(case.model(), LTDScheduler(9, case.seq_len, 10)).eval()
    if "input_ids" in case.inputs():
        model.config.use_cache = False
    inputs = case.inputs()
    program = torch.export.export(model, (), inputs, strict=False)
    assert not [node for node in program.graph.nodes if "ltd_fx" in str(node.target)]
    assert torch.equal(loss_of(program.module()(**inputs)), loss_of(model(**inputs)))
    model.train()
    with pytest.raises(Exception, match=r"freeze the reserved length.*model\.eval\(\)"):
        torch.export.export(model, (), inputs, strict=False)


def test_per_sample_gradients_equal_a_loop_over_samples() -> None:
    model = decoder("Llama")().train()
    model.config.use_cache = False
    scheduler = LTDScheduler(9, SEQ, 10)
    ltd_fx.transform(model, scheduler)
    inputs = text()
    inputs["attention_mask"].fill_(1)
    ids = inputs["input_ids"]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    weight = torch.linspace(-1, 1, SEQ * 64).view(SEQ, 64)

    def loss(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        hidden = model.get_input_embeddings()
        embeds = torch.func.functional_call(hidden, parameters["embeds"], (sample[None],))
        out = torch.func.functional_call(model, parameters["model"], (), {"inputs_embeds": embeds})
        return (out.logits[0] * weight).sum()

    split = {
        "model": parameters,
        "embeds": {"weight": parameters["model.embed_tokens.weight"]},
    }
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(split, ids)["model"]

    # The loop: one backward a sample, all through one batched forward, so that sample i draws as row i of the batch.
    scheduler.set_step(0)
    logits = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert next(iter(ltd_fx.sampled_indices(model).values())).shape == (BATCH, 9)
    for i in range(BATCH):
        model.zero_grad()
        (logits[i] * weight).sum().backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:  # differentiated through inputs_embeds above, as an argument of its own
                continue
            torch.testing.assert_close(per_sample[name][i], parameter.grad, rtol=1e-4, atol=1e-4)


def test_autocast_and_half_precision_keep_the_streams_dtype(llama: Case) -> None:
    model = ltd_fx.transform(llama.model(), LTDScheduler(9, SEQ, 10))
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model(**text())).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    half = ltd_fx.transform(llama.model().bfloat16(), LTDScheduler(9, SEQ, 10))
    assert half(**text()).logits.dtype == torch.bfloat16
    loss_of(half(**text())).backward()


def test_hooks_and_recorded_hidden_states_are_of_full_length(case: Case) -> None:
    model = ltd_fx.transform(case.model(), LTDScheduler(9, case.seq_len, 10))
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(f"{case.layers}.1")
    layer.register_forward_hook(lambda layer, args, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
    layer.register_full_backward_hook(lambda layer, before, after: seen.append(after[0]))
    options = {} if case.layers == "blocks" else {"output_hidden_states": True}
    output = model(**case.inputs(), **options)
    loss_of(output).backward()
    assert [value.shape for value in seen] == [(BATCH, case.seq_len, 32)] * 2
    if options:
        assert len(output.hidden_states) == 5
        assert all(state.shape == (BATCH, case.seq_len, 32) for state in output.hidden_states)
        assert torch.equal(output.hidden_states[2], seen[0])


def test_casts_are_followed(llama: Case) -> None:
    model = ltd_fx.transform(llama.model(), LTDScheduler(9, SEQ, 10))
    model(**text())
    model.to(torch.float64)
    model(**text())


def test_key_and_sites_follow_the_model_to_its_device(llama: Case) -> None:
    model = ltd_fx.transform(llama.model(), LTDScheduler(9, SEQ, 10)).to("meta")
    inputs = {name: value.to("meta") for name, value in text().items()}
    del inputs["attention_mask"]
    assert model(**inputs).logits.device.type == "meta"
    assert model._ltd_rewrite.state.key.device.type == "meta"
