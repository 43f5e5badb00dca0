"""Deprecated things that we call, or that the tests do as a user would: of all deprecations, those that are ours."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

OURS = tuple(str(Path(__file__).parents[2] / folder) for folder in ("ltd_fx", "tests"))
# Between a warning and the function that gives it.
PLUMBING = ("warnings", "logging", "functools", "contextlib", "typing_extensions", "transformers.utils.logging")


def is_ours(frame: FrameType | None) -> bool:
    """Whether the function that warns in ``frame``, or within it, was called by a file of ours.

    A library's deprecated function may have helpers beside it; what lies deeper in the library is its own matter.
    """
    file = None
    while frame is not None:
        here = frame.f_code.co_filename
        if here != __file__ and frame.f_globals.get("__name__", "").removesuffix(".__init__") not in PLUMBING:
            if file not in (None, here):
                return here.startswith(OURS)
            file = here
        frame = frame.f_back
    return False


class _Log(logging.Handler):
    """Libraries also announce deprecations in their logs."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower() and is_ours(sys._getframe()):
            self.found.append(message)


@contextmanager
def deprecations() -> Iterator[list[str]]:
    """The messages of our own deprecated calls, as they come."""
    found: list[str] = []
    handler, loggers = _Log(found), [logging.getLogger(name) for name in ("torch", "transformers")]

    def show(message: Any, category: type[Warning], filename: str, *rest: Any) -> None:
        deprecated = issubclass(category, (DeprecationWarning, FutureWarning))
        if deprecated and (filename.startswith(OURS) or is_ours(sys._getframe())):
            found.append(f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = show
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield found
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
