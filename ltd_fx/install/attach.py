"""``transform``'s last step: rewrite a model now; what no example inputs show waits for the first training forward."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from ltd_fx.errors import LTDError
from ltd_fx.install.graph_module import targets_of
from ltd_fx.install.hooks import (
    REWRITE,
    add_forward_hooks,
    add_root_hook,
    check_places,
    check_routes,
    refuse_unlearnt,
)
from ltd_fx.install.in_place import Rewrite, end_pending, form_of, install, take_out, test_installed
from ltd_fx.install.outlined import Outlined
from ltd_fx.install.router_losses import route_losses, unroute_losses
from ltd_fx.learn import CallSite
from ltd_fx.passes import SCRIPTING, check_calls, refuse_replicas, refuse_scripting
from ltd_fx.prove import Examination
from ltd_fx.runtime import UNTESTED, RouteState
from ltd_fx.torch_private import (
    at_compile_time,
    is_fake,
    is_functorch_wrapped_tensor,
    is_replica,
    pytree,
    without_modes,
)

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    layers: Sequence[CallSite],
    state: RouteState,
    inputs: Any,
    outlined: Outlined | None = None,
) -> None:
    """Rewrite ``model``: now, or where a forward is needed to learn from and there is none, at its first training
    forward.

    Args:
        model: the root.
        layers: all target layers, those to route marked as such.
        state: what the sites share.
        inputs: (args, kwargs) of one forward to learn from, and to prove the layers by; or ``None``.
        outlined: what was done to a flat graph before.

    Raises:
        LTDError: a layer cannot be routed; nothing is changed.
    """
    rewrite = Rewrite(state, layers, outlined=outlined)
    unknown = next((layer for layer in rewrite.routed if layer.pattern is None), None)
    is_graph = isinstance(model, fx.GraphModule)
    if unknown is not None and inputs is None and is_graph:
        remedy = ", or call ltd_fx.register_pattern" if outlined is None else ""
        raise LTDError(
            f"ltd_fx: {unknown.name} is a {unknown.layer_class}, for which no LayerPattern is known; pass "
            f"example_inputs to learn it from{remedy}"
        )
    state.root, state.layers = type(model).__name__, layers
    # Only a forward shows that the layers of a route follow each other.
    chained = not is_graph and not all(layer.enters for layer in rewrite.routed)
    route_losses(model, rewrite)
    if inputs is not None or (unknown is None and not chained):
        try:
            install(model, rewrite, inputs)
        except BaseException:
            unroute_losses(model)
            raise
        if rewrite.untested:
            state.untested, rewrite.first_hook = True, _test
            rewrite.pending = (add_root_hook(model, _test),)
    else:
        rewrite.pending = (add_root_hook(model, _complete), *_refuse(model, rewrite))
        model.__dict__[SCRIPTING] = refuse_scripting
    if chained:
        hooks = add_forward_hooks(model, before=(_check_form, check_places), after=(check_routes,))
    else:
        hooks = add_forward_hooks(model, before=() if is_graph else (check_places,))
    rewrite.hooks = (*rewrite.hooks, *hooks)
    model.__dict__[REWRITE] = rewrite
    if state.scheduler is not None:
        state.scheduler._attach(state)


def complete(model: nn.Module, rewrite: Rewrite, inputs: Any) -> None:
    """Do at once what waits for the first training forward, if anything does, but for registered patterns: a caller
    that shows what is wrong may be asked of these.

    Args:
        model: the root.
        rewrite: gets the sites, patterns and proofs.
        inputs: (args, kwargs) of one forward.

    Raises:
        LTDError: a layer cannot be routed.
    """
    if rewrite.pending and not rewrite.sites:
        install(model, rewrite, inputs)
        end_pending(model, rewrite)
        return
    built_in = [layer for layer in rewrite.untested if not layer.vouched]
    if built_in and _obstacle(model, inputs) is None:
        test_installed(model, rewrite, built_in, inputs)


def _complete(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model whose patterns are to be inferred."""
    if not root.training:
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            torch.compiler.disable(_complete_early)(root, (args, kwargs))
        return
    if is_replica(root):
        refuse_replicas(root)
    if torch.compiler.is_compiling():
        raise LTDError(
            "ltd_fx: layers without a LayerPattern are learnt at the first training forward, and this one is within a "
            "larger compiled program; pass example_inputs to ltd_fx.transform"
        )
    rewrite = root.__dict__[REWRITE]
    rewrite.state.preferences.read(args, kwargs)  # What it refuses, it refuses before anything is done.
    torch.compiler.disable(_complete_by)(root, (args, kwargs))


