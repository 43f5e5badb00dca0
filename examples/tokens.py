"""Which layer sees which tokens as the reserved length grows: ``python examples/tokens.py OUT.png``."""

import sys

import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaModel

import ltd_fx

LAYERS, TOKENS = 8, 64
STEPS = (0, 50, 100)


def main(path: str) -> None:
    """Draw the tokens that each layer of a Llama keeps at three steps of a schedule."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=LAYERS)).train()
    scheduler = ltd_fx.LTDScheduler(16, TOKENS, total_steps=100, multiple_of=8)
    ltd_fx.transform(model, scheduler)
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axes, step in zip(figure.subplots(1, len(STEPS), sharey=True), STEPS, strict=True):
        scheduler.set_step(step)
        model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long))
        kept = torch.ones(LAYERS, TOKENS)
        for name, rows in ltd_fx.sampled_indices(model).items():
            seen = torch.zeros(TOKENS).index_fill(0, rows[0], 1)
            kept[int(name.rpartition(".")[2])] = seen
        axes.imshow(kept, aspect="auto", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        axes.set(title=f"step {step}: {scheduler.reserved_length} of {TOKENS} tokens", xlabel="token")
        axes.set_yticks(range(LAYERS))
        axes.set_yticks([i - 0.5 for i in range(1, LAYERS)], minor=True)
        axes.grid(which="minor", axis="y", color="white")
        axes.tick_params(which="minor", length=0)
    figure.axes[0].set_ylabel("layer (first and last are dense)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
