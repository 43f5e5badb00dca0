"""Tests that pass without ltd_fx and rightly fail with it: what they assert is what routing changes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Design:
    library: str
    mode: str  # "half": tokens are dropped. In "full", nothing may differ.
    test: str  # a regular expression over test ids
    reason: str


BY_DESIGN: list[Design] = []
