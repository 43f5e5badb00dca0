"""Every private or undocumented name of torch that the package uses. No other file names one.

Each has a test of its name in ``tests/project/test_torch_private*.py``, which says what it must mean. All were seen in
torch 2.11.0, 2.13.0 and 2.14.1, where those tests pass; none of these has a public name that does the same, unless it
is said below. ``torch._dynamo`` and ``torch._inductor`` load when a function here needs them, not on import.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # whether torch.func is at work: such a tensor is not kept
from torch._ops import OpOverload  # the class of operators such as torch.ops.aten.add.Tensor; has `is_view`, `tags`
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # forwards that compute shapes alone
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree  # arguments as trees; torch.utils.pytree is in none of these versions
from torch.utils._python_dispatch import TorchDispatchMode  # sees each operator below autograd
from torch.utils._python_dispatch import _disable_current_modes as without_modes  # without those in force
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.module_tracker import ModuleTracker

__all__ = [
    "ASSERT_SCALAR",
    "CHECKPOINT_WRAPPED_MODULE",
    "FAKE_TENSOR_LOG",
    "FSDP_WRAPPED_MODULE",
    "LR_SCHEDULER_STATE",
    "ORIG_MOD",
    "REPLICATE",
    "SOFTMAXES",
    "TO_COPY",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "allow_side_effects",
    "at_compile_time",
    "call_without_hooks",
    "check_with",
    "child_slots",
    "constant_local_maybe",
    "fake_mode_of",
    "hooks_of",
    "in_backward",
    "input_spec_maybe",
    "is_exporting",
    "is_fake",
    "is_functorch_wrapped_tensor",
    "is_grouped_mm",
    "is_replica",
    "is_transforming",
    "make_graph",
    "mark_dynamic",
    "mark_static",
    "must_recompute",
    "pytree",
    "replace_tensors",
    "safe_softmax",
    "schema_of",
    "set_decompositions",
    "share_contents",
    "skip_code",
    "storage_of",
    "traced_graph_maybe",
    "without_modes",
    "written_by",
]

# ---- fake tensors

FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"
"""The logger to which an operator that fails on fake tensors is written, although it raises too."""


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether the tensor was made by a :class:`FakeTensorMode`."""
    return isinstance(tensor, FakeTensor)


def fake_mode_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """The mode in which new tensors go together with ``tensor``: its own where it is fake, else none."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else nullcontext()


def storage_of(tensor: torch.Tensor) -> int:
    """A number of the memory that the tensor is a view of; fake and wrapped tensors, which have none, have one too."""
    if tensor.layout != torch.strided or is_functorch_wrapped_tensor(tensor):
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


# ---- operators


ASSERT_SCALAR = torch.ops.aten._assert_scalar.default
"""The check of a size that a trace took for granted."""


def input_spec_maybe(traced: fx.GraphModule) -> Any:
    """How the placeholders of an exported program make its (args, kwargs); ``None`` of a graph that takes them flat."""
    return getattr(traced, "_in_spec", None)


def make_graph(function: Callable[..., Any], inputs: list[Any]) -> fx.GraphModule:
    """``function`` traced on fake tensors into operators of aten, before autograd decomposes them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True, record_stack_traces=True)(*inputs)


def schema_of(target: Any) -> Any:
    """The schema of an operator: its name, its arguments, and whether it writes into one."""
    return target._schema


SOFTMAXES = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
"""What every softmax comes to under a :class:`TorchDispatchMode`; the second is that of attention."""

safe_softmax = torch.ops.aten._safe_softmax
"""A softmax over ``dim`` that gives zeros, not NaN, where all is -inf: a query to which the mask leaves no key."""

TO_COPY = torch.ops.aten._to_copy.default
"""What a change of dtype or device comes to under a :class:`TorchDispatchMode`."""


@cache
def written_by(op: OpOverload) -> frozenset[int | str]:
    """The arguments that the operator writes to, by position and by name."""
    written = [(i, argument.name) for i, argument in enumerate(op._schema.arguments) if argument.is_write]
    return frozenset(key for pair in written for key in pair)


check_with = torch._check_with
"""``(error, condition, message)``: raise ``error(message())`` unless the condition holds. One on a size that is only
known at run time is kept for then. ``torch._check``, which is documented, raises no error of ours."""


def is_grouped_mm(func: Any) -> bool:
    """Whether a ``TorchFunctionMode`` was called for ``grouped_mm``, which shows as the private function it calls."""
    return getattr(func, "__name__", "").endswith("grouped_mm")


# ---- autograd

_tracker = ModuleTracker()


def in_backward() -> bool:
    """Whether autograd's engine is at work in this thread, as when a checkpointed layer is computed again.

    Public in name (for ``torch._C._current_graph_task_id() != -1``), while its documentation promises less.
    """
    return bool(_tracker.is_bw)


# ---- Dynamo


