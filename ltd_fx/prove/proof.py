"""Prove a routed layer: it must equal the dense layer with attention to the dropped tokens blocked.

Proofs are about how a layer is routed, not about its weights. They run on a copy with random weights and hidden states
of ordinary size, since a freshly initialised layer (attention logits near zero, gates at zero) would agree with
anything; in float64, so that what differs, differs by far more than rounding.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ltd_fx.errors import LTDError
from ltd_fx.learn import Call, LayerPattern, Proof, Sandbox, forward_signature, is_stream, layer_in, stream
from ltd_fx.passes import RoutedLayer, routed_class, swap_back, swap_class
from ltd_fx.prove.random_copy import noise, random_copy
from ltd_fx.prove.reference import DefaultDtype, NotVerifiableError, Scores, dense_reference, run_plain
from ltd_fx.runtime import RouteState, Site
from ltd_fx.tree import items_of, leaves, map_tensors

# The largest error that is rounding: of some hundred operations in float64; and in float32, which some kernels add in
# another order. In fewer bits, a rounded score may send a token to another expert: there, of half of the tokens.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
# Of fewer tokens than this, in a sequence, half leave nothing to compare.
FEWEST = 4
# Of fewer tokens than this, in all sequences, one draw may agree by chance.
_FEW = 256
# Where most of the tokens are padding.
_TOO_FEW = "too few tokens can attend to others"
# Where a dtype has no kernel here; or too few bits, for random weights or to tell attention from rounding.
_FAILS, _NOT_FINITE, _ALONE = _SAYS_NOTHING = "the dense layer fails", "its outputs are not finite", "no token attends"


def prove(
    name: str,
    slot: nn.Module,
    pattern: LayerPattern,
    call: Call | None,
    *,
    sandbox: Sandbox,
    shared: bool = False,
    protected: int = 0,
    atol: float | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
) -> Proof:
    """Compare a routed layer with its dense reference, on half of the tokens, in eval and in training mode.

    Args:
        name: the layer's.
        slot: the layer, routed or not, or the checkpoint wrapper around it. It is copied and stays as it is.
        pattern: how it is routed.
        call: the arguments it is called with, as values; ``None`` if it is not called.
        sandbox: of the model.
        shared: one draw for the batch.
        protected: so many first tokens are always kept.
        atol: the largest error relative to the reference's largest value; ``None``: what rounding makes.
        dtypes: to run it in; another one only where it fails in those before, for some kernels know no float64.

    Raises:
        LTDError: there are fewer than four tokens.
    """
    layer_class = type(slot)._ltd_arguments[1] if isinstance(slot, RoutedLayer) else type(layer_in(slot))
    if call is None:
        return Proof(name, layer_class.__name__, "not verifiable", None, "it is never called")
    few = all(t.numel() // t.shape[-1] < _FEW for t in leaves((call.args, call.kwargs)) if is_stream(t) and t.numel())
    reason = ""
    for dtype in dtypes:
        try:
            layer = random_copy(slot, dtype)
            how = (layer_class, pattern, call, dtype, _ROUNDING[dtype] if atol is None else atol, shared, protected)
            with sandbox.open(layer):
                results = [_compare(layer, *how, draw) for draw in ((1, 2) if few else (1,))]
                layer.train()  # Nothing is random there, see Scores.
                results.append(_compare(layer, *how, 1))
        except NotVerifiableError as failure:
            return Proof(name, layer_class.__name__, "not verifiable", None, str(failure))
        except LTDError:
            raise
        except _WrongError as failure:
            return Proof(name, layer_class.__name__, "wrong", failure.size, str(failure))
        except _LayerError as failure:
            reason = f"{_FAILS}: {failure}"
            continue
        error = max(result.error for result in results)
        if not any(result.attends for result in results):
            along = f"dimension {1 if pattern.batch_first else 0} of its hidden states"
            status, reason = "not verifiable", f"{_ALONE} to another along {along}; is that the sequence?"
            if pattern.dropped:
                status, reason = (
                    "wrong",
                    "the hidden states it returns depend on no other token, and others are dropped",
                )
            return Proof(name, layer_class.__name__, status, error, reason)
        counts = any(result.counts for result in results)
        return Proof(name, layer_class.__name__, "tested", error, counts=counts)
    return Proof(name, layer_class.__name__, "not verifiable", None, reason)


def prove_alone(name: str, slot: nn.Module, pattern: LayerPattern, call: Call, **options: Any) -> Proof:
    """As :func:`prove`, and in the dtype that the layer is trained in: for layers that nothing else shows right.

    Args:
        name: see :func:`prove`, and so for all others.
        slot: ditto.
        pattern: ditto.
        call: its hidden states tell the dtype.
        options: ditto.
    """
    proof = prove(name, slot, pattern, call, **options)
    hidden = stream(call)
    if not proof.right or hidden is None or hidden.dtype == torch.float64:
        return proof
    trained = prove(name, slot, pattern, call, **options, dtypes=(hidden.dtype,))
    return proof if trained.right or trained.reason.startswith(_SAYS_NOTHING) else trained


def shows_nothing(proof: Proof) -> bool:
    """Whether the numbers were not such as to show anything: little but padding, or documents of one token."""
    return proof.reason == _TOO_FEW or nobody_attends(proof)


def nobody_attends(proof: Proof) -> bool:
    """Whether each token saw itself alone."""
    return proof.reason.startswith(_ALONE)


class _WrongError(Exception):
    def __init__(self, reason: str, size: float | None = None) -> None:
        super().__init__(reason)
        self.size = size


class _LayerError(Exception):
    """What the layer itself raises. Whatever else is raised here is our mistake, and no property of the layer."""


class _Comparison(NamedTuple):
    """One draw: the relative error; whether the dense layer lets a kept token attend to a dropped one; and whether it
    makes tensors as long as the sequence by itself.
    """

    error: float
    attends: bool
    counts: bool


def _compare(
    layer: nn.Module,
    layer_class: type[nn.Module],
    pattern: LayerPattern,
    call: Call,
    dtype: torch.dtype,
    atol: float,
    shared: bool,
    protected: int,
    draw: int,
) -> _Comparison:
    """Dense and routed, with one draw.

    Raises:
        NotVerifiableError: there is nothing to compare with.
        _WrongError: the routed layer differs, or fails.
    """
    signature = forward_signature(layer_class)
    given: Any = signature.bind(*call.args, **call.kwargs).arguments.get(pattern.hidden)
    if not is_stream(given):
        raise _WrongError(f"{pattern.hidden!r} is not a 3-D floating-point tensor")
    shape = given.shape if pattern.batch_first else (given.shape[1], given.shape[0], given.shape[2])
    indices = _draw(shape[0], shape[1], shared, protected, draw).to(given.device)
    kept = torch.zeros(shape[:2], dtype=torch.bool, device=given.device)
    kept = kept.scatter(1, indices.expand(shape[0], -1), True)
    generator = torch.Generator().manual_seed(draw)
    hidden, stranger = (noise(shape, dtype, generator).to(given.device) for _ in range(2))

    def run(hidden: Tensor) -> list[Tensor]:
        bound = signature.bind(*call.args, **call.kwargs)
        bound.arguments[pattern.hidden] = hidden if pattern.batch_first else hidden.transpose(0, 1)
        if pattern.cache in bound.arguments:
            bound.arguments[pattern.cache] = None
        bound.arguments.update(map_tensors(partial(_cast, dtype), dict(bound.arguments)))
        with torch.random.fork_rng([]), torch.autocast(given.device.type, enabled=False), DefaultDtype(dtype):
            try:
                output = layer(*bound.args, **bound.kwargs)
            except LTDError:
                raise
            except Exception as error:
                raise _LayerError(f"{type(error).__name__}: {error}") from error
            return _outputs(output, pattern)

    reference, other, blind, unblocked, counted = dense_reference(run, hidden, kept)
    seen = kept & ~blind
    if not reference[0][seen].isfinite().all():
        raise NotVerifiableError(f"{_NOT_FINITE} in {dtype}")
    if _difference(other[:1], reference[:1], seen) > atol:
        raise NotVerifiableError(
            "kept tokens see dropped ones by other ways than softmax attention (a convolution, a state, a fused or "
            "linear attention)"
        )
    if _difference([hidden, *other[1:]], [hidden, *reference[1:]], seen) > atol:
        raise _WrongError(
            "a further output changes with the dropped tokens: correct `output`, or list it in `dropped` (in "
            "`returned`, if it is an argument handed on)"
        )
    if shape[0] > 1:
        stranger[1:] = hidden[1:]
        with Scores([]):
            others = run_plain(run, stranger)[0][1:]
        if _difference([others], [unblocked[0][1:]], seen[1:]) > atol:
            raise _WrongError("sequences see each other: both dimensions of its hidden states carry tokens")
    swap_class(layer, routed_class(type(layer), layer_class, pattern), _site(layer, indices, protected))
    try:
        with Scores([]):
            routed = run_plain(run, hidden)
    except LTDError as error:
        raise _WrongError(str(error).removeprefix("ltd_fx: ")) from error
    except _LayerError as error:
        traced = "; trace the model with a dynamic sequence dimension" if isinstance(layer, fx.GraphModule) else ""
        raise _WrongError(f"on fewer tokens it fails: {error}{traced}") from error
    finally:
        swap_back(layer)
    if [t.shape for t in routed] != [t.shape for t in reference]:
        raise _WrongError("its outputs have other shapes than the dense layer's")
    if not torch.equal(routed[0][~kept], hidden[~kept]):
        raise _WrongError("dropped tokens do not pass unchanged")
    size = _difference(routed, reference, seen)
    if 4 * seen.sum() < kept.sum():
        raise NotVerifiableError(_TOO_FEW)
    if size > atol:
        raise _WrongError("kept tokens differ from the dense layer's", size)
    attends = _difference(unblocked[:1], reference[:1], seen) > 1e3 * torch.finfo(dtype).eps
    return _Comparison(size, attends, counted)


def _cast(dtype: torch.dtype, value: Tensor) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _draw(batch: int, seq_len: int, shared: bool, protected: int, seed: int) -> Tensor:
    """``[B | 1, k]``: half of the tokens at first, then a third, but at least two and never all."""
    keep = max(seq_len // (1 + seed), 2, protected + 1)
    if keep >= seq_len or seq_len < FEWEST:
        raise LTDError(
            f"ltd_fx: hidden states of {seq_len} tokens ({protected} of them protected) are too short to prove how a "
            "layer is routed; give longer example inputs (or is `batch_first` wrong?)"
        )
    order = torch.rand(1 if shared else batch, seq_len, generator=torch.Generator().manual_seed(seed), device="cpu")
    order[:, :protected] = -1
    return order.argsort(dim=1)[:, :keep].sort(dim=1).values


def _site(layer: nn.Module, indices: Tensor, protected: int) -> Site:
    state = RouteState(None, seed=0, shared=indices.shape[0] == 1, routed=1, dense=0)
    state.protected = protected
    site = Site("the layer", 0, layer, state)
    site.fixed = indices
    return site


def _outputs(output: Any, pattern: LayerPattern) -> list[Tensor]:
    """The hidden states ``[B, S, D]`` of a layer's output, then its further tensors."""
    items = items_of(output) or [output]
    slot = 0 if isinstance(output, Tensor) or pattern.output is None else pattern.output
    if slot >= len(items) or not isinstance(items[slot], Tensor):
        raise _WrongError(f"its LayerPattern says output={pattern.output}, but it returned a {type(output).__name__}")
    hidden = items[slot]
    others = (leaf for i, item in enumerate(items) if i != slot and i not in pattern.dropped for leaf in leaves(item))
    rest = [t for t in others if isinstance(t, Tensor) and t.is_floating_point()]
    return [hidden if pattern.batch_first else hidden.transpose(0, 1), *rest]


def _difference(ours: list[Tensor], theirs: list[Tensor], rows: Tensor) -> float:
    """The largest difference relative to the largest value, over ``rows`` of the hidden states and all else.

    In fewer bits than 32, that of the median row.
    """
    worst = 0.0
    pairs = [(ours[0][rows], theirs[0][rows]), *zip(ours[1:], theirs[1:], strict=True)]
    for a, b in pairs:
        if a.numel() == 0:
            continue
        scale = b.detach().abs().max().item() or 1.0
        each = ((a - b).detach().abs() / scale).nan_to_num(math.inf).reshape(*a.shape[:1], -1).amax(-1)
        worst = max(worst, (each.median() if each.dtype.itemsize < 4 else each.max()).item())
    return worst
