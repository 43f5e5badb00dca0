"""What all routed layers of one model share: the reserved length, and the key of the forward in progress."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ltd_fx.errors import LTDError
from ltd_fx.ops import draw_key
from ltd_fx.runtime.counts import TargetLayer, count_layers
from ltd_fx.runtime.ranks import draw_rank, refuse_differences
from ltd_fx.schedule import LTDScheduler, ReservedLength
from ltd_fx.torch_private import allow_side_effects

Protect = int | str | Callable[[Tensor], Tensor] | None


UNTESTED = "ltd_fx: layers' built-in patterns cannot be tested {}; pass example_inputs to ltd_fx.transform beforehand"


class Member(Protocol):
    """A site (``records.Site``), as far as the state that it shares looks at it."""

    name: str

    @property
    def drawn(self) -> Sequence[object]: ...
    def move(self, device: torch.device) -> None: ...


class RouteState:
    """Scheduler, seed and key of one transformed model; every site of it holds this object.

    The key is a 0-dim int64 tensor, *rebound* (never written into) at each training forward of the root: a compiled
    graph takes it as an input, so neither a new key nor a new length recompiles, and a key saved for a recompute stays
    what it was.
    """

    def __init__(
        self,
        scheduler: LTDScheduler | None,
        *,
        seed: int,
        shared: bool,
        routed: int,
        dense: int,
        shares: Mapping[float | None, int] = MappingProxyType({}),
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.seed = seed
        self.mesh = mesh
        self.rank = 0 if mesh is None else draw_rank(mesh)
        self.shared = shared
        self.dense = dense
        self.layers: Sequence[TargetLayer] = ()  # All target layers of the model, dense ones too.
        self._calls: dict[str, int] = {}  # How often one forward calls each routed layer.
        # How many routed layers have which share of their own, or none; and the lengths that they read.
        self.shares: dict[float | None, int] = {None: routed - sum(shares.values()), **shares}
        self.lengths = {share: ReservedLength(share) for share in self.shares}
        self.protect: Protect = None
        self.protected = 0  # So many first tokens are in every draw.
        self.mask_place = 0
        self.mask: Tensor | None = None  # The batch's mask, where `protect` names it.
        self.device = torch.device("cpu")
        self.sites: list[Member] = []
        self.warned = False
        self.untested = False  # Whether layers wait for a test of their built-in patterns, and nobody was told.
        self.root = ""  # The class of the module whose forwards bring new keys, if there is one.
        self.under_way = False  # Whether a training forward of that module is under way.
        self._grad = True  # Whether that forward has a backward.
        self._recomputable: tuple[Tensor, int] | None = None
        self._ambiguous = False
        self.begin_step(0 if scheduler is None else scheduler._step)

    def set_protect(self, protect: Protect, root: nn.Module) -> None:
        """Which tokens are kept first; see ``ltd_fx.transform``.

        Raises:
            LTDError: it is of another kind, more than the scheduler's min_length, or no argument of ``root``.
        """
        if isinstance(protect, str):
            parameters = list(inspect.signature(root.forward).parameters)
            if protect not in parameters:
                raise LTDError(f"ltd_fx.transform: protect={protect!r} is not an argument of the model's forward")
            self.mask_place = parameters.index(protect)
        elif isinstance(protect, int) and not isinstance(protect, bool) and protect >= 0:
            for share in self.shares:
                least = protect if self.scheduler is None else self.scheduler.least(share)
                if protect > least:
                    which = f"min_length={least}" if share is None else f"keep={share}, which starts at {least} tokens"
                    raise LTDError(f"ltd_fx.transform: protect={protect} tokens do not fit the scheduler's {which}")
            self.protected = protect
            protect = protect or None
        elif protect is not None and not callable(protect):
            raise LTDError(
                "ltd_fx.transform: protect must be a number of first tokens, a function of positions, or the name of "
                f"the model's [B, S] attention mask, got {protect!r}"
            )
        self.protect = protect

    def begin_step(self, step: int) -> None:
        """Rebind the key for the first forward of ``step``."""
        self.count_calls()
        self._step = step
        self.set_forward(0)

    def set_forward(self, forward: int) -> None:
        """Rebind the key as it is after ``forward`` training forwards of the current step."""
        # A fill is a kernel launch on an accelerator, where a copy from the host would synchronise.
        self.key = torch.full((), self._first_key() + forward, dtype=torch.int64, device=self.device)

    def _first_key(self) -> int:
        return draw_key(self.seed, self._step, self.rank)

    def begin_forward(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the root: the next key, for the forward that starts now.

        Raises:
            LTDError: the argument that ``protect`` names is no ``[B, S]`` mask.
        """
        if not root.training:
            return
        if isinstance(self.protect, str):
            place = self.mask_place
            given = kwargs.get(self.protect, args[place] if place < len(args) else None)
            if given is not None and not (isinstance(given, Tensor) and given.ndim == 2):
                got = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
                raise LTDError(
                    f"ltd_fx: protect={self.protect!r} names the batch's padding mask, which must be [B, S], but it is "
                    f"{got}; give the model that mask, or transform it with protect=None"
                )
            self.mask = given
        parameter = next(root.parameters(), None)
        if parameter is not None and parameter.device != self.device:
            self._move(parameter.device)
        self.key = self.key + 1
        self.under_way, self._grad = True, torch.is_grad_enabled()

    def begin_alone(self, name: str) -> None:
        """A routed layer is called by no forward of the root: a key of its own, so that it draws anew each time.

        Raises:
            LTDError: the draws need an argument of the root.
        """
        if isinstance(self.protect, str):
            raise LTDError(
                f"ltd_fx: {name} is called, but not by a call of the {self.root} that ltd_fx.transform was given, and "
                f"protect={self.protect!r} is an argument of that call. Call that module (not its forward method), or "
                "ltd_fx.restore it and transform the one that you call"
            )
        if not torch.compiler.is_compiling():
            self.warn_untested("where the model's forward, or a layer, is called past the model's own call")
        self.key = self.key + 1
        self._grad = True

    def warn_untested(self, where: str) -> None:
        """Say, once, that layers are routed by patterns that nothing has shown to be right."""
        if self.untested:
            self.untested = False
            warnings.warn(UNTESTED.format(where), stacklevel=2)

    def refuse_cache(self, name: str) -> None:
        """Raise :class:`LTDError`: ``name`` is given a key-value cache with tokens in training.

        Unless no layer drops any: the cache of a routed layer has the tokens only that it kept.
        """
        whole = None if self.scheduler is None else self.scheduler.max_length
        if whole is not None and all((length.published or 0) >= whole for length in self.lengths.values()):
            return
        raise LTDError(
            f"ltd_fx: {name} is given a key-value cache with tokens in training mode, of which routed layers would "
            "have those only that they kept; call model.eval() before generating, and train without a cache"
        )

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """As if a forward of the root were under way; its draws are nobody's, and no batch's mask is known."""
        names = ("key", "mask", "under_way", "warned", "_grad", "_recomputable", "_ambiguous")
        before = {name: getattr(self, name) for name in names}
        self.mask, self.under_way, self.warned = None, True, True
        try:
            yield
        finally:
            self.__dict__.update(before)

    def end_forward(self) -> None:
        """A training forward of the root is over."""
        self.under_way = False

    def count_calls(self) -> None:
        """Layers that a forward called more often than any before it count as often in layer tokens."""
        calls = {site.name: max(len(site.drawn), self._calls.get(site.name, 1)) for site in self.sites}
        if self.layers and calls != self._calls:
            self._calls = calls
            self.shares, self.dense = count_layers(self.layers, calls)

    def _move(self, device: torch.device) -> None:
        """Follow the model to ``device`` once, so that no forward copies the key or a site's number there."""
        self.device = device
        self.key = self.key.to(device)
        for site in self.sites:
            site.move(device)

    def guard_recompute(self, recomputing: bool) -> None:
        """Refuse a recompute that would draw other tokens; called by each routed layer in training, in eager mode.

        ``torch.utils.checkpoint`` around a routed layer calls it again in the backward pass, where the key must still
        be that of the original forward. It is, unless another forward came between; then nothing tells the two apart.

        Raises:
            LTDError: there was another forward since, or the scheduler stepped.
        """
        if not recomputing:
            if not self._grad:
                return  # No backward will follow.
            before = self._recomputable
            if before is None or before[0] is not self.key:
                self._ambiguous = before is not None and before[1] == self._step
                self._recomputable = (self.key, self._step)
        elif self._recomputable is None or self._recomputable[0] is not self.key or self._ambiguous:
            raise LTDError(
                "ltd_fx: activation checkpointing recomputes a routed layer, but the model ran another training "
                "forward since (or the scheduler stepped), so the layer would draw other tokens. Call backward() after "
                "each forward, or checkpoint inside the layer (transformers' gradient_checkpointing_enable() does)."
            )
        else:
            # The backward of this forward has begun, so the next forward is the only one that awaits a recompute.
            self._recomputable = (self.key, -1)

    # ---- resuming

    def position(self) -> dict[str, int]:
        """Where in the sequence of draws the model is: plain integers (reads the key back from its device).

        The same on every rank, so that one of them may save it for all, whatever their number when it is loaded.
        """
        return {"seed": self.seed, "forward": int(self.key) - self._first_key()}

    def check_position(self, position: Any) -> None:
        """Raise :class:`LTDError` unless ``position`` is one of this state's."""
        fields = position if isinstance(position, Mapping) else {}
        if fields.keys() != {"seed", "forward"} or not all(isinstance(value, int) for value in fields.values()):
            raise LTDError(
                f"LTDScheduler: the state_dict's draws must hold the integers seed and forward: {position!r}"
            )
        if position["seed"] != self.seed:
            raise LTDError(
                f"LTDScheduler: the state_dict was drawn with seed={position['seed']}, the model was transformed with "
                f"seed={self.seed}; pass the same seed to ltd_fx.transform"
            )

    def resume(self, position: Mapping[str, int]) -> None:
        self.set_forward(position["forward"])

    @property
    def spans_ranks(self) -> bool:
        """Whether a mesh was given, whose ranks must agree."""
        return self.mesh is not None

    def check_ranks(self) -> None:
        """Collective: raise :class:`LTDError` unless all ranks are at the same place of the same schedule.

        Seeds may differ where no mesh was given: that is how ranks are made to draw differently by hand.
        """
        values: dict[str, Any] = self.position()
        if self.mesh is None:
            del values["seed"]
        if self.scheduler is not None:
            values |= {"scheduler": self.scheduler._config(), "step": self._step}
            values["lengths"] = {share: self.scheduler.length_at(self._step, share) for share in self.shares}
        refuse_differences(values, self.mesh)

    def __getstate__(self) -> dict[str, Any]:
        """For ``torch.save(model)``: without the batch and the process group."""
        return {**self.__dict__, "mask": None, "mesh": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouteState":
        """Copies of a model follow the same scheduler: it is the user's one handle on the length."""
        return self


def record(function: Callable[..., None], *args: Any) -> None:
    """Call ``function``, which writes down what a forward did in attributes of ours.

    Within ``torch.utils.checkpoint``, Dynamo refuses to trace a write to what is outside, since the recompute repeats
    it. What is written here is the same then.
    """
    if torch.compiler.is_compiling():
        allow_side_effects(function, *args)
    else:
        function(*args)
