"""The patterns that a layer could have, the likeliest first; which of them holds is for the proof to tell."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.learn.infer import infer_pattern, per_head, with_positions
from ltd_fx.learn.layer_pattern import LayerPattern
from ltd_fx.learn.observe import Call, describe, observe
from ltd_fx.learn.probe import Probe, batch_probes, by_name, length_probes
from ltd_fx.learn.sandbox import Sandbox
from ltd_fx.learn.symbolic import SymbolicCalls, boundary_probe

# Where the length is fixed, a table may have so many rows more or fewer than there are tokens (class and register
# tokens); whether it follows the tokens is for the proof to tell.
_NEAR = sorted(range(-8, 9), key=abs)


class Learner:
    """Learns the layers of a model that is seen through its example inputs.

    What follows the tokens is read off one forward at symbolic sizes, where the model runs on them; of a model of one
    length, off the layer's own forward. Else it is learnt from forwards at other sizes.

    Args:
        model: left as it was.
        slots: its layers by fully qualified name.
        inputs: (args, kwargs), as values.
        calls: the first call of each layer with them.
        sandbox: of the model.
        kinds: of the layers, as for :func:`observe`.
        training: the mode of the model.
        fake: whether it runs on fake tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Mapping[str, nn.Module],
        inputs: Any,
        calls: Mapping[str, Call],
        *,
        sandbox: Sandbox,
        kinds: Mapping[str, Any],
        training: bool,
        fake: bool,
    ) -> None:
        self._model, self._slots, self._inputs, self._calls = model, slots, inputs, calls
        self._how: dict[str, Any] = {"sandbox": sandbox, "kinds": kinds, "training": training}
        self._sandbox, self._fake = sandbox, fake
        self._boundaries: dict[str, Probe] = {}
        self._probed: dict[int, tuple[list[Probe], list[Probe]]] = {}

    def probes(self, seq_dim: int) -> tuple[list[Probe], list[Probe]]:
        """Of other lengths and of other batch sizes: the forward at symbolic sizes where there was one, or others.

        Where a pattern is known and holds, nothing has to be learnt, and those at other sizes take less time.
        """
        symbolic = vars(self).get("_symbolic")
        if symbolic is None:
            return self._resized(seq_dim)
        return symbolic.probes(seq_dim), symbolic.probes(1 - seq_dim)

    def hypotheses(self, name: str, layer_class: type[nn.Module]) -> Iterator[tuple[LayerPattern, str]]:
        """What the patterns of a layer could be, each with what it was learnt from; see :attr:`Proof.learnt`.

        Raises:
            LTDError: none can be inferred.
        """
        seen: list[LayerPattern] = []
        failure = ""
        for seq_dim in (1, 0):
            for learnt, lengths, batches in self._ways(name, seq_dim):
                ways: list[Probe | None] = [*batches] or [None]
                for batch, near in itertools.product(ways, (0,) if lengths else _NEAR):
                    try:
                        pattern = infer_pattern(
                            name, layer_class, self._calls[name], lengths, batch, seq_dim, near=near
                        )
                    except LTDError as error:
                        failure = failure or str(error)
                        continue
                    for hypothesis in (pattern, per_head(pattern), with_positions(pattern, layer_class)):
                        if hypothesis not in seen:
                            seen.append(hypothesis)
                            yield hypothesis, learnt
        # The usual layout could not even be inferred: the user is told that, not what became of the other one.
        if failure and not any(pattern.batch_first for pattern in seen):
            raise LTDError(failure)

    def _ways(self, name: str, seq_dim: int) -> Iterator[tuple[str, list[Probe], list[Probe]]]:
        """Probes to learn a layer by, the most exact first."""
        if self._symbolic is not None:
            lengths, batches = self.probes(seq_dim)
            if isinstance(self._symbolic.size(name, seq_dim), int):  # The model has one length.
                with suppress(LTDError):
                    yield "one length", [self._boundary(name)], batches
            else:
                yield "symbolic sizes", lengths, batches
        lengths, batches = self._resized(seq_dim)
        yield "other sizes" if lengths else "one length", lengths, batches

    @cached_property
    def _symbolic(self) -> SymbolicCalls | None:
        try:
            return SymbolicCalls(self._model, self._slots, describe(*self._inputs), **self._how) if self._fake else None
        except LTDError:
            return None

    def _boundary(self, name: str) -> Probe:
        if name not in self._boundaries:
            self._boundaries[name] = boundary_probe(self._slots[name], self._calls[name], sandbox=self._sandbox)
        return self._boundaries[name]

    def _resized(self, seq_dim: int) -> tuple[list[Probe], list[Probe]]:
        if seq_dim not in self._probed:
            inputs = describe(*self._inputs) if self._fake else self._inputs
            lengths = length_probes(self._forward, inputs, self._calls, seq_dim)
            batches = batch_probes(self._forward, inputs, self._calls, lengths, seq_dim)
            self._probed[seq_dim] = lengths, batches
        return self._probed[seq_dim]

    def _forward(self, inputs: Any) -> Mapping[str, Call]:
        return by_name(observe(self._model, self._slots, inputs, fake=self._fake, **self._how))
