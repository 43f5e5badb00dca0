"""The images of the study, the distance between sets of them, and the model that makes them."""

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")

import glyphs
from dit import DiT
from features import frechet_distance


def test_letters(tmp_path, monkeypatch) -> None:
    """The same images again, others from another seed, and none of a face in both parts."""
    monkeypatch.setattr(glyphs, "SCRATCH", tmp_path)
    train, held_out, again = (glyphs.letters(5, 1, held_out=out) for out in (False, True, False))
    assert torch.equal(train.pixels, again.pixels)
    assert len(held_out) == 5 * len(glyphs.HELD_OUT)
    assert len(train) + len(held_out) == 5 * len(glyphs.font_files())
    assert train.pixels.shape[1:] == (1, 16, 16)
    assert (train.pixels.min(), train.pixels.max()) >= (-1, 0.5)
    assert train.labels[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert not torch.equal(train.pixels, glyphs.letters(5, 1, seed=1).pixels)


def test_the_alphabet_has_no_two_letters_that_look_the_same() -> None:
    letters = glyphs.alphabet()
    assert letters[:3] == ["A", "B", "C"]
    assert {"Б", "Ω"} <= set(letters)
    assert not {"\u0410", "\u0391"} & set(letters)  # A of Cyrillic and Greek


def test_frechet_distance() -> None:
    """Of Gaussians with diagonal covariances: by the formula, one dimension at a time."""
    random = np.random.default_rng(0)
    first, second = (torch.tensor(random.normal(size=(4000, 3)) * scale + mean) for scale, mean in ((1, 0), (3, 2)))
    expected = 3 * (2**2 + (3 - 1) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=0.05)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_the_model_patches_images_and_back() -> None:
    torch.manual_seed(0)
    model = DiT(16, 2, 5, 32, 2, 4)
    images, times, classes = torch.randn(3, 1, 16, 16), torch.rand(3), torch.tensor([0, 4, 5])
    assert torch.equal(model(images, times, classes), torch.zeros_like(images))  # its head starts at zero
    torch.nn.init.eye_(model.head.weight)
    torch.nn.init.eye_(model.embed.weight)
    torch.nn.init.zeros_(model.embed.bias)
    model.norm = torch.nn.Identity()
    torch.nn.init.zeros_(model.position)
    torch.testing.assert_close(model(images, times, classes), images)
