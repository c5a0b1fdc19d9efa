"""The meter: a network is exported, and the exported file is measured on the target."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from slim.artifact import Artifact, Preprocessing, state_digest
from slim.bench import accuracy, latency
from slim.bench.table import key, layer_table
from slim.contract import Fed, Progress, no_progress
from slim.data import Data
from slim.errors import DataError
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.parity import parity
from slim.export.target import Target
from slim.measurement import Measurement

T = TypeVar("T")

PARITY_IMAGES = 64
"""Real images on which torch and the exported file are compared; fewer where the data has fewer."""
EVAL_BATCH = 32
"""Images of one call while accuracy is measured; it changes no figure."""


@dataclass(frozen=True)
class TargetMeter:
    """slim.contract.Meter on one target.

    Each network is exported once, with what it is fed, and each question about an exported file answered once: networks
    that export to the same bytes are equally fast, and those fed alike have the same figures.
    """

    on: Target
    data: Data | None
    """Labels in the order of the network's outputs."""
    folder: Path
    """Where exported files are put."""
    seed: int = 0
    progress: Progress = no_progress
    _answers: dict[tuple[str, ...], object] = field(default_factory=dict, repr=False)

    @property
    def target(self) -> str:
        """The target, in the words of `--target`."""
        return str(self.on)

    def export(self, model: Artifact | Fed) -> OnnxFile:
        """The exported file of `model`."""
        digest = _digest(model)
        return self._once(
            ("export", digest),
            lambda: export_onnx(_module(model), self.folder / f"{digest[:16]}.onnx", _input(model)),
        )

    def size(self, model: Artifact | Fed) -> Measurement:
        """Bytes of the exported file."""
        return Measurement(metric="size_bytes", value=self.export(model).size_bytes, unit="bytes")

    def parity(self, model: Artifact | Fed) -> Measurement:
        """Largest absolute difference between torch and the exported file. Raises ParityError."""
        file, fed = self.export(model), _input(model)
        return self._once(
            ("parity", file.sha256, fed.model_dump_json()),
            lambda: parity(_module(model), file.path, self._sample(fed), target=self.on),
        )

    def latency(self, model: Artifact | Fed) -> Measurement:
        """p50 in ms of one call at the target's batch size."""
        file = self.export(model)
        return self._once(
            ("latency", file.sha256),
            lambda: latency.latency(file.path, self.on, seed=self.seed, progress=self.progress),
        )

    def latencies(self, models: Sequence[Artifact | Fed]) -> tuple[Measurement, ...]:
        """`latency` of each, all taken in turn in one run: these may be read side by side. Measured now, and kept."""
        files = {file.sha256: file for file in map(self.export, models)}
        paths = [file.path for file in files.values()]
        found = latency.in_turn(paths, self.on, seed=self.seed, progress=self.progress)
        self._answers.update({("latency", sha256): one for sha256, one in zip(files, found, strict=True)})
        return tuple(self.latency(model) for model in models)

    def beside(self, models: Sequence[Artifact | Fed], reference: Artifact | Fed) -> tuple[Measurement, ...]:
        """Ratio of the latency of each to that of `reference`, all taken in turn in one run."""
        files, theirs = [self.export(model) for model in models], self.export(reference)
        names = tuple(file.sha256 for file in files)
        paths = [file.path for file in files]
        return self._once(
            ("beside", *names, theirs.sha256),
            lambda: latency.beside(paths, theirs.path, self.on, seed=self.seed, progress=self.progress),
        )

    def compare(
        self, candidate: Artifact | Fed, reference: Artifact | Fed, *, limit: float | None = None
    ) -> Measurement:
        """Ratio of latencies candidate / reference; below 1 is faster. Measured longer while `limit` is undecided."""
        ours, theirs = self.export(candidate), self.export(reference)
        return self._once(
            ("compare", ours.sha256, theirs.sha256, str(limit)),
            lambda: latency.compare(
                ours.path, theirs.path, self.on, seed=self.seed, limit=limit, progress=self.progress
            ),
        )

    def table(self, modules: Sequence[tuple[nn.Module, tuple[int, ...]]]) -> list[Measurement]:
        """Time in ms of each module alone, with inputs of the given shape (without batch); see slim/bench/table.py."""
        fresh = {key(entry): entry for entry in modules if ("layer", *key(entry)) not in self._answers}
        found = layer_table([*fresh.values()], self.on, self.folder, seed=self.seed, progress=self.progress)
        self._answers.update({("layer", *name): one for name, one in zip(fresh, found, strict=True)})
        return [cast(Measurement, self._answers["layer", *key(entry)]) for entry in modules]

    def accuracy(self, model: Artifact | Fed) -> Measurement:
        """Top-1 in percent on the validation split.

        Raises:
            DataError: the run has no validation split.
        """
        file, fed = self.export(model), _input(model)
        return self._once(
            ("accuracy", file.sha256, fed.model_dump_json()),
            lambda: measure_accuracy(file.path, self.on, self.data, fed, progress=self.progress),
        )

    def drop(self, candidate: Artifact | Fed, reference: Artifact | Fed) -> Measurement:
        """Top-1 points lost, paired on the same images, each fed its own size; above 0 is worse."""
        return accuracy.drop(self.accuracy(candidate), self.accuracy(reference), seed=self.seed)

    def agreement(self, candidate: Artifact | Fed, reference: Artifact | Fed) -> Measurement:
        """Percent of validation images that both put into the same class."""
        return accuracy.agreement(self.accuracy(candidate), self.accuracy(reference))

    def _sample(self, fed: Preprocessing) -> Tensor:
        """Real images where there are any, (B, C, H, W); calibration images before validation ones."""
        if self.data is None:
            return noise(fed)
        split = next(name for name in ("calib", "train", "val") if self.data.has(name))
        batches = self.data.eval_batches(split, fed, batch_size=EVAL_BATCH)
        images = [images for images, _ in islice(batches, -(-PARITY_IMAGES // EVAL_BATCH))]
        return torch.cat(images)[:PARITY_IMAGES]

    def _once(self, question: tuple[str, ...], answer: Callable[[], T]) -> T:
        if question not in self._answers:
            self._answers[question] = answer()
        return self._answers[question]  # type: ignore[return-value] # the question's first word fixes the type


def measure_accuracy(
    path: Path, target: Target, data: Data | None, preprocessing: Preprocessing, *, progress: Progress = no_progress
) -> Measurement:
    """Top-1 of the file at `path` on the validation split.

    Raises:
        DataError: there is no validation split.
    """
    if data is None or not data.has("val"):
        raise DataError("accuracy: there is no validation split; give --data with val/, or --split val=0.2,train=0.8")
    batches: Iterator[tuple[Tensor, Tensor]] = data.eval_batches("val", preprocessing, batch_size=EVAL_BATCH)
    with progress("accuracy", len(data.split("val"))) as advance:
        return accuracy.accuracy(path, target, batches, progress=lambda images: advance(images, ""))


def noise(preprocessing: Preprocessing) -> Tensor:
    """(8, C, H, W): without images, parity is at least asked on the range that normalised images have."""
    return torch.randn(8, *preprocessing.size, generator=torch.Generator().manual_seed(0))


def _module(model: Artifact | Fed) -> nn.Module:
    return model.model() if isinstance(model, Artifact) else model.model


def _input(model: Artifact | Fed) -> Preprocessing:
    return model.backbone.input if isinstance(model, Artifact) else model.input


def _digest(model: Artifact | Fed) -> str:
    if isinstance(model, Artifact):
        return model.digest
    # Without a history its structure is known by its classes and settings, printed, and its values.
    known = f"{model.model}{state_digest(model.model.state_dict())}{model.input.model_dump_json()}"
    return hashlib.sha256(known.encode()).hexdigest()
