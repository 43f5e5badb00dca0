"""What a user may set of how a model is routed, and what follows from it for a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ltd_fx.errors import LTDError
from ltd_fx.install.choose import RouteSpec, choose
from ltd_fx.learn import CallSite, Layers, find_stacks
from ltd_fx.runtime import SAMPLING, Preferences, Protect, RouteState
from ltd_fx.schedule import LTDScheduler


class Settings(NamedTuple):
    """The arguments of ``ltd_fx.transform`` that hold for any model; it says what they mean."""

    layers: Layers = None
    skip_first: int = 1
    skip_last: int = 1
    seed: int = 0
    sampling: str = "per_sample"
    protect: Protect = None
    routes: Sequence[RouteSpec] | None = None
    keep: Mapping[str, float] | None = None
    device_mesh: DeviceMesh | None = None
    keep_mask: str | None = None

    def check(self, scheduler: LTDScheduler | None) -> None:
        """Raise :class:`LTDError` for what is wrong with any model."""
        if self.sampling not in SAMPLING:
            raise LTDError(f"ltd_fx: sampling must be one of {', '.join(SAMPLING)}, got {self.sampling!r}")
        for name in ("skip_first", "skip_last", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (value < 0 and name != "seed"):
                raise LTDError(f"ltd_fx: {name} must be a non-negative integer, got {value!r}")
        if scheduler is not None and scheduler.attached:
            raise LTDError("ltd_fx: the scheduler drives another model; give each model a scheduler of its own")

    def choose(self, model: nn.Module) -> list[CallSite]:
        """The target layers of ``model``, those to route marked as such.

        Raises:
            LTDError: none is left to route, a route or a share does not fit.
        """
        stacks = find_stacks(model, self.layers)
        return choose(stacks, self.skip_first, self.skip_last, self.routes, self.keep)

    def state(self, model: nn.Module, layers: Sequence[CallSite], scheduler: LTDScheduler | None) -> RouteState:
        """What the sites of ``layers`` share. With a mesh a collective.

        Raises:
            LTDError: what is said of the tokens to keep does not fit the model, or ranks differ.
        """
        routed = [layer for layer in layers if layer.routed]
        state = RouteState(
            scheduler,
            seed=self.seed,
            shared=self.sampling == "shared",
            routed=len(routed),
            dense=len(layers) - len(routed),
            shares=Counter(layer.share for layer in routed if layer.share is not None),
            mesh=self.device_mesh,
        )
        state.prefer(Preferences(model, self.protect, self.keep_mask, self.sampling == "per_document"))
        if self.device_mesh is not None:
            state.check_ranks()
        return state
