"""Golden inputs and outputs: a few images and what the network and each of its files made of them, to check a device.

The images are such as 8 bits hold, so that a graph that takes uint8 can be asked about the same ones.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slim.artifact import Preprocessing
from slim.data import Data
from slim.errors import ParityError, SlimError, StoreError
from slim.export.onnx import reason
from slim.export.parity import open_session
from slim.export.preprocess import pixels_of
from slim.export.target import Target

GOLDEN = "golden.npz"
COUNT = 8
"""Images in it."""

ORACLE = "ort:cpu"
"""What the outputs were computed on; on one thread, so that they repeat."""

NETWORK = "torch"
"""Stands for the network itself where a file's name could stand."""


@dataclass(frozen=True)
class Golden:
    """golden.npz."""

    images: Tensor
    """(N, C, H, W) float32, as the network is fed."""
    pixels: Tensor
    """(N, H, W, C) uint8: the same before mean and deviation."""
    logits: Mapping[str, Tensor]
    """(N, classes) float32 of each file, and of the network in torch under its word."""


def golden_images(data: Data | None, preprocessing: Preprocessing) -> Tensor | None:
    """The first calibration images (N, C, H, W), or those of train or val; none where there are none."""
    if data is None:
        return None
    split = next(name for name in ("calib", "train", "val") if data.has(name))
    return next(data.eval_batches(split, preprocessing, batch_size=COUNT))[0]


def noise(preprocessing: Preprocessing) -> Tensor:
    """(N, H, W, C) random bytes."""
    channels, height, width = preprocessing.size
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (COUNT, height, width, channels), dtype=torch.uint8, generator=random)


def asked(path: Path, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Logits (N, classes) of `images` (N, C, H, W), N at most 8, of the file at `path`, whichever input it takes.

    Raises:
        StoreError: the runtime cannot load it.
        SlimError: the runtime cannot run it on these images.
        ParityError: logits that are not finite.
        MissingExtra: ONNX Runtime is not installed.
    """
    session = open_session(path, Target.parse(ORACLE))
    try:
        fed = pixels_of(images, preprocessing) if session.inputs[0].dtype == "uint8" else images
        found = torch.tensor(np.asarray(session.call([fed.numpy()])[0])).float()
    except Exception as error:  # the runtime's own exceptions share no base class
        raise SlimError(f"{path}: the runtime cannot run it: {reason(error)}; export it again") from error
    if not torch.isfinite(found).all():
        raise ParityError(f"{path}: the runtime gives logits that are not finite; export it from weights that are")
    return found


def write_golden(path: Path, golden: Golden) -> None:
    """The same bytes for the same values: numpy dates what it packs 1980."""
    arrays: dict[str, Any] = {f"logits/{name}": values.numpy() for name, values in golden.logits.items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, images=golden.images.numpy(), image_u8=golden.pixels.numpy(), **arrays)
    path.write_bytes(packed.getvalue())


def read_golden(path: Path) -> Golden:
    """What `write_golden` wrote. Raises StoreError where it did not."""
    try:
        with np.load(path, allow_pickle=False) as packed:
            arrays = {name: torch.from_numpy(packed[name]) for name in packed.files}
        logits = {name.removeprefix("logits/"): arrays[name] for name in arrays if name.startswith("logits/")}
        return Golden(arrays["images"], arrays["image_u8"], logits)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path}: holds no inputs and outputs ({reason(error)}); write the bundle again") from error


@contextmanager
def on_one_thread() -> Iterator[None]:
    """One thread of torch: two add up in another order, and the last bits of logits would tell."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