def _complete_by(root: nn.Module, inputs: Any) -> None:
    rewrite = root.__dict__[REWRITE]
    if rewrite.sites and form_of(inputs) in rewrite.forms:
        rewrite.hooks, rewrite.pending = (*rewrite.hooks, *rewrite.pending[1:]), rewrite.pending[:1]
    else:
        if rewrite.sites:
            _forget(root, rewrite)
        install(root, rewrite, inputs)
    end_pending(root, rewrite)


def _forget(root: nn.Module, rewrite: Rewrite) -> None:
    """Wait again, for what an evaluation showed that was called in another way than training is."""
    for hook in rewrite.pending[1:]:
        hook.remove()
    take_out(rewrite)
    rewrite.layers = cast("Sequence[CallSite]", rewrite.state.layers)
    rewrite.pending = (rewrite.pending[0], *_refuse(root, rewrite))


def _refuse(root: nn.Module, rewrite: Rewrite) -> Iterator[RemovableHandle]:
    return (add_root_hook(root.get_submodule(layer.name), refuse_unlearnt) for layer in rewrite.routed)


def _complete_early(root: nn.Module, inputs: Any) -> None:
    """Learn from an evaluation before the first step: layers change their class where they are learnt, and what was
    compiled of them before would be compiled again. What it does not show, the first training forward does.
    """
    rewrite = root.__dict__[REWRITE]
    if is_replica(root) or rewrite.sites or form_of(inputs) in rewrite.forms:
        return
    hooks = rewrite.hooks
    try:
        with torch.enable_grad(), without_modes():
            install(root, rewrite, inputs)
    except Exception as error:  # Nobody asked for it. If training fails by it too, that says so.
        take_out(rewrite)
        logger.debug("ltd_fx: nothing was learnt from an evaluation: %s", error)
        return
    for hook in rewrite.pending[1:]:
        hook.remove()
    rewrite.pending = (rewrite.pending[0], *rewrite.hooks[len(hooks) :])  # Those that end if it is learnt again.
    rewrite.hooks = hooks


def _test(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model whose layers are routed by built-in patterns that are yet to be tested."""
    if not root.training:
        return
    if is_replica(root):
        refuse_replicas(root)
    if torch.compiler.is_compiling():
        at_compile_time(_warn_compiled)
    else:
        torch.compiler.disable(_test_by)(root, (args, kwargs))


def _test_by(root: nn.Module, inputs: Any) -> None:
    rewrite = root.__dict__[REWRITE]
    rewrite.state.preferences.read(*inputs)
    obstacle = _obstacle(root, inputs)
    if obstacle is None and form_of(inputs) not in rewrite.forms:
        with without_modes():  # The user's may count what a forward costs.
            obstacle = test_installed(root, rewrite, rewrite.untested, inputs)
    if obstacle:
        rewrite.state.warn_untested(obstacle)


def _obstacle(root: nn.Module, inputs: Any) -> str | None:
    """Why a forward cannot be watched and repeated on numbers; empty where that is no loss, for another can."""
    leaves = pytree.tree_leaves(inputs)
    if any(hasattr(leaf, "get_seq_length") for leaf in leaves):
        return ""  # a key-value cache, which watching would fill
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    tensors = [*given, *root.parameters(), *root.buffers()]
    if torch.is_inference_mode_enabled() or any(is_fake(t) or t.device.type == "meta" for t in tensors):
        return ""  # nobody trains there
    if any(map(is_functorch_wrapped_tensor, tensors)):
        return "within a transformation of torch.func"
    if any(type(tensor) not in _PLAIN for tensor in given):
        return "on tensors of a class of their own (distributed ones)"
    if any(type(t) not in _PLAIN or t.numel() == 0 for t in root.parameters()):
        return "while parameters are sharded, or of a class of their own (quantized ones)"
    return None


_PLAIN = (torch.Tensor, nn.Parameter)


def _warn_compiled(context: Any) -> None:
    warnings.warn(UNTESTED.format("within torch.compile of a larger program"), stacklevel=2)


def _check_form(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: arguments of another form than any before (a ControlNet's residuals) may end a route."""
    if torch.compiler.is_compiling() or not root.training:
        return
    rewrite = root.__dict__[REWRITE]
    form = form_of((args, kwargs))
    if form not in rewrite.forms:
        slots = {site.name: site.layer for site in rewrite.sites}
        calls = torch.compiler.disable(Examination)(root, rewrite.routed, slots, (args, kwargs)).calls
        check_calls(calls, targets=targets_of(rewrite.routed, slots))
        rewrite.forms.add(form)
