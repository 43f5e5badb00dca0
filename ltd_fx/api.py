"""The functions a user calls on a model. They wire the other modules together, and hold no logic of their own."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh

from ltd_fx import runtime
from ltd_fx.dynamo import Backend
from ltd_fx.errors import LTDError
from ltd_fx.install import (
    RewriteReport,
    RouteSpec,
    Settings,
    VerifyReport,
    adopt,
    attach,
    check_free,
    complete,
    find_rewrite,
    find_rewrite_maybe,
    flattened,
    is_unflattened,
    outlined,
    uninstall,
)
from ltd_fx.learn import (
    CallSite,
    Layers,
    Proof,
    Sandbox,
    find_stacks,
    flat_layers,
    observe_values,
    split_inputs,
    traced_inputs,
)
from ltd_fx.ops import register_inductor_decompositions
from ltd_fx.prove import prove
from ltd_fx.runtime import Protect
from ltd_fx.schedule import LTDScheduler
from ltd_fx.torch_private import ORIG_MOD, pytree
from ltd_fx.weights import held_by

Model = TypeVar("Model", bound=nn.Module)


def transform(
    model: Model,
    scheduler: LTDScheduler | None = None,
    *,
    layers: Layers = None,
    skip_first: int = 1,
    skip_last: int = 1,
    seed: int = 0,
    sampling: str = "per_sample",
    protect: Protect = None,
    routes: Sequence[RouteSpec] | None = None,
    keep: Mapping[str, float] | None = None,
    device_mesh: DeviceMesh | None = None,
    keep_mask: str | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
) -> Model:
    """Rewrite the middle layers of ``model``, in place, to see a random subset of the tokens in training.

    Each routed layer becomes gather, layer, scatter: the kept tokens go through the layer, the others skip it unchanged
    (random-LTD, arXiv 2211.11586, section 3.1). Call it before ``torch.compile``. In eval mode, and from the moment the
    reserved length reaches the sequence length, the results are bit for bit those of the untransformed model.

    Args:
        model: a module (its class, methods, parameter names and ``state_dict`` keys stay as they are), or an
            ``fx.GraphModule`` (its graph is rewritten and recompiled) that calls the target layers, or remembers which
            of its nodes are theirs: an exported program's, or a flat trace.
        scheduler: gives the reserved length; ``None`` keeps half of the tokens, always.
        layers: the target layers: ``None`` (all with a known pattern, or else lists of like modules), a class or
            tuple of classes, a regular expression that matches whole fully qualified names, a list of names, or a
            predicate ``(name, module) -> bool``.
        skip_first: layers left dense at the start of each stack.
        skip_last: layers left dense at the end of each stack.
        seed: of the draws.
        sampling: ``"per_sample"``, each sequence its own tokens; ``"shared"``, one draw for the batch; or
            ``"per_document"``, of packed rows each document its share, rounded so that the sum is the reserved length,
            where ``cu_seq_lens_q``, ``seq_idx`` or ``position_ids`` of the model tell documents apart.
        protect: tokens that are kept first: a number of first tokens (class and register tokens), which no draw drops;
            a function from positions ``[S]`` to a bool ``[S]``; or the name of the model's argument with the batch's
            attention mask ``[B, S]``, whose padding (zero) is dropped before any real token.
        routes: ``(first, last, share)`` each: tokens leave at layer ``first`` of a stack and return, unchanged, after
            layer ``last`` (negative numbers count from the stack's end), as in TREAD (arXiv 2501.04765);
            layers on no route are dense. Where the schedule starts, a route keeps ``share`` of the tokens, a number
            between 0 and 1 (``None``: the scheduler's ``min_length``), and it is dense when the others are.
            Within a route, hidden states (and hooks) have the kept tokens only.
        keep: the same share for single layers, by name.
        device_mesh: which ranks draw alike. ``None``: all of them, for tensor-parallel ranks must keep the same
            tokens, and data-parallel ones may. With a mesh, ranks at different places along a data-parallel dimension
            (``dp``, ``ddp``, ``fsdp``, ``hsdp``, ``dp_replicate``, ``dp_shard``, ``replicate``, ``shard``,
            ``data_parallel``) draw different tokens, and so do pipeline stages (``pp``); those along ``tp``, ``sp``,
            ``cp`` and their long names draw alike. A 1-D mesh without a name is data-parallel. Rank 0
            draws as a single process does. The call is then a collective: the ranks' schedulers and seeds
            must agree (see :func:`check_ranks`).
        keep_mask: the name of the model's argument with the tokens that every draw of a batch keeps, bool ``[B, S]``
            (those with a loss, say). Where a sequence has more of them than the reserved length, the batch keeps more,
            without recompiling; an accelerator is waited for, since the number is read.
        example_inputs: a tuple or dict for one forward; every routed layer is then proven right before anything
            changes, at a small size (see :func:`verify` for a proof at full size), and patterns that are not known
            are learnt from it. Without, all this is done at the first training forward, or of layers to learn at an
            evaluation before it. A pattern that you registered is trusted, with a warning, where nothing can be shown.

    Returns:
        ``model`` itself.

    Raises:
        LTDError: nothing to route, a layer that cannot be routed, a model or scheduler already in use, a bad argument,
            ranks that differ; the model is untouched then.
    """
    if find_rewrite_maybe(model) is not None:
        raise LTDError("ltd_fx.transform: the model is transformed already; call ltd_fx.restore(model) first")
    if held_by(model) == ORIG_MOD:
        raise LTDError("ltd_fx.transform: the model is compiled already; transform it first, then call torch.compile")
    settings = Settings(layers, skip_first, skip_last, seed, sampling, protect, routes, keep, device_mesh, keep_mask)
    settings.check(scheduler)
    inputs = None if example_inputs is None else split_inputs(example_inputs)
    root: nn.Module = model
    if is_unflattened(model):
        root = flattened(model)
        inputs = inputs and (tuple(pytree.tree_leaves(inputs)), {})
    chosen = settings.choose(root)
    check_free(root, chosen)
    state = settings.state(root, chosen, scheduler)
    register_inductor_decompositions()
    flat = flat_layers(root, layers)
    if flat and inputs is None:
        assert isinstance(root, fx.GraphModule)
        inputs = traced_inputs(root)
    with outlined(root, {layer.name: flat[layer.name] for layer in chosen if flat and layer.routed}) as done:
        attach(root, chosen, state, inputs, done)
    if root is not model:
        adopt(model, root)
    return model


def compile_layers(model: Model, **options: Any) -> Model:
    """Compile the model's layers one by one, in place, instead of the whole model: layers that are alike share a graph.

    It takes as long for 32 layers as for 4: one graph for dense layers, one for routed ones, one for these at full
    length (of a route, its first, inner and last layers have graphs of their own). What is between the layers runs as
    it is. A transformers decoder needs ``use_cache=False``: a cache, with a state a layer, would cost each a graph.

    Args:
        model: transformed or not; its target layers are compiled, dense ones too.
        options: for ``torch.compile``: backend, mode, fullgraph, ...

    Returns:
        ``model`` itself.

    Raises:
        LTDError: no layers are found, or ``model`` is an ``fx.GraphModule``: compile that whole.
    """
    found = find_rewrite_maybe(model)
    root = model if found is None else found[0]
    if isinstance(root, fx.GraphModule):
        raise LTDError("ltd_fx.compile_layers: the model is an fx.GraphModule; call torch.compile on it instead")
    if found is not None:
        found[1].state.numbers = None
    stacks = find_stacks(model, None) if found is None else [found[1].layers]
    for name in [layer.name for stack in stacks for layer in stack]:
        root.get_submodule(name).compile(**options)
    return model


def check_ranks(model: nn.Module) -> None:
    """Raise on every rank unless all are at the same step of the same schedule, and so have the same reserved length.

    A collective: every rank of the ``device_mesh`` that :func:`transform` was given (else of the default process group)
    must call it. No forward does, for a rank that runs one alone would then wait for ever; with a mesh, ``transform``
    and ``LTDScheduler.load_state_dict`` do, which every rank calls anyway. They cannot see a rank that missed
    ``scheduler.step()``; a call of this once in a while does, for one exchange of a few hundred bytes.

    Raises:
        LTDError: two ranks differ, by name; or the model is not transformed.
    """
    state = find_rewrite(model)[1].state
    if dist.is_available() and dist.is_initialized():
        state.check_ranks()


def restore(model: Model) -> Model:
    """Undo :func:`transform`: original classes (or graph), no hook left; the scheduler may drive another model.

    Raises:
        LTDError: the model is not transformed.
    """
    uninstall(model)
    return model


def is_transformed(model: nn.Module) -> bool:
    """Whether ``model``, or what it wraps, is transformed."""
    return find_rewrite_maybe(model) is not None


def summary(model: nn.Module | Backend) -> RewriteReport:
    """What was rewritten, layer by layer; ``str()`` is a table, ``.sites[i].graph`` the graph that layer ``i`` runs.

    Args:
        model: transformed; or the :func:`backend` that it is compiled with, which has seen a forward of it.

    Raises:
        LTDError: the model is not transformed, or a routed layer was replaced since.
    """
    if isinstance(model, Backend):
        return model.report()
    root, rewrite = find_rewrite(model)
    if rewrite.places is not None:
        rewrite.places.check(root)
    return rewrite.report(root)


def verify(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any], *, atol: float = 1e-4) -> VerifyReport:
    """Compare every routed layer with the dense layer whose attention to the dropped tokens is blocked.

    It takes the layers' other arguments (masks, rotary tables) from one forward on ``example_inputs`` as they are, in
    eval mode (in training mode where that is how the pattern was learnt, since the layers are called in another way
    there); the layers are copied one at a time, given random weights and hidden states, and run in float64. So it
    proves the way they are routed at the lengths of these inputs, whatever the weights. Attention may be computed by
    any softmax; attention scores of one layer are held in memory.

    Args:
        model: transformed; it stays as it is.
        example_inputs: a tuple or dict for one forward.
        atol: the largest error allowed, relative to the largest value of the reference.

    Raises:
        LTDError: the model is not transformed, or its forward fails; or layers that wait for their first training
            forward cannot be routed.
    """
    root, rewrite = find_rewrite(model)
    inputs = split_inputs(example_inputs)
    complete(root, rewrite, inputs)
    sandbox, slots = Sandbox(root), {site.name: site.layer for site in rewrite.sites}
    calls = observe_values(root, slots, inputs, sandbox=sandbox, training=rewrite.training)
    proofs = [
        prove(
            layer.name,
            slots[layer.name],
            layer.known_pattern,
            calls.get(layer.name),
            sandbox=sandbox,
            shared=rewrite.state.shared,
            protected=rewrite.state.protected,
            atol=atol,
        )
        for layer in rewrite.routed
    ]
    return VerifyReport([_with_token_flow(layer, proof) for layer, proof in zip(rewrite.routed, proofs, strict=True)])


def _with_token_flow(layer: CallSite, tested: Proof) -> Proof:
    """The numerical test of a layer that token flow had proven before."""
    before = layer.proof.status if layer.proof is not None else ""
    return replace(tested, status="proven") if tested.right and before == "proven" else tested


def sampled_indices(model: nn.Module | Backend) -> dict[str, Tensor]:
    """The rows that each routed layer kept in the most recent training forward, by layer name.

    Drawn again on demand: it costs the forward nothing, and runs none.

    Args:
        model: transformed; or the :func:`backend` that it is compiled with.

    Returns:
        ``[B, k]`` int64 each, ascending and unique in each row; all rows where the forward was dense. A layer that the
        forward called several times has the names ``name``, ``name#1``, ``name#2``, ...

    Raises:
        LTDError: the model is not transformed, or has not seen a training forward.
    """
    if isinstance(model, Backend):
        return model.sampled_indices()
    return runtime.sampled_indices(find_rewrite(model)[1].sites)


def same_draws(model: nn.Module | Backend) -> AbstractContextManager[None]:
    """A context in which every training forward repeats the draws of the latest one before it.

    For forwards that are compared: old and new log-probabilities (PPO, GRPO), a reference pass, GradCache's two passes.

    Args:
        model: transformed; or the :func:`backend` that it is compiled with.

    Raises:
        LTDError: no transformed model, or no training forward of it since its scheduler stepped, which it may not
            do within the context.
    """
    return (model.program.state if isinstance(model, Backend) else find_rewrite(model)[1].state).same_draws()
