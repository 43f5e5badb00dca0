"""What a schedule saves, before any run: layer tokens, operations, time, memory; and when it does not pay.

Floating-point operations of a layer on n tokens, forward: 24 n d^2 in its matrices (an MLP four times as wide as the
model) and c n^2 d in attention, c = 2 causal and 4 bidirectional; backward twice as many (Narayanan et al., arXiv
2104.04473, section 3.1, without recomputation). With fused attention, activations grow in proportion to the tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ltd_fx.errors import LTDError
from ltd_fx.schedule.scheduler import LTDScheduler


@dataclass(frozen=True)
class Device:
    """Peak operations a second in bf16 (dense), and bytes a second from memory; the makers' figures."""

    flops: float
    bandwidth: float


DEVICES = {
    "h100": Device(989e12, 3.35e12),
    "h200": Device(989e12, 4.8e12),
    "b200": Device(2250e12, 8.0e12),
    "a100": Device(312e12, 2.04e12),
}
_BYTES = 2  # A hidden state of 16 bits has so many bytes.
# Routing reads and writes at most so many elements of hidden states for each kept token, layer and direction.
_ROUTING_ELEMENTS = 4
# A routed layer runs about so many more kernels a step, and a device starts one in about so many seconds.
_KERNELS, _LAUNCH = 6, 4e-6
_FEW = 16  # So many CUDA graphs are few.


@dataclass(frozen=True)
class Plan:
    """The whole run with and without routing; ``*_saved`` are shares of the dense run, in [0, 1].

    Attributes:
        layer_tokens_saved: of layer tokens (random-LTD, arXiv 2211.11586, section 3.3).
        dense_flops: of the whole run.
        flops_saved: the share that is not computed.
        routing_seconds: what gathering and scattering take; ``None`` without a device.
        dense_seconds: of the whole run at ``utilisation`` of the device's peak; ``None`` without a device.
        time_saved: the share of time; without a device, that of operations.
        activations_saved: the share of activation memory at the first step.
        lengths: how many lengths below the full one the layers keep, by ``multiple_of``: the scheduler's, and coarser
            ones until few are left. A compiled graph serves them all, of CUDA graphs each needs one.
        warnings: why it may not pay; empty where it does.
    """

    layer_tokens_saved: float
    dense_flops: float
    flops_saved: float
    routing_seconds: float | None
    dense_seconds: float | None
    time_saved: float
    activations_saved: float
    lengths: dict[int, int]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """Sizes of a transformer; ``dense_layers`` of its ``layers`` are not routed."""

    layers: int
    hidden: int
    seq_len: int
    vocabulary: int = 0
    causal: bool = True
    dense_layers: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "seq_len"):
            if getattr(self, name) < 1:
                raise LTDError(f"ltd_fx plan: {name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.dense_layers < self.layers:
            raise LTDError(f"ltd_fx plan: {self.dense_layers} dense layers leave none of {self.layers} to route")

    def layer_flops(self, tokens: int) -> float:
        """Of one layer and sequence, forward and backward."""
        return 3.0 * (24 * tokens * self.hidden**2 + (2 if self.causal else 4) * tokens**2 * self.hidden)

    def head_flops(self) -> float:
        """Of the output projection for one sequence, forward and backward."""
        return 6.0 * self.seq_len * self.hidden * self.vocabulary


def make_plan(
    model: Model,
    scheduler: LTDScheduler,
    steps: int,
    *,
    batch: int = 1,
    device: Device | None = None,
    devices: int = 1,
    utilisation: float = 0.4,
) -> Plan:
    """Plan a run.

    Args:
        model: its sizes.
        scheduler: gives the reserved length of every step; its ``max_length`` is the model's ``seq_len``.
        steps: of the whole run.
        batch: sequences a step, over all devices.
        device: what it runs on.
        devices: how many of them.
        utilisation: the share of the peak that the dense run reaches.

    Raises:
        LTDError: the schedule ends below the sequence length, or a number is out of range.
    """
    if scheduler.max_length != model.seq_len:
        raise LTDError(
            f"ltd_fx plan: the schedule ends at {scheduler.max_length} tokens, but sequences have {model.seq_len}; "
            "make them equal"
        )
    if steps < 1 or batch < 1 or devices < 1 or not 0 < utilisation <= 1:
        raise LTDError("ltd_fx plan: steps, batch and devices must be positive, utilisation in (0, 1]")
    routed = model.layers - model.dense_layers
    full = model.layer_flops(model.seq_len)
    dense = steps * (model.layers * full + model.head_flops())
    lengths: dict[int, int] = {}  # How many steps have which length.
    for step in range(steps):
        length = scheduler.length_at(step)
        lengths[length] = lengths.get(length, 0) + 1
    saved = sum(n * routed * (full - model.layer_flops(k)) for k, n in lengths.items())
    tokens = sum(n * routed * (model.seq_len - k) for k, n in lengths.items())
    dense_seconds = routing = None
    time_saved = saved / dense
    if device is not None:
        rate = device.flops * utilisation * devices / batch
        dense_seconds = dense / rate
        below = {k: n for k, n in lengths.items() if k < model.seq_len}
        moved = sum(n * 2 * _ROUTING_ELEMENTS * k * model.hidden * _BYTES for k, n in below.items())
        routing = routed * (moved * batch / devices / device.bandwidth + sum(below.values()) * _KERNELS * _LAUNCH)
        time_saved = (saved / rate - routing) / dense_seconds
    first = scheduler.length_at(0)
    return Plan(
        tokens / (steps * model.layers * model.seq_len),
        dense * batch,
        saved / dense,
        routing,
        dense_seconds,
        time_saved,
        routed * (model.seq_len - first) / (model.layers * model.seq_len),
        _count(lengths, scheduler),
        _warnings(model, scheduler, steps, saved / dense, time_saved),
    )


def _count(lengths: Iterable[int], scheduler: LTDScheduler) -> dict[int, int]:
    """How many of ``lengths`` are below the full one, had they been rounded to coarser multiples."""
    multiple, counts = scheduler.multiple_of, dict[int, int]()
    while multiple <= scheduler.max_length and (not counts or counts[multiple // 2] > _FEW):
        least = -(-scheduler.min_length // multiple) * multiple
        rounded = {max(length - length % multiple, least) for length in lengths}
        counts[multiple] = sum(length < scheduler.max_length for length in rounded)
        multiple *= 2
    return counts


def _warnings(model: Model, scheduler: LTDScheduler, steps: int, saved: float, time_saved: float) -> tuple[str, ...]:
    found = []
    if scheduler.length_at(steps - 1) < model.seq_len:
        found.append("the run ends before the layers are dense again; random-LTD ends with full sequences")
    if saved < 0.05:
        found.append("the schedule saves under 5% of the operations: start shorter, or grow more slowly")
    if model.dense_layers > model.layers // 2:
        found.append("fewer than half of the layers are routed")
    if time_saved < 0.8 * saved:
        found.append("routing takes a fifth of what it saves: the layers are too small for this device")
    return tuple(found)
