"""A timm ViT on scikit-learn's handwritten digits, dense and routed: ``python examples/vit_digits.py``.

Each image of 8 x 8 pixels is 16 tokens and a class token, which every draw keeps (``protect=1``).
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import ltd_fx

BATCH, TOKENS = 32, 17
Images = tuple[Tensor, Tensor]  # pixels in [-1, 1], [N, 1, 8, 8], and digits, [N]


def digits() -> tuple[Images, Images]:
    """1,437 images to train on and 360 to validate on."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    train, valid = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=labels)
    targets = torch.tensor(labels)
    return (images[train], targets[train]), (images[valid], targets[valid])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, embed_dim=64, depth=6, num_heads=4)
    nn.init.normal_(model.pos_embed, std=0.5)  # as loud as the patches: timm's 0.02 takes far longer to learn from
    return model


def train(model: nn.Module, images: Images, steps: int, scheduler: ltd_fx.LTDScheduler | None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    lr = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images[0]), (BATCH,), generator=generator)
        F.cross_entropy(model(images[0][chosen]), images[1][chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        lr.step()
        if scheduler is not None:
            scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    return (model.eval()(images[0]).argmax(-1) == images[1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps of each of the two models")
    steps = parser.parse_args().steps
    training, validation = digits()

    dense = make_model()
    train(dense, training, steps, None)
    print(f"dense   validation accuracy {accuracy(dense, validation):.1%}")

    scheduler = ltd_fx.LTDScheduler(5, TOKENS, max(round(0.7 * steps), 1), global_batch_size=BATCH)
    routed = ltd_fx.transform(make_model(), scheduler, protect=1)
    train(routed, training, steps, scheduler)
    saved = scheduler.metrics()["ltd_saved"]
    print(f"routed  validation accuracy {accuracy(routed, validation):.1%}, {saved:.1%} of the layer tokens saved")


if __name__ == "__main__":
    main()
