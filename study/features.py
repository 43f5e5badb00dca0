"""A small convolutional classifier of letters, whose features measure how far samples are from images."""

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from files import SCRATCH, write
from glyphs import letters
from torch import Tensor, nn

STEPS, BATCH = 600, 128


class FeatureNet(nn.Module):
    """Images ``[N, 1, H, W]``, looked at as 16 x 16 pixels, to logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.GELU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.GroupNorm(4, 48), nn.GELU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * 16, 64), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        """``[N, 64]``."""
        return torch.cat([self.layers(F.adaptive_avg_pool2d(part, 16)) for part in images.split(256)])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def trained(classes: int) -> FeatureNet:
    """The judge of samples, trained once, on images that no diffusion model sees."""
    path = SCRATCH / f"judge-{classes}-{torch.__version__}.pt"
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        net = FeatureNet(classes)
        if path.exists():
            net.load_state_dict(torch.load(path, weights_only=True))
        else:
            fit(net, classes)
            write(path, lambda scratch: torch.save(net.state_dict(), scratch))
    return net.eval()


def fit(net: FeatureNet, classes: int) -> None:
    images = letters(classes, 24, seed=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,))
        F.cross_entropy(net(images.pixels[chosen]), images.labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()


def frechet_distance(samples: Tensor, images: Tensor) -> float:
    """Between Gaussians with the moments of features ``[N, F]`` and ``[M, F]`` (FID, arXiv 1706.08500, equation 6)."""
    first, second = (features.double().cpu().numpy() for features in (samples, images))
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    mean = np.square(first.mean(0) - second.mean(0)).sum()
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(mean + np.trace(covariances[0] + covariances[1] - 2 * root))
