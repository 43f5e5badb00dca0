"""The results of one session."""

import pytest
from results import Results


@pytest.fixture(scope="session")
def results() -> Results:
    return Results()
