"""What the attention kernels of a layer count by themselves: documents, and windows of so many tokens.

Transformers hands them as numbers to a kernel, which sees the kept tokens only. Which kernel that is, is said by the
configuration that a layer's attention holds, and may be set anew at any time (``set_attn_implementation``).
"""

from collections.abc import Sequence

from torch import nn

from ltd_fx.errors import LTDError

_NAME = "_attn_implementation"
# Of transformers' own, those that take documents from the mask.
_BY_MASKS = ("", "eager", "sdpa", "flex_attention")


def attentions(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of ``layer`` that hold the configuration in which transformers names the kernel."""
    return tuple(module for module in layer.modules() if hasattr(getattr(module, "config", None), _NAME))


def kernel_of(module: nn.Module) -> str:
    """The name of the kernel of one of them, as it is now; empty if it has none."""
    return getattr(module.config, _NAME) or ""


def is_flash(kernel: str) -> bool:
    """Whether it is some flash attention, or one of a hub: as transformers tells it, by its name."""
    return "flash" in kernel


def is_unknown(kernel: str) -> bool:
    """Whether it is one that a user registered under a name of its own."""
    return kernel not in _BY_MASKS and not is_flash(kernel)


def window_of(module: nn.Module) -> int | None:
    """The window of one of them, where it is said as most of transformers' models do."""
    if not getattr(module, "is_sliding", True):
        return None
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return window if isinstance(window, int) else None


def refuse_window(name: str, modules: Sequence[nn.Module], seq_len: int) -> None:
    """Raise :class:`LTDError` if a kernel counts a window among the tokens that it is given, of which some are dropped.

    Args:
        name: of the layer.
        modules: its :func:`attentions`.
        seq_len: S; a window as long as that leaves nothing out.
    """
    for module in modules:
        kernel = kernel_of(module)
        if is_flash(kernel) and (window := window_of(module)) is not None and window < seq_len:
            raise LTDError(
                f"ltd_fx: {name} cannot be routed: its kernel ({kernel}) counts a window of "
                f"{window} tokens among those it is given, and sequences have more, of which some are dropped; load "
                "the model with attn_implementation='sdpa' or 'flex_attention', whose masks know where a token was, or "
                "leave it out with transform(..., layers=...)"
            )
