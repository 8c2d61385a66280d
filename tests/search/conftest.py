"""A small search."""

from __future__ import annotations

import pytest
from helpers_search import Case, make


@pytest.fixture
def case() -> Case:
    return make()
