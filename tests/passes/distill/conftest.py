"""Shared by the tests that train."""

from __future__ import annotations

from pathlib import Path

import pytest

from slim.artifact import Artifact
from slim.data import Data, open_data
from slim.passes.finetune import Finetune
from tests.passes.distill.classroom import Spy, artifact, context, saved


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", limit_train=64, limit_val=32)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.fixture(scope="module")
def able() -> tuple[Artifact, Data]:
    """A network that has learned the digits, and more of them."""
    data = open_data("digits", limit_train=320, limit_val=200)
    learn = Finetune(epochs=8, lr=3e-3, flip=0.0, scale_low=0.9, precision="fp32")
    return learn(artifact("vit"), context(data)), data


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return saved(artifact("wide"), tmp_path / "teacher")
