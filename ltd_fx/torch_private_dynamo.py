"""The private names of torch that ``ltd_fx.backend`` needs: what Dynamo knows of the frame whose graph it hands over.

As those of ``torch_private``: each has a test of its name, and all were seen in torch 2.11.0, 2.13.0 and 2.14.1.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

__all__ = [
    "COMPILED_CALL",
    "backend_named",
    "compile_number",
    "compiled_in_place",
    "custom_graph_pass",
    "frame_in_progress",
    "guard_training",
    "mark_any_size",
    "put_tensor",
    "source_name",
    "sources_of",
    "trace_again",
]


class Frame(NamedTuple):
    """The frame that Dynamo is compiling.

    Attributes:
        name: of its code.
        scope: its locals and globals, as ``L`` and ``G`` in the names of sources.
        resumed: whether it goes on after a graph break.
        broken: the line of the graph break that the graph ends at; empty where it ends with the frame.
    """

    name: str
    scope: dict[str, Any]
    resumed: bool
    broken: str


def frame_in_progress() -> Frame:
    """In a backend: the frame whose graph it was given."""
    from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    output, name = translator.output, translator.f_code.co_name
    reason = output.compile_subgraph_reason
    line = ""
    if reason is not None and reason.graph_break:
        where = reason.user_stack[-1] if reason.user_stack else None
        line = reason.reason if where is None else f"{where.filename}:{where.lineno}"
    scope = {"L": output.local_scope, "G": output.global_scope}
    return Frame(name, scope, name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX), line)


def sources_of(placeholder: fx.Node) -> Iterator[Any]:
    """Where an input of Dynamo's graph comes from: its source, and what that is an attribute or an item of, ..."""
    argument = placeholder.meta.get("grapharg")
    source = None if argument is None else argument.source
    while source is not None:
        yield source
        source = getattr(source, "base", None)


def source_name(source: Any) -> str:
    """The source as an expression of :attr:`Frame.scope`."""
    name = source.name
    return str(name() if callable(name) else name)


def guard_training(module: Any) -> None:
    """In a backend: have Dynamo compile the frame again where ``training`` of the module, a source, changes."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource

    install_guard(AttrSource(module, "training").make_guard(GuardBuilder.CONSTANT_MATCH))


def mark_any_size(tensor: torch.Tensor) -> None:
    """Have the next trace take every size of the tensor for a symbol of its own, but those that the program fixes."""
    for dim in range(tensor.ndim):
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def trace_again(reason: str) -> None:
    """In a backend: have Dynamo trace the frame once more, for inputs that were marked since."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import InstructionTranslator

    InstructionTranslator.current_tx().speculation_log.clear()  # It would hold the next trace to the steps of this one.
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def custom_graph_pass(run: Callable[[fx.Graph], None], identity: Any) -> Any:
    """For ``torch._inductor.config.pre_grad_custom_pass``; Inductor's cache tells passes by their ``identity``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            run(graph)

        def uuid(self) -> Any:
            return identity

    return Pass()


def put_tensor(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    """Have the module hold ``tensor`` as the parameter or buffer that it has of that name, whatever its class."""
    held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    held[name] = tensor


COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that its ``compile`` method sets: another function for each module."""


def compiled_in_place(module: nn.Module) -> bool:
    """Whether the module's ``compile`` method was called."""
    return getattr(module, COMPILED_CALL) is not None


def backend_named(backend: Any) -> Any:
    """The backend of that name, or ``backend`` itself."""
    from torch._dynamo import lookup_backend

    return lookup_backend(backend)


def compile_number() -> Any:
    """Of the compilation that is under way; the same when the frame is traced again."""
    from torch._guards import CompileContext

    return CompileContext.current_compile_id()
