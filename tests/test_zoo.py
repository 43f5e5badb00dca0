"""Every model of the zoo is right, or refused with the expected reason."""

import re

import pytest
from zoo import ENTRIES
from zoo.entry import Entry
from zoo.table import examine


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.library}: {entry.name}")
def test_right_or_refused(entry: Entry) -> None:
    # RuntimeError: a torchvision that does not fit the installed torch
    pytest.importorskip(entry.library.replace("-", "_"), exc_type=(ImportError, RuntimeError))
    row = examine(entry)
    if entry.refused is None:
        assert row.error is not None, row.reason
        assert row.error < 1e-6
    else:
        assert row.error is None
        assert re.search(entry.refused, row.reason)
