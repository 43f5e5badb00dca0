"""Draw the LayerToken learning rate beside the same schedule by steps: ``python examples/layer_token_lr.py OUT.png``.

random-LTD's GPT-3 1.3B run: 24 layers of which 22 are routed, 128 to 2048 tokens by 16 over 200,000 of 286,102 steps.
"""

import sys

import torch
from matplotlib import pyplot
from torch import nn

import ltd_fx

STEPS, WARMUP, BATCH = 286_102, 3_000, 512


def main(path: str) -> None:
    scheduler = ltd_fx.LTDScheduler(128, 2048, 200_000, multiple_of=16, global_batch_size=BATCH)
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 1, 8), 24, enable_nested_tensor=False)
    model = ltd_fx.transform(layers, scheduler)
    total, warmup = scheduler.total_layer_tokens(STEPS), scheduler.total_layer_tokens(WARMUP)
    # both end at the last step; the run by steps decays as if its sequences were full from the start
    by_tokens = ltd_fx.LayerTokenLR(
        torch.optim.SGD(model.parameters(), lr=1.0), scheduler, total_layer_tokens=total, warmup_layer_tokens=warmup
    )
    dense = BATCH * 24 * scheduler.max_length
    by_steps = ltd_fx.LayerTokenLR(
        torch.optim.SGD(model.parameters(), lr=1.0),
        scheduler,
        total_layer_tokens=STEPS * dense,
        warmup_layer_tokens=WARMUP * dense,
    )
    steps = range(0, STEPS, 500)
    consumed, tokens = 0, []
    for step in range(STEPS):
        if step % 500 == 0:
            tokens.append(consumed)
        consumed += BATCH * (22 * scheduler.length_at(step) + 2 * scheduler.max_length)

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    for axes, x, label in ((left, steps, "steps"), (right, tokens, "layer tokens consumed")):
        axes.plot(x, [by_steps.ratio_at(step * dense) for step in steps], label="by steps")
        axes.plot(x, [by_tokens.ratio_at(n) for n in tokens], label="by layer tokens")
        axes.set_xlabel(label)
    left.set_ylabel("learning rate / base rate")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
