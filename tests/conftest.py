"""Shared by all tests: threads that yield, and the place of the real data."""

from __future__ import annotations

import os
from pathlib import Path

# Read by OpenMP when torch is loaded: waiting threads that spin starve whatever else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real networks and images; the test is skipped where there is none."""
    place = os.environ.get("SLIM_TEST_DATA")
    if not place:
        pytest.skip("SLIM_TEST_DATA is not set: the real network and images are not here")
    return Path(place)
