"""The records of a forward: a routed layer, what it draws, and what the layers of a route hand on."""

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ltd_fx.errors import LTDError
from ltd_fx.runtime.eager import Plain
from ltd_fx.runtime.kernels import attentions
from ltd_fx.runtime.preferences import Batch
from ltd_fx.runtime.state import RouteState, record
from ltd_fx.schedule import ReservedLength
from ltd_fx.torch_private import in_backward, mark_static

# The numbers of a layer's calls in one forward are this far apart. No model has as many layers.
_CALL = 1 << 16


class Length(Protocol):
    """How many tokens a layer keeps of sequences of ``seq_len``; all of them where that is no fewer."""

    def tokens(self, seq_len: int) -> int: ...


class Drawn(NamedTuple):
    """What the draw of one call depends on: enough to draw again (see ``replay``). ``keep`` is S where it ran dense.

    ``said`` is what the forward's arguments said of which tokens to keep.
    """

    key: Tensor
    batch: int
    seq_len: int
    keep: int
    said: Batch


class Span:
    """What the layers of one route hand on during a forward; kept by their sites."""

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget the forward."""
        self.open = False
        self.draw: Draw | None = None
        self.hidden: Tensor | None = None  # The kept tokens, as the layer before returned them.
        self.version = 0

    def hold(self, hidden: Tensor) -> None:
        """Remember what the next layer must be given."""
        self.hidden, self.version = hidden, version(hidden)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and ``torch.save(model)``: no forward is in progress there."""
        return vars(Span())


def version(value: Tensor) -> int:
    """How many times it was written into, where that is known."""
    return 0 if torch.compiler.is_compiling() or value.is_inference() else value._version


class Site:
    """One routed layer: its name and number, and the state it shares with the model's other sites.

    Kept in the layer's ``__dict__``, outside modules and buffers, so names and ``state_dict`` keys stay as they were.
    With ``in_graph``, it is an attribute of an ``fx.GraphModule`` instead, whose graph calls ``layer``.
    """

    def __init__(
        self,
        name: str,
        number: int,
        layer: nn.Module,
        state: RouteState,
        length: ReservedLength | None = None,
        span: Span | None = None,
        in_graph: bool = False,
    ) -> None:
        self.name = name
        self.index = number  # Eager code alone may read it.
        # These are tensors, not ints: as data, they let identical layers that are compiled one by one share a graph.
        self.first = torch.tensor(number, device=state.device)
        self.number = self.first  # The number of the call in progress.
        self.share = None if length is None else length.share
        self.place: Tensor | None = None  # ``[1]``: where it is among those that draw together.
        # A strong reference would be a cycle, for the layer holds its site, and keep the weights until it is collected.
        self._layer = weakref.ref(layer)
        self.state = state
        self.length: Length = state.lengths[None] if length is None else length
        self.span = span  # None unless the layer is on a route over several.
        self.in_graph = in_graph
        self.attentions = attentions(layer)  # They say which kernels it uses.
        self.fixed: Tensor | None = None  # The indices to keep while the layer is being verified.
        # What this forward has drawn: in the calls before the latest, and in the latest.
        self._earlier: tuple[Drawn, ...] = ()
        self._latest: Drawn | None = None
        state.sites.append(self)

    @property
    def layer(self) -> nn.Module:
        layer = self._layer()
        assert layer is not None
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """For copies and ``torch.save(model)``: they have seen no forward."""
        return {**self.__dict__, "_layer": self.layer, "_earlier": (), "_latest": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _layer=weakref.ref(state["_layer"]))

    @property
    def drawn(self) -> tuple[Drawn, ...]:
        """The draws of the most recent forward, a call each."""
        return self._earlier if self._latest is None else (*self._earlier, self._latest)

    def begin_forward(self) -> None:
        """Forget the forward before."""
        self._earlier, self._latest, self.number = (), None, self.first

    def begin_call(self) -> None:
        """Called by the routed layer in training, before its forward.

        Raises:
            LTDError: a recompute would draw other tokens; nobody gave the mask that the draw needs.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and in_backward():
            self.state.guard_recompute(True)
            if self._earlier:
                raise LTDError(
                    f"ltd_fx: activation checkpointing recomputes {self.name}, which the forward called "
                    f"{len(self.drawn)} times: nothing tells which of its draws to repeat. Checkpoint inside the "
                    "layer (transformers' gradient_checkpointing_enable() does)"
                )
            return
        record(self._count_call)
        if not compiling:
            self.state.guard_recompute(False)

    def _count_call(self) -> None:
        if not self.state.root:
            self.begin_forward()
        elif not self.state.under_way:
            self.state.begin_alone(self.name)
            self.begin_forward()
        elif self._latest is not None:
            self._earlier, self._latest = self.drawn, None
        self.number = self.number_of(len(self._earlier))

    def number_of(self, call: int) -> Tensor:
        """``[]`` int64: which draw the layer's ``call``-th call in a forward takes."""
        return self.first + call * _CALL if call else self.first

    def _set_drawn(self, batch: int, seq_len: int, keep: int) -> None:
        self._latest = Drawn(self.state.key, batch, seq_len, keep, self.state.batch)

    def move(self, device: torch.device) -> None:
        self.first = self.number = self.first.to(device)
        self.place = None if self.place is None else self.place.to(device)


def compiled_together(sites: list[Site]) -> list[Site]:
    """The same, which draw in one operator where they have the same share of the tokens."""
    by_share: dict[float | None, dict[int, list[Site]]] = {}
    for site in sites:
        by_share.setdefault(site.share, {}).setdefault(site.index, []).append(site)
    for share, numbered in by_share.items():
        for place, alike in enumerate(numbered.values()):
            for site in alike:
                site.place = torch.tensor([place], device=site.first.device)
        if site.state.numbers is not None:
            # Else its size could be taken for that of a batch.
            site.state.numbers[share] = mark_static(torch.tensor([*numbered], device=site.first.device))
    return sites


class Draw(NamedTuple):
    """The tokens that a site keeps in this forward.

    ``indices`` is ``[B, k]`` int64, ascending in each row, or ``[1, k]`` where one draw serves the batch. The first
    ``protected`` tokens are among them in every row. On a route over several layers, ``rest`` is the stream of dropped
    tokens, and ``gathered`` the arguments gathered so far, by name, with what they were gathered from. ``plain`` is
    there on the eager path.
    """

    site: Site
    indices: Tensor
    batch: int
    seq_len: int
    protected: int = 0
    rest: Tensor | None = None
    gathered: dict[str, tuple[Any, Any]] | None = None
    plain: Plain | None = None
