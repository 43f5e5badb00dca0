"""How many tokens the routed layers keep at each step, and how many layer tokens that has cost.

A layer token is one token passing through one layer (random-LTD, arXiv 2211.11586, section 3).
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ltd_fx.errors import LTDError
from ltd_fx.schedule.configuration import DIGEST, digest, refuse_other
from ltd_fx.schedule.driven import Driven
from ltd_fx.schedule.length import ReservedLength

Kind = str | Callable[[int], int]

# Progress through the schedule, t = step / total_steps in [0, 1), to the share of the way from min to max length.
_CURVES: dict[str, Callable[[float, int], float]] = {
    "constant": lambda t, degree: 0.0,
    "root": lambda t, degree: t ** (1 / degree),
    "cosine": lambda t, degree: (1 - math.cos(math.pi * t)) / 2,
    "step": lambda t, degree: 0.0,
}


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LTDError(f"LTDScheduler: {name} must be an integer >= {least}, got {value!r}")
    return value


class LTDScheduler:
    """The reserved length: the number of tokens that a routed layer keeps, growing with the training step.

    Args:
        min_length: length at step 0, in tokens; rounded up to a multiple of ``multiple_of``.
        max_length: the full sequence length, in tokens, at which the layers are dense again.
        total_steps: steps from ``min_length`` to ``max_length``.
        multiple_of: lengths between the two are rounded down to a multiple of this.
        kind: the shape of the growth over t = step / total_steps:

            - ``"linear"``: floor(t * (max - min) + min), which goes on past ``total_steps`` until the rounded length
              reaches ``max_length`` (DeepSpeed's ``fixed_linear``);
            - ``"root"``: t ** (1 / degree) of the way, ``"cosine"``: (1 - cos(pi * t)) / 2 of the way, both full from
              ``total_steps`` on;
            - ``"step"``: ``min_length`` before ``total_steps``, ``max_length`` from there on;
            - ``"constant"``: ``min_length`` for ever;
            - a callable ``step -> length``, rounded and clamped like the others.
        degree: of ``"root"``: 2 is the square root.
        global_batch_size: sequences per step over all ranks, for counting layer tokens; ``None`` counts per sequence.
        relative: for batches of different lengths, and stacks of different lengths: lengths are those of sequences of
            ``max_length`` tokens, and sequences of S tokens keep length * S / max_length of them, rounded down to a
            whole token, at least one. Without it, they keep ``length`` tokens, and all where S is no more than that.

    Raises:
        LTDError: for an argument out of range or an unknown kind.
    """

    _digest: str | None = None  # The digest of a callable's lengths, once it was asked for.

    def __init__(
        self,
        min_length: int,
        max_length: int,
        total_steps: int,
        *,
        multiple_of: int = 1,
        kind: Kind = "linear",
        degree: int = 2,
        global_batch_size: int | None = None,
        relative: bool = False,
    ) -> None:
        self.min_length = _integer("min_length", min_length, 1)
        self.max_length = _integer("max_length", max_length, 1)
        self.total_steps = _integer("total_steps", total_steps, 1)
        self.multiple_of = _integer("multiple_of", multiple_of, 1)
        self.degree = _integer("degree", degree, 1)
        if min_length > max_length:
            raise LTDError(f"LTDScheduler: min_length={min_length} is above max_length={max_length}; swap or lower it")
        if not callable(kind) and kind not in ("linear", *_CURVES):
            known = ", ".join(sorted((*_CURVES, "linear")))
            raise LTDError(f"LTDScheduler: unknown kind {kind!r}; use one of {known}, or a callable step -> length")
        self.kind = kind
        self.global_batch_size = (
            None if global_batch_size is None else _integer("global_batch_size", global_batch_size, 1)
        )
        if not isinstance(relative, bool):
            raise LTDError(f"LTDScheduler: relative must be True or False, got {relative!r}")
        self.relative = relative
        self._state: Driven | None = None
        self._awaited = False  # Whether a backend will attach it, at the first training forward.
        self._draws: Mapping[str, int] | None = None  # What was loaded before that.
        # For each share, the length now, and the sum of the lengths of the steps so far.
        self._lengths: dict[float | None, ReservedLength] = {None: ReservedLength()}
        self._sums: dict[float | None, int] = {None: 0}
        self._step = 0
        self._refresh()

    def length_at(self, step: int, share: float | None = None) -> int:
        """The reserved length at ``step``, in tokens: a pure function of the configuration.

        Layers with a ``share`` of their own start from ``share * max_length`` tokens instead of ``min_length``, and
        are full when the others are: how many more tokens they drop, or fewer, stays in proportion.

        Raises:
            LTDError: ``step`` is no integer of 0 or more, or a ``kind`` of one's own gives no integer there.
        """
        length = self._unrounded(_integer("step", step, 0))
        if share is not None:
            span, own = self.max_length - self.min_length, self.max_length - self.least(share)
            length = self.max_length - (self.max_length - length) * own / span if span else float(self.max_length)
        if length >= self.max_length and self.kind != "linear":
            return self.max_length  # It is reached also where it is no multiple; linear goes on to the next one.
        # Half of the way must not be a rounding error less. DeepSpeed's own formula is left as it is.
        rounded = math.floor(length if self.kind == "linear" and share is None else length + 1e-9)
        rounded -= rounded % self.multiple_of
        least = -(-self.least(share) // self.multiple_of) * self.multiple_of
        return min(max(rounded, least), self.max_length)

    def least(self, share: float | None = None) -> int:
        """The length, in tokens, that the schedule starts from: ``min_length``, or ``share`` of ``max_length``."""
        return self.min_length if share is None else ReservedLength(share).share_of(self.max_length)

    def _unrounded(self, step: int) -> float:
        span = self.max_length - self.min_length
        if callable(self.kind):
            length = self.kind(step)
            if isinstance(length, bool) or not isinstance(length, int):
                raise LTDError(f"LTDScheduler: kind({step}) must return an integer length, got {length!r}")
            return length
        if self.kind == "linear":
            return step / self.total_steps * span + self.min_length
        if self.kind != "constant" and step >= self.total_steps:
            return self.max_length
        return _CURVES[self.kind](step / self.total_steps, self.degree) * span + self.min_length

    @property
    def reserved_length(self) -> int:
        """The number of tokens that routed layers keep now, unless they have a share of their own.

        With ``relative``, of sequences of ``max_length`` tokens.
        """
        length = self._lengths[None].published
        assert length is not None
        return length

    def step(self) -> None:
        """Go on by one training step; call it after ``optimizer.step()``."""
        if self._state is not None:
            self._state.refuse_step()
        if self._awaited:
            self._awaited = False
            warnings.warn(
                "ltd_fx.backend: no training forward was compiled before scheduler.step(), so all tokens went through "
                "all layers: compile the module that calls them, with fullgraph=True to see what torch.compile skips",
                stacklevel=2,
            )
        for share in self._sums:
            self._sums[share] += self.length_at(self._step, share)
        self._step += 1
        self._refresh()

    def set_step(self, global_step: int) -> None:
        """Go to ``global_step``, as if :meth:`step` had been called that many times from the start.

        Raises:
            LTDError: ``global_step`` is no integer of 0 or more.
        """
        steps = _integer("global_step", global_step, 0)
        if self._state is not None:
            self._state.refuse_step()
        self._sums = {share: self._sum(steps, share) for share in self._lengths}
        self._step = steps
        self._refresh()

    @property
    def consumed_layer_tokens(self) -> int:
        """Layer tokens of the steps taken so far; see :meth:`total_layer_tokens`."""
        return self._layer_tokens(self._step, self._sums)

    def total_layer_tokens(self, steps: int) -> int:
        """Layer tokens of the first ``steps`` steps: per step, global_batch_size * (length * routed layers +
        max_length * dense layers), as in random-LTD (arXiv 2211.11586, section 3.3). Pure.

        Every sequence counts as one of ``max_length`` tokens, however long the batches are and whatever of them is
        padding. With ``relative``, the share that is saved is that of shorter sequences too, but for rounding.

        Raises:
            LTDError: before the scheduler is attached to a model, which knows the layer counts.
        """
        _integer("steps", steps, 0)
        return self._layer_tokens(steps, {share: self._sum(steps, share) for share in self._lengths})

    def _sum(self, steps: int, share: float | None) -> int:
        return sum(self.length_at(step, share) for step in range(steps))

    def _layer_tokens(self, steps: int, sums: Mapping[float | None, int]) -> int:
        if self._state is None:
            raise LTDError("LTDScheduler: layer tokens need the layer counts; pass the scheduler to ltd_fx.transform")
        self._state.count_calls()
        shares, dense = self._state.shares, self._state.dense
        routed = sum(count * sums[share] for share, count in shares.items())
        return (self.global_batch_size or 1) * (routed + steps * self.max_length * dense)

    def metrics(self) -> dict[str, float]:
        """For logs, after :meth:`step`.

        ``ltd_reserved_length`` is what the layers kept in the latest step, ``ltd_layer_tokens`` is consumed so far, and
        ``ltd_saved`` is the share of layer tokens saved so far, against ``max_length`` tokens in all layers.

        Raises:
            LTDError: before the scheduler is attached to a model, or before its first step.
        """
        if self._step == 0:
            raise LTDError("LTDScheduler: metrics() tells of the steps taken, and there are none; call step() first")
        dense = self._layer_tokens(self._step, dict.fromkeys(self._sums, self._step * self.max_length))
        return {
            "ltd_reserved_length": self.length_at(self._step - 1),
            "ltd_layer_tokens": self.consumed_layer_tokens,
            "ltd_saved": 1 - self.consumed_layer_tokens / dense,
        }

    @property
    def attached(self) -> bool:
        """Whether the scheduler drives a model that is transformed, or compiled with ``ltd_fx.backend``."""
        return self._state is not None or self._awaited

    def _attach(self, state: Driven | None) -> None:
        """Drive ``state``'s model, whose layers read the lengths in ``state.lengths``; ``None``: no model."""
        if state is not None and self._draws is not None:
            state.check_position(self._draws)
            state.resume(self._draws)
        self._state, self._awaited, self._draws = state, False, None
        self._lengths = {None: self._lengths[None], **(state.lengths if state is not None else {})}
        self._sums = {share: self._sum(self._step, share) for share in self._lengths}
        self._publish()

    def _publish(self) -> None:
        for share, length in self._lengths.items():
            length.publish(self.length_at(self._step, share), self.max_length if self.relative else None)

    def _refresh(self) -> None:
        """Publish the lengths of the current step, and the key of its first forward."""
        self._publish()
        if self._state is not None:
            self._state.begin_step(self._step)

    # ---- resuming

    def _config(self) -> dict[str, Any]:
        fields = ("min_length", "max_length", "total_steps", "multiple_of", "degree", "global_batch_size", "relative")
        config = {"kind": self.kind, **{field: getattr(self, field) for field in fields}}
        if callable(self.kind):
            if self._digest is None:
                self._digest = digest(self.length_at, self.total_steps)
            config |= {"kind": getattr(self.kind, "__qualname__", type(self.kind).__qualname__), DIGEST: self._digest}
        return config

    def state_dict(self) -> dict[str, Any]:
        """Plain values that resume the schedule and, once attached, the very same draws."""
        draws = None if self._state is None else self._state.position()
        return {"config": self._config(), "step": self._step, "draws": draws}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`. Attach the scheduler (``ltd_fx.transform``) first to resume its draws.

        With a ``device_mesh`` it is a collective: every rank calls it.

        Raises:
            LTDError: the state is of another configuration (the differing field is named), or malformed; or, with a
                ``device_mesh``, the ranks have loaded different ones.
        """
        expected = {"config", "step", "draws"}
        if not isinstance(state_dict, Mapping) or set(state_dict) != expected:
            raise LTDError(f"LTDScheduler: a state_dict has the entries {sorted(expected)}, got {state_dict!r}")
        if not isinstance(state_dict["config"], Mapping):
            raise LTDError(f"LTDScheduler: the state_dict's config is not a mapping: {state_dict['config']!r}")
        _integer("step", state_dict["step"], 0)
        refuse_other(self._config(), state_dict["config"])
        draws = state_dict["draws"]
        if draws is not None and self._state is None and not self._awaited:
            raise LTDError("LTDScheduler: pass the scheduler to ltd_fx.transform before load_state_dict, or set_step")
        if draws is not None and self._state is not None:
            self._state.check_position(draws)
        self.set_step(state_dict["step"])
        if draws is not None and self._state is not None:
            self._state.resume(draws)
        self._draws = None if self._state is not None else draws
        if self._state is not None and self._state.spans_ranks:
            self._state.check_ranks()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LTDScheduler":
        """A scheduler at the same step that drives no model: two would contend for one model's draws."""
        other = object.__new__(type(self))
        other.__dict__.update(
            self.__dict__, _state=None, _awaited=False, _draws=None, _lengths={None: ReservedLength()}
        )
        other._attach(None)
        return other
