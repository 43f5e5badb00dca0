"""Classification: timm's vision transformer on letters in faces that it never saw, or on digits."""

import timm
import torch
import torch.nn.functional as F
from config import Config
from glyphs import digits, letters
from torch import Tensor, nn

COPIES, HELD_OUT_COPIES = 24, 12  # of each letter in each face


class Classify:
    """Images to classes; the class token is kept by all layers."""

    protect = 1

    def __init__(self, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.classes: int = config.settings["classes"]
        if config.settings["images"] == "digits":
            self.train, self.held_out = digits()
        else:
            self.train = letters(self.classes, COPIES)
            self.held_out = letters(self.classes, HELD_OUT_COPIES, held_out=True)
        side = self.train.pixels.shape[-1]
        self.tokens = (side // config.settings["patch"]) ** 2 + 1
        self.layers: int = config.settings["depth"]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        settings = self.config.settings
        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=self.train.pixels.shape[-1],
            patch_size=settings["patch"],
            in_chans=1,
            num_classes=self.classes,
            embed_dim=settings["width"],
            depth=settings["depth"],
            num_heads=settings["heads"],
        )
        nn.init.normal_(model.pos_embed, std=0.5)  # as loud as the patches: timm's 0.02 takes far longer to learn from
        return model.to(self.device)

    def loss(self, model: nn.Module, seed: int, step: int, length: int) -> Tensor:
        """Cross-entropy, in nats."""
        assert length == self.tokens, "images are not truncated"
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(self.train), (self.config.batch,), generator=generator)
        logits = model(self.train.pixels[chosen].to(self.device))
        return F.cross_entropy(logits.float(), self.train.labels[chosen].to(self.device))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean cross-entropy and accuracy, in percent, on held-out images."""
        parts = zip(self.held_out.pixels.split(128), self.held_out.labels.split(128), strict=True)
        logits = torch.cat([model(pixels.to(self.device)).float().cpu() for pixels, _ in parts])
        right = (logits.argmax(-1) == self.held_out.labels).double().mean().item()
        return {"loss": F.cross_entropy(logits, self.held_out.labels).item(), "accuracy": 100 * right}


make = Classify
