"""What all routed layers of one model share: the reserved length, and the key of the forward in progress."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ltd_fx.errors import LTDError
from ltd_fx.ops import draw_key
from ltd_fx.runtime.counts import TargetLayer, count_layers
from ltd_fx.runtime.documents import Documents, find_documents
from ltd_fx.runtime.eager import Together
from ltd_fx.runtime.preferences import Batch, Preferences
from ltd_fx.runtime.ranks import draw_rank, refuse_differences
from ltd_fx.runtime.recomputes import Recomputes
from ltd_fx.schedule import LTDScheduler, ReservedLength, refuse_position
from ltd_fx.torch_private import allow_side_effects, mark_static

UNTESTED = "ltd_fx: layers' patterns cannot be tested {}; pass example_inputs to ltd_fx.transform beforehand"


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
        self.preferences = Preferences()
        self.protected = 0  # So many first tokens are in every draw.
        self.batch = Batch()  # What the forward's arguments say of which to keep.
        self.documents = Documents()
        self.together = Together()
        self.device = torch.device("cpu")
        self.sites: list[Member] = []
        # ``[N]`` by share: sites that draw in one operator of a compiled graph. None: layers are compiled one by one.
        self.numbers: dict[float | None, torch.Tensor] | None = {}
        self.warned = False
        self.untested = False  # Whether layers wait for a test of their patterns, and nobody was told.
        self.root = ""  # The class of the module whose forwards bring new keys, if there is one.
        self.under_way = False  # Whether a training forward of that module is under way.
        self._grad = True  # Whether that forward has a backward.
        self._recomputes = Recomputes()
        self._same = False  # Whether forwards draw as the one before them did.
        self.fresh = True  # Whether no forward has drawn by the key.
        self.begin_step(0 if scheduler is None else scheduler._step)

    def prefer(self, preferences: Preferences) -> None:
        """Draw by these.

        Raises:
            LTDError: more tokens are protected than the scheduler's min_length.
        """
        protected = preferences.protected
        for share in self.shares:
            least = protected if self.scheduler is None else self.scheduler.least(share)
            if protected > least:
                which = f"min_length={least}" if share is None else f"keep={share}, which starts at {least} tokens"
                raise LTDError(f"ltd_fx.transform: protect={protected} tokens do not fit the scheduler's {which}")
        self.preferences, self.protected = preferences, protected

    def refuse_step(self) -> None:
        """Raise :class:`LTDError` within :meth:`same_draws`."""
        if self._same:
            raise LTDError("ltd_fx.same_draws: the scheduler steps within it, and other lengths are other draws")

    def begin_step(self, step: int) -> None:
        """Rebind the key for the first forward of ``step``."""
        self.count_calls()
        self._step = step
        self.set_forward(0)

    def set_forward(self, forward: int) -> None:
        """Rebind the key as it is after ``forward`` training forwards of the current step."""
        # A fill is a launch on an accelerator, where a copy from the host would synchronise.
        self.key = torch.full((), self._first_key() + forward, dtype=torch.int64, device=self.device)
        self.fresh = True

    def _first_key(self) -> int:
        return draw_key(self.seed, self._step, self.rank)

    def begin_forward(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the root: the next key, for the forward that starts now.

        Raises:
            LTDError: an argument that says which tokens to keep is of another kind.
        """
        if not root.training:
            return
        self.batch = self.preferences.read(args, kwargs)
        self.preferences.lengthen(self.batch, self.lengths.values(), self.shared)
        parameter = next(root.parameters(), None)
        if parameter is not None and parameter.device != self.device:
            self._move(parameter.device)
        self.documents.forget()
        self._advance()
        self.under_way, self._grad = True, torch.is_grad_enabled()

    def _advance(self) -> None:
        """A key that no forward had, or the last one's again."""
        if not self._same:
            self.key, self.fresh = self.key + 1, False

    def begin_alone(self, name: str) -> None:
        """A routed layer is called by no forward of the root: a key of its own, so that it draws anew each time.

        Raises:
            LTDError: the draws need an argument of the root.
        """
        if self.preferences.needs_arguments():
            raise LTDError(
                f"ltd_fx: {name} is called, but not by a call of the {self.root} that ltd_fx.transform was given, and "
                f"{self.preferences.needs_arguments()} goes by the arguments of that call. Call that module (not its "
                "forward method), or ltd_fx.restore it and transform the one that you call"
            )
        if not torch.compiler.is_compiling():
            self.warn_untested("where the model's forward, or a layer, is called past the model's own call")
        self.documents.forget()
        self._advance()
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
            f"ltd_fx: {name} is given a key-value cache with tokens (a prefix, or those generated so far) in training "
            "mode, of which routed layers would have those only that they kept; call model.eval() before generating, "
            "and train without a cache"
        )

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Within, forwards draw as the latest one did.

        Raises:
            LTDError: there was none since the scheduler stepped.
        """
        if self.fresh:
            raise LTDError(
                "ltd_fx.same_draws: the model has seen no training forward since the scheduler stepped, whose draws "
                "another could repeat"
            )
        before, self._same = self._same, True
        try:
            yield
        finally:
            self._same = before

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """As if a forward of the root were under way; its draws are nobody's, and nothing is known of its batch."""
        names = ("key", "batch", "documents", "together", "fresh", "under_way", "warned", "_grad", "_recomputes")
        before = {name: getattr(self, name) for name in names}
        self.batch, self.documents, self.together, self._recomputes = Batch(), Documents(), Together(), Recomputes()
        self.under_way, self.warned = True, True
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
        self.device, self.key = device, self.key.to(device)
        self.numbers = self.numbers and {share: mark_static(n.to(device)) for share, n in self.numbers.items()}
        for site in self.sites:
            site.move(device)

    def guard_recompute(self, recomputing: bool) -> None:
        """Called by each routed layer in training, in eager mode; see :class:`Recomputes`."""
        if recomputing:
            self._recomputes.check(self.key)
        elif self._grad:  # Else no backward will follow.
            self._recomputes.expect(self.key, self._step)

    # ---- resuming

    def position(self) -> dict[str, int]:
        """Where in the sequence of draws the model is: plain integers (reads the key back from its device).

        The same on every rank, so that one of them may save it for all, whatever their number when it is loaded.
        """
        return {"seed": self.seed, "forward": int(self.key) - self._first_key()}

    def check_position(self, position: Any) -> None:
        """Raise :class:`LTDError` unless ``position`` is one of this state's."""
        refuse_position(position, self.seed)

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

    # What a root's hooks call, for them to leave no graph of their own.
    AROUND_FORWARDS = (
        begin_forward,
        _advance,
        end_forward,
        Documents.forget,
        Preferences.read,
        Preferences.lengthen,
        Preferences.needs_arguments,
        find_documents,
        mark_static,
        Batch.is_wrapped,
    )

    def __getstate__(self) -> dict[str, Any]:
        """For ``torch.save(model)``: without the batch and the process group."""
        return {**self.__dict__, "batch": Batch(), "documents": Documents(), "together": Together(), "mesh": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouteState":
        """Copies of a model follow the same scheduler: it is the user's one handle on the length."""
        return self


def record(function: Callable[..., None], *args: Any) -> None:
    """Call ``function``, which writes down what a forward did in attributes of ours.

    Within ``torch.utils.checkpoint``, Dynamo refuses writes to what is outside; a recompute writes the same here.
    """
    if torch.compiler.is_compiling():
        allow_side_effects(function, *args)
    else:
        function(*args)
