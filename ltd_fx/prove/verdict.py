"""What token flow says of a layer."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """``mixes`` says why a layer is wrong, ``unknown`` why it could not be told; a layer with neither is right."""

    mixes: str = ""
    unknown: str = ""
