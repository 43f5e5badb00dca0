"""Letters drawn from the fonts that matplotlib ships, and scikit-learn's digits, 8 x 8 pixels."""

import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from files import SCRATCH, write
from PIL import Image, ImageDraw, ImageFont
from PIL.features import version
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SUPERSAMPLED = 4  # each way
HELD_OUT = ("DejaVuSansMono-Oblique", "DejaVuSerif-BoldItalic", "STIXGeneral")  # faces
FIRST, LAST = 0x41, 0x4FF  # Latin, Greek and Cyrillic


@dataclass(frozen=True)
class Images:
    """Pixels in [-1, 1], float32 ``[N, 1, H, W]``, and classes, int64 ``[N]``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def digits() -> tuple[Images, Images]:
    """1,437 images to train on, and 360 held out."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    parts = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=labels)
    train, held_out = (Images(images[part], torch.tensor(labels[part])) for part in parts)
    return train, held_out


def letters(classes: int, copies: int, side: int = 16, *, held_out: bool = False, seed: int = 0) -> Images:
    """``copies`` images of each of the first ``classes`` letters in each face: moved, turned and scaled at random.

    Args:
        side: of the images, in pixels.
        held_out: the faces that no model is trained on, instead of the others.
        seed: of how each is moved; another one makes other images of the same faces.
    """
    name = f"letters-{classes}-{copies}-{side}-{held_out:d}-{seed}-{matplotlib.__version__}-{version('freetype2')}.pt"
    if not (SCRATCH / name).exists():
        random = np.random.default_rng(seed)
        chosen = alphabet()[:classes]
        faces = [ImageFont.truetype(path) for path in font_files() if (path.stem in HELD_OUT) == held_out]
        pixels = [draw(letter, face, side, random) for _ in range(copies) for face in faces for letter in chosen]
        write(SCRATCH / name, lambda path: torch.save(torch.tensor(np.stack(pixels)), path))
    drawn = torch.load(SCRATCH / name, weights_only=True)
    return Images(drawn[:, None].float() / 127.5 - 1, torch.arange(classes).repeat(len(drawn) // classes))


def draw(letter: str, face: ImageFont.FreeTypeFont, side: int, random: np.random.Generator) -> np.ndarray:
    """One image, uint8 ``[side, side]``."""
    canvas = SUPERSAMPLED * side
    image = Image.new("L", (canvas, canvas))
    x, y = canvas * (0.5 + random.uniform(-0.08, 0.08, 2))
    sized = face.font_variant(size=round(canvas * random.uniform(0.6, 0.88)))
    ImageDraw.Draw(image).text((x, y), letter, 255, sized, anchor="mm")
    turned = image.rotate(random.uniform(-12, 12), Image.Resampling.BILINEAR)
    return np.asarray(turned.resize((side, side), Image.Resampling.BOX))


def font_files() -> list[Path]:
    """The text faces of matplotlib's fonts."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(
        path
        for path in folder.glob("*.ttf")
        if path.stem.startswith(("DejaVu", "STIXGeneral")) and "Display" not in path.stem
    )


@cache
def alphabet() -> list[str]:
    """Letters that every face has, without accents, those that look the same (A, Alpha) once; Latin ones first."""
    faces = [ImageFont.truetype(path, 32) for path in font_files()]
    seen: set[bytes] = set()
    chosen = []
    for letter in map(chr, range(FIRST, LAST + 1)):
        if not unicodedata.category(letter).startswith("L") or unicodedata.decomposition(letter):
            continue
        looks = {bytes(face.getmask(letter)) for face in faces}
        missing = {bytes(face.getmask("\uffff")) for face in faces}
        plain = bytes(faces[0].getmask(letter))
        if not looks & missing and plain not in seen:
            seen.add(plain)
            chosen.append(letter)
    return chosen
