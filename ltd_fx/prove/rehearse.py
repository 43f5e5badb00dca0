"""One forward of the whole model with its layers routed, before anybody's training: does it run?

What a model takes from inside its layers (router logits, for a loss that counts them under the padding mask) has the
kept tokens only, and nothing of that shows where the layers are proven one by one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.learn import Sandbox, describe, run_forward
from ltd_fx.runtime import Site


def rehearse(model: nn.Module, sites: list[Site], inputs: Any, *, sandbox: Sandbox, fake: bool) -> None:
    """Run the model in training mode, with its layers routed to half of the tokens.

    Args:
        model: left as it was.
        sites: of its layers, in place.
        inputs: (args, kwargs), as values.
        sandbox: of the model.
        fake: on fake tensors.

    Raises:
        LTDError: it fails, and does not with its layers dense.
    """
    try:
        with _halved(sites):
            _run(model, sites, inputs, sandbox, fake, routed=True)
    except LTDError as failure:
        try:
            _run(model, sites, inputs, sandbox, fake, routed=False)
        except LTDError:  # for want of targets, or on fake tensors: it is not the routing
            return
        raise LTDError(
            f"{failure}; it does not with its layers dense. Does it take something from inside them, which has the "
            "kept tokens only (output_router_logits with a padding mask)? Turn that off, or leave the layers out with "
            "transform(..., layers=...)"
        ) from None


def _run(model: nn.Module, sites: list[Site], inputs: Any, sandbox: Sandbox, fake: bool, *, routed: bool) -> None:
    mode = sandbox.mode if fake else None
    with sandbox.open(fake=mode), torch.no_grad():
        nn.Module.train(model)  # An exported program refuses it.
        for site in sites:
            site.layer.train(routed)
        run_forward(model, describe(*inputs) if fake else inputs, mode)


class _Half:
    """In place of a reserved length: half of the tokens, and no fewer than are protected."""

    def __init__(self, protected: int) -> None:
        self._protected = protected

    def tokens(self, seq_len: int) -> int:
        return max(seq_len // 2, min(self._protected, seq_len), 1)


@contextmanager
def _halved(sites: list[Site]) -> Iterator[None]:
    """The sites keep half of the tokens, whatever the scheduler says, and forget it afterwards."""
    state, lengths = sites[0].state, [site.length for site in sites]
    with state.rehearsal():
        for site in sites:
            site.length = _Half(state.protected)
        try:
            yield
        finally:
            for site, length in zip(sites, lengths, strict=True):
                site.length = length
                site.begin_forward()
                if site.span is not None:
                    site.span.close()
