"""What a transformed model of transformers must equal: dense layers with attention to the dropped tokens blocked."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run_blocked(model: nn.Module, draws: Mapping[str, Tensor], allowed: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """The logits of ``model``, untransformed and on eager attention; each layer of ``draws`` runs dense on all tokens,
    with the keys of dropped ones blocked, and dropped tokens pass it unchanged.

    Args:
        model: its layers' forwards are changed for good.
        draws: by layer, the rows ``[B, k]`` that it keeps.
        allowed: by layer, bool ``[B | 1, S, S]``, who may attend to whom.
        inputs: keyword arguments.
    """
    for name, rows in draws.items():
        layer = model.get_submodule(name)
        layer.forward = _blocked(layer.forward, rows, allowed[name])  # type: ignore[method-assign]
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def _blocked(forward: Any, rows: Tensor, allowed: Tensor) -> Any:
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = torch.zeros(hidden.shape[:2], dtype=torch.bool).scatter(1, rows, True)
        mask = torch.zeros(len(hidden), 1, *allowed.shape[1:], dtype=hidden.dtype)
        mask.masked_fill_(~(allowed & kept[:, None])[:, None], torch.finfo(hidden.dtype).min)
        kwargs["attention_mask"] = mask
        assert not args
        out = forward(hidden, **kwargs)
        made = out[0] if isinstance(out, tuple) else out
        merged = torch.where(kept[..., None], made, hidden)
        return (merged, *out[1:]) if isinstance(out, tuple) else merged

    return run


def documents_mask(lengths: list[int], window: int | None = None) -> Tensor:
    """``[1, S, S]`` bool: causal, within documents, and within a window of so many tokens."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(number))
    behind = place[:, None] - place[None]
    allowed = (number[:, None] == number[None]) & (behind >= 0)
    return (allowed if window is None else allowed & (behind < window))[None]
