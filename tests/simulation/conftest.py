from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulation.patches import simulated


@pytest.fixture(autouse=True, scope="module")
def simulation() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with simulated():
        yield
    logging.disable(logging.NOTSET)
