"""Shared by the tests that train."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """accelerate collects garbage after each training: searching all that was imported takes longer than the rest."""
    gc.freeze()
    yield
    gc.unfreeze()
