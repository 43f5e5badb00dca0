"""A DeepSpeed random-LTD run moved over, with its ``ds_config.json`` as it is: ``python examples/from_deepspeed.py``.

random-LTD is read by ``ltd_fx.deepspeed``; batch size, optimizer and clipping are a few lines of plain PyTorch.
The model is a byte-level GPT-2, the text the source of Python's standard library.
"""

import argparse
import json
from pathlib import Path

import data
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import ltd_fx
import ltd_fx.deepspeed

SEQ = 256


def make_model() -> nn.Module:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=SEQ, n_embd=128, n_layer=6, n_head=4, **ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("ds_config.json"))
    parser.add_argument("--steps", type=int, default=120, help="training steps")
    parser.add_argument("--out", type=Path, default=Path("runs/from_deepspeed"), help="folder of the trained model")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())

    scheduler, options = ltd_fx.deepspeed.from_config(args.config)
    model = ltd_fx.transform(make_model(), scheduler, **options)
    print(ltd_fx.summary(model))
    optimizer = torch.optim.AdamW(model.parameters(), **config["optimizer"]["params"])

    text, _ = data.standard_library()
    for step in range(args.steps):
        tokens, _ = data.batch(text, config["train_batch_size"], SEQ, 0, step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            saved = scheduler.metrics()["ltd_saved"]
            print(f"step {step + 1}: loss {loss.item():.3f}, {saved:.1%} of the layer tokens saved", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    ltd_fx.save_clean(model, args.out / "model.safetensors")  # the keys of a plain GPT2LMHeadModel
    print(f"written to {args.out}: model.safetensors")


if __name__ == "__main__":
    main()
