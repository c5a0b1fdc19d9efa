"""Shared by the tests that train: a network that knows the digits."""

from __future__ import annotations

import pytest
import torch

from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context, Loading
from slim.data import Data, open_data
from slim.passes.finetune import Finetune
from tests.passes.elastic.families import SIZE, SMALL


@pytest.fixture(scope="session")
def six_hundred() -> Data:
    return open_data("digits", limit_train=600, calib=64)


@pytest.fixture(scope="session")
def taught(six_hundred: Data) -> Artifact:
    """The small ResNet after six epochs of six hundred digits: three seconds, and nineteen of twenty are right."""
    name, kwargs = SMALL["resnet"]
    chosen = Backbone(name=name, kwargs=kwargs, num_classes=10, input=Preprocessing(size=SIZE, crop=1.0))
    step = Finetune(epochs=6, lr=3e-3, flip=0.0, scale_low=0.8, precision="fp32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fixture that does so is of each module, and begins later
    try:
        return step(
            Artifact.of(chosen.build(seed=0), chosen), Context(data=six_hundred, loading=Loading(batch_size=32))
        )
    finally:
        torch.set_num_threads(threads)
