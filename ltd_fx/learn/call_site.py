"""The record of a target layer, from finding it to reporting it, and that of its proof."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from ltd_fx.learn.layer_pattern import LayerPattern


@dataclass(frozen=True)
class Proof:
    """What was found for one routed layer.

    Attributes:
        name: fully qualified name.
        layer_class: name of its class.
        status: ``"proven"``, by token flow, and not contradicted by the numerical test; ``"tested"``, by that alone, at
            as many tokens as it had; ``"wrong"``: kept rows differ or the layer fails on fewer tokens;
            ``"not verifiable"``: the dense layer's attention to dropped tokens could not be blocked, or the layer does
            not run.
        error: largest difference of the kept rows, relative to the reference's largest value; ``None`` if not measured.
        reason: why it is no more than that.
        learnt: what told which sizes follow the tokens: the model's forward at ``"symbolic sizes"``; the layer's own,
            or a guess, at ``"one length"``; forwards at ``"other sizes"``; ``"a known pattern"``.
        counts: whether the layer makes tensors as long as the sequence by itself (positions, windows), so that the
            proof holds up to the length it was made at.
    """

    name: str
    layer_class: str
    status: str
    error: float | None = None
    reason: str = ""
    counts: bool = False
    learnt: str = ""

    @property
    def right(self) -> bool:
        """Whether it is proven or tested."""
        return self.status in ("proven", "tested")


@dataclass(frozen=True)
class CallSite:
    """One layer of a stack: found, then chosen to be routed or not, then examined, then reported.

    Attributes:
        name: fully qualified name.
        layer_class: name of its class.
        stack: fully qualified name of the parent it shares with the rest of its stack.
        routed: whether it sees a subset of the tokens in training.
        reason: of a dense layer, why.
        pattern: how it is routed; ``None`` of a dense layer, or while it is yet to be inferred.
        vouched: whether the user registered that pattern: it is trusted where nothing is shown for or against it.
        proof: that it is right; ``None`` where no forward has shown how the layer is called.
        graph: the rewritten graph that the layer runs; ``None`` of a dense layer.
        share: of the tokens, that it keeps where the schedule starts; ``None``: the scheduler's ``min_length``.
        route: name of the layer whose draw it uses, on a route over several layers; ``None``: its own.
        leaves: whether dropped tokens return after it, rather than after a later layer of its route.
    """

    name: str
    layer_class: str
    stack: str
    routed: bool = False
    reason: str = ""
    pattern: LayerPattern | None = None
    vouched: bool = False
    proof: Proof | None = None
    graph: fx.Graph | None = None
    share: float | None = None
    route: str | None = None
    leaves: bool = True

    @property
    def enters(self) -> bool:
        """Whether tokens leave at this layer, rather than at an earlier layer of its route."""
        return self.route in (None, self.name)

    @property
    def status(self) -> str:
        """Of a routed layer: ``"proven"``, ``"tested"``, ``"trusted"`` or, as yet, ``"to be tested"``."""
        if self.proof is None:
            return "to be tested"
        return self.proof.status if self.proof.right else "trusted"

    @property
    def known_pattern(self) -> LayerPattern:
        """The pattern, where there is one: from the moment the layer is examined."""
        assert self.pattern is not None
        return self.pattern

    @property
    def aligned(self) -> dict[str, tuple[Any, ...] | str]:
        """Per argument, the dimensions gathered with the tokens, or the name of the function that gathers it."""
        entries = self.pattern.aligned.items() if self.pattern is not None else ()
        named = {name: getattr(e, "__name__", repr(e)) if callable(e) else e for name, e in entries}
        return {name: entry for name, entry in named.items() if entry != ()}

    def _tokens(self) -> str:
        if not self.routed:
            return "dense"
        share = "" if self.share is None else f" {self.share:.0%}"
        return f"routed{share}" if self.enters else f"as {self.route}"

    def _why(self) -> str:
        if not self.routed:
            return self.reason
        if self.pattern is None:
            return "to be inferred at the first training forward"
        if self.proof is None:
            whose = "registered" if self.vouched else "built-in"
            return f"{whose} pattern, to be tested at the first training forward"
        error = "" if self.proof.error is None else f", error {self.proof.error:.0e}"
        if self.proof.status == "proven":
            return f"proven{error}"
        if self.proof.status == "tested":
            return f"tested{error}; not proven: {self.proof.reason}"
        return f"trusted, by its LayerPattern; not verifiable: {self.proof.reason}"
