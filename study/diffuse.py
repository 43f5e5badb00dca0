"""Generation: a class-conditional diffusion transformer of letters, judged by a classifier's features."""

import torch
import torch.nn.functional as F
from config import Config
from dit import DiT
from features import frechet_distance, trained
from glyphs import letters
from torch import Tensor, nn

COPIES = 24  # training images of each letter in each face
WITHOUT_CLASS = 0.1  # share of the training images whose class is hidden, for guidance
GUIDANCE = (1.0, 2.0)  # 1: none
STEPS = 16  # of a sample
SAMPLES = 12  # of each class


class Diffuse:
    """Flow matching: the model predicts the velocity from image to noise along a straight line."""

    protect = 0

    def __init__(self, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.classes: int = config.settings["classes"]
        self.side: int = config.settings["side"]
        self.train = letters(self.classes, COPIES, self.side)
        self.tokens = (self.side // config.settings["patch"]) ** 2
        self.layers: int = config.settings["depth"]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return DiT(**self.config.settings).to(self.device)

    def loss(self, model: nn.Module, seed: int, step: int, length: int) -> Tensor:
        """Mean squared error of the velocity."""
        assert length == self.tokens, "images are not truncated"
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        size = self.config.batch
        chosen = torch.randint(len(self.train), (size,), generator=generator)
        images, classes = self.train.pixels[chosen], self.train.labels[chosen]
        hidden = torch.rand(size, generator=generator) < WITHOUT_CLASS
        times = torch.randn(size, generator=generator).sigmoid()
        noise = torch.randn(images.shape, generator=generator)
        noisy = torch.lerp(images, noise, times[:, None, None, None])
        classes = classes.masked_fill(hidden, self.classes)
        velocity = model(noisy.to(self.device), times.to(self.device), classes.to(self.device))
        return F.mse_loss(velocity, (noise - images).to(self.device))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Fréchet distance of samples to images; how many samples a classifier takes for their class, in percent."""
        judge = trained(self.classes).to(self.device)
        images = letters(self.classes, 4, self.side, seed=1).pixels.to(self.device)
        classes = torch.arange(self.classes, device=self.device).repeat(SAMPLES)
        measured = {}
        for guidance in GUIDANCE:
            samples = self.sample(model, classes, guidance)
            suffix = "" if guidance == 1 else "_guided"
            measured["frechet" + suffix] = frechet_distance(judge.features(samples), judge.features(images))
            right = judge(samples).argmax(-1) == classes
            measured["accuracy" + suffix] = 100 * right.double().mean().item()
        return measured

    def sample(self, model: nn.Module, classes: Tensor, guidance: float) -> Tensor:
        """Images ``[N, 1, side, side]`` of ``classes`` ``[N]``, by Euler's method; the same noise at every call."""
        size = len(classes), 1, self.side, self.side
        noise = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(self.device)
        parts = []
        for images, named in zip(noise.split(130), classes.split(130), strict=True):
            none = torch.full_like(named, self.classes)
            for step in range(STEPS):
                times = torch.full((len(named),), 1 - step / STEPS, device=self.device)
                velocity = model(images, times, named)
                if guidance != 1:
                    velocity = torch.lerp(model(images, times, none), velocity, guidance)
                images = images - velocity / STEPS
            parts.append(images)
        return torch.cat(parts)


make = Diffuse