def is_transforming() -> bool:
    """Whether a transformation of ``torch.func`` is under way."""
    return bool(torch._C._are_functorch_transforms_active())


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which the Dynamo of torch 2.11 answers with True in every compilation."""
    return torch.compiler.is_exporting() and getattr(torch.compiler, "_is_exporting_flag", True)


def skip_code(code: Any) -> None:
    """Have Dynamo leave a function's own frame alone, which would count as a graph.

    Where it is inlined it is traced, unlike after ``torch.compiler.disable``, which breaks the graph there.
    """
    torch._dynamo.eval_frame.skip_code(code)


def allow_side_effects(function: Callable[..., None], *args: Any) -> None:
    """In a function that Dynamo traces, also in a checkpoint: call ``function``, which may write to what is outside."""
    # In a checkpoint Dynamo refuses such writes, since the backward repeats them.
    torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(function, *args)


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Have compiled graphs read the size of ``dim`` rather than be compiled again for each."""
    torch._dynamo.mark_dynamic(tensor, dim)


def mark_static(tensor: torch.Tensor) -> torch.Tensor:
    """Have compiled graphs take its sizes as constants, also with ``dynamic=True``."""
    torch._dynamo.mark_static(tensor)
    return tensor


def at_compile_time(function: Callable[[Any], None]) -> None:
    """In a function that Dynamo traces: call ``function(context)`` at once, leaving nothing in the graph."""
    torch._dynamo.comptime.comptime(function)


def constant_local_maybe(context: Any, name: str) -> Any:
    """A local of the function that called :func:`at_compile_time`; ``None`` where the graph takes it as an input."""
    value = context.get_local(name, stacklevel=1)  # from at_compile_time's own frame, one up
    return value.as_python_constant() if value.is_python_constant() else None


# ---- AOTAutograd and Inductor


def traced_graph_maybe() -> fx.Graph | None:
    """In a decomposition: the graph that is being traced, at whose end are the nodes traced so far."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def must_recompute(node: fx.Node) -> None:
    """Have AOTAutograd's partitioner compute the node again in the backward, rather than save it for then."""
    # the user's own checkpointing comes first
    node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)


def set_decompositions(table: Mapping[OpOverload, Callable[..., Any]], *, active: bool) -> None:
    """Have Inductor trace the functions of ``table`` in place of its operators; or, not ``active``, call the operators.

    Takes effect for what is compiled from now on. Harmless to repeat.
    """
    from torch._inductor.decomposition import decompositions, fast_random_decomps, register_decomposition

    if all((op in decompositions) == active for op in table):
        return
    for op, decomposition in table.items():
        decompositions.pop(op, None)
        if active:
            register_decomposition([op])(decomposition)
    fast_random_decomps.cache_clear()  # its copy of the table, made at the first compile if there was one


# ---- nn.Module, and what is wrapped around one


def child_slots(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children by name, under every name and where there is none; ``named_children`` leaves these out."""
    return module._modules


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The module's hooks by their handles' numbers, forward ones first. Not those of its parameters."""
    return [module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks]


def replace_tensors(
    module: nn.Module, buffer: Callable[[Any], Any], parameter: Callable[[Any], Any] | None = None
) -> None:
    """Give the module tensors made of its own, or of ``None``, until its ``__dict__`` is put back."""
    if module._buffers:
        module.__dict__["_buffers"] = {name: buffer(value) for name, value in module._buffers.items()}
    if module._parameters and parameter is not None:
        module.__dict__["_parameters"] = {name: parameter(value) for name, value in module._parameters.items()}


def call_without_hooks(module: nn.Module, but: Callable[[Any], bool]) -> None:
    """Until its ``__dict__`` is put back, the module calls none of the forward hooks that it has, ``but`` some.

    Nor those for all modules of the process, unless it has some of its own; nor what ``module.compile()`` made.
    """
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        kept = [(number, hook) for number, hook in module.__dict__[name].items() if but(hook)]
        module.__dict__[name] = OrderedDict(kept)

    def call(*args: Any, **kwargs: Any) -> Any:
        hooked = module._forward_pre_hooks or module._forward_hooks  # the forward may have added some
        return module._call_impl(*args, **kwargs) if hooked else module.forward(*args, **kwargs)

    module.__dict__["_compiled_call_impl"] = call


def share_contents(module: nn.Module, holder: nn.Module) -> None:
    """Have the module hold what ``holder`` does: the very same parameters, buffers and modules, also from now on."""
    module.__dict__.update({kind: holder.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules")})


REPLICATE = "_replicate_for_data_parallel"
"""The method by which ``nn.DataParallel`` has a module make a replica of itself, without its parameters."""


def is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made the module, to run it in a thread."""
    return getattr(module, "_is_replica", False)


# The child that holds the module itself within torch.compile's, activation checkpointing's and FSDP1's wrapper.
ORIG_MOD = "_orig_mod"
CHECKPOINT_WRAPPED_MODULE = "_checkpoint_wrapped_module"
FSDP_WRAPPED_MODULE = "_fsdp_wrapped_module"

# ---- learning rates

LR_SCHEDULER_STATE = ("base_lrs", "last_epoch", "_step_count", "_last_lr")
"""The attributes of an ``LRScheduler`` that a run resumes from; its ``state_dict`` adds all that a subclass has."""
