"""The meter: a network is exported, and the exported file is measured on the target."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from slim import environment
from slim.artifact import Artifact, Preprocessing, state_digest
from slim.bench import accuracy, latency
from slim.bench.table import key, layer_table
from slim.bench.worker import serving
from slim.contract import Fed, Progress, no_progress
from slim.data import Data
from slim.errors import DataError, ParityError, SlimError, UsageError
from slim.export import quantized, ranges
from slim.export.diverging import first_apart, first_apart_files
from slim.export.half import export_half
from slim.export.onnx import OnnxFile, export_onnx
from slim.export.parity import cosine, logits, parity
from slim.export.target import Target
from slim.measurement import Measurement
from slim.quantization import Method, Quantization, quantization_of

T = TypeVar("T")

APART = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.2}
"""Precision -> difference of a tensor, as a share of its largest value, beyond which a node is called apart. Tensors of
right files differ by up to 1e-6, 3e-3 and 0.19 in 32 bits, half precision and INT8."""

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
        """The exported file of `model`, in the form that the target serves.

        Raises:
            UsageError: the target's runtime does not serve INT8.
        """
        wanted, runtime = _quantization(model), self.on.on
        if wanted is None:
            return self._plain(model)
        known = hashlib.sha256(f"{_digest(model)} {runtime.form} {wanted.model_dump_json()}".encode()).hexdigest()
        path = self.folder / f"{known[:16]}.onnx"
        if wanted.precision == "fp16":
            half = lambda: export_half(_module(model), wanted.floats, path, _input(model))  # noqa: E731
            return self._once(("export", known), half)
        if (form := runtime.form) is None:
            raise UsageError(f"target {self.on}: serves no INT8 file; leave out quantize, or choose another runtime")
        plain = self._plain(_unquantized(model))
        return self._once(("export", known), lambda: quantized.write(plain, wanted, form, path))

    def _served(self, model: Artifact | Fed) -> Path:
        """What is opened on the target: the exported file, or what its runtime made of it."""
        file = self.export(model)
        build = lambda: self.on.on.build(file, lambda: _module(model), self.folder, self.on)  # noqa: E731
        return self._once(("served", file.sha256), build)

    def _plain(self, model: Artifact | Fed) -> OnnxFile:
        """The file in 32 bits, which is the same on every target."""
        digest = _digest(model)
        path, fed = self.folder / f"{digest[:16]}.onnx", _input(model)
        # What is kept is compared with torch on ONNX Runtime, whatever the target; what a pass only tries is timed.
        compared = isinstance(model, Artifact) and self._oracle

        def write() -> OnnxFile:
            return export_onnx(_module(model), path, fed, images=self._sample(fed) if compared else None)

        return self._once(("export", digest), write)

    @property
    def _oracle(self) -> bool:
        """Whether ONNX Runtime is here; without it the target's own runtime is all there is to compare with."""
        return Target.parse("ort:cpu").on.probe().level == "ready"

    def size(self, model: Artifact | Fed) -> Measurement:
        """Bytes of the exported file."""
        return Measurement(metric="size_bytes", value=self.export(model).size_bytes, unit="bytes")

    def parity(self, model: Artifact | Fed) -> Measurement:
        """Largest absolute difference between torch and the exported file. Raises ParityError."""
        file, path, fed = self.export(model), self._served(model), _input(model)
        return self._once(("parity", file.sha256, fed.model_dump_json()), lambda: self._parity(model, path, fed))

    def _parity(self, model: Artifact | Fed, path: Path, fed: Preprocessing) -> Measurement:
        images, precision = self._sample(fed), _precision(model) or self.on.precision
        try:
            with serving(path, self.on) as session:
                return parity(_module(model), path, images, target=self.on, precision=precision, session=session)
        except ParityError as error:
            raise ParityError(f"{error}; {self._where(model, images, precision)}") from error

    def _where(self, model: Artifact | Fed, images: Tensor, precision: str) -> str:
        """Of two hops, torch to ONNX and on to the runtime, the first that parts, and the node where it does."""
        plain, tolerance = self._plain(_unquantized(model)), APART[precision]
        try:
            found = first_apart(_module(model), plain, images, tolerance=APART["fp32"])
            if found is None:
                served = self.export(model)
                found = first_apart_files(plain, served, images, target=self.on, tolerance=tolerance)
        except SlimError as error:
            return f"where is not known: {error}"
        return str(found) if found else "no single node stands out"

    def latency(self, model: Artifact | Fed) -> Measurement:
        """p50 in ms of one call at the target's batch size."""
        file, path = self.export(model), self._served(model)
        return self._once(
            ("latency", file.sha256),
            lambda: latency.latency(path, self.on, seed=self.seed, progress=self.progress),
        )

    def latencies(self, models: Sequence[Artifact | Fed]) -> tuple[Measurement, ...]:
        """`latency` of each, all taken in turn in one run: these may be read side by side. Measured now, and kept."""
        paths = {self.export(model).sha256: self._served(model) for model in models}
        found = latency.in_turn([*paths.values()], self.on, seed=self.seed, progress=self.progress)
        self._answers.update({("latency", sha256): one for sha256, one in zip(paths, found, strict=True)})
        return tuple(self.latency(model) for model in models)

    def beside(self, models: Sequence[Artifact | Fed], reference: Artifact | Fed) -> tuple[Measurement, ...]:
        """Ratio of the latency of each to that of `reference`, all taken in turn in one run."""
        files, theirs = [self.export(model) for model in models], self.export(reference)
        names = tuple(file.sha256 for file in files)
        paths, reference_path = [self._served(model) for model in models], self._served(reference)
        return self._once(
            ("beside", *names, theirs.sha256),
            lambda: latency.beside(paths, reference_path, self.on, seed=self.seed, progress=self.progress),
        )

    def compare(
        self, candidate: Artifact | Fed, reference: Artifact | Fed, *, limit: float | None = None
    ) -> Measurement:
        """Ratio of latencies candidate / reference; below 1 is faster. Measured longer while `limit` is undecided."""
        ours, theirs = self.export(candidate), self.export(reference)
        return self._once(
            ("compare", ours.sha256, theirs.sha256, str(limit)),
            lambda: latency.compare(
                self._served(candidate),
                self._served(reference),
                self.on,
                seed=self.seed,
                limit=limit,
                progress=self.progress,
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
        file, path, fed = self.export(model), self._served(model), _input(model)
        return self._once(
            ("accuracy", file.sha256, fed.model_dump_json()),
            lambda: measure_accuracy(path, self.on, self.data, fed, progress=self.progress),
        )

    def drop(self, candidate: Artifact | Fed, reference: Artifact | Fed) -> Measurement:
        """Top-1 points lost, paired on the same images, each fed its own size; above 0 is worse."""
        return accuracy.drop(self.accuracy(candidate), self.accuracy(reference), seed=self.seed)

    def agreement(self, candidate: Artifact | Fed, reference: Artifact | Fed) -> Measurement:
        """Percent of validation images that both put into the same class."""
        return accuracy.agreement(self.accuracy(candidate), self.accuracy(reference))

    def layers(self, model: Fed) -> tuple[str, ...]:
        """Keys of the layers of the exported graph that can be served in INT8, in its order."""
        return quantized.layers(self._plain(model))

    def calibrate(self, model: Fed, method: Method) -> Quantization:
        """INT8 of every layer, with the ranges that activations have on the calibration images.

        Raises:
            DataError: the run has no calibration images.
        """
        file = self._plain(model)
        return self._once(
            ("calibrate", file.sha256, method),
            lambda: self._calibrated(file, model.input, method),
        )

    def _calibrated(self, file: OnnxFile, fed: Preprocessing, method: Method) -> Quantization:
        threads = environment.usable_cores()
        found = ranges.ranges(file, self._calibration(fed), method, self.on, threads)
        return Quantization(graph=quantized.structure(file), method=method, ranges=found)

    def fidelity(self, candidate: Fed, reference: Fed) -> Measurement:
        """Percent of calibration images that both files put into the same class; `details`: `cosine` and `mse`."""
        ours, theirs = (self._calibration_logits(model) for model in (candidate, reference))
        same = (ours.argmax(1) == theirs.argmax(1)).double()
        low, high = accuracy.wilson(int(same.sum()), len(same))
        return Measurement(
            metric="top1_agreement",
            value=100 * same.mean().item(),
            unit="percent",
            n=len(same),
            low=low,
            high=high,
            statistic="mean",
            target=self.target,
            details={"cosine": cosine(theirs, ours), "mse": (ours - theirs).double().square().mean().item()},
        )

    def coverage(self, model: Artifact | Fed) -> Measurement | None:
        """Percent of the layers of an INT8 file that are computed in INT8; `details["float"]` names the rest.

        None where the runtime does not tell.
        """
        found = self.on.on.coverage(self.export(model).path)
        if found is None:
            return None
        return Measurement(
            metric="int8_coverage",
            value=100 * found.fused / found.of if found.of else 0.0,
            unit="percent",
            n=found.of,
            target=self.target,
            details={"float": found.floats},
        )

    def _calibration(self, fed: Preprocessing) -> Iterator[Tensor]:
        if self.data is None or not self.data.has("calib"):
            raise DataError("quantize: there are no calibration images; give --data with a training split")
        data = self.data
        # Kept: every candidate asks for them, and a few hundred take seconds to decode.
        return iter(
            self._once(
                ("calibration", fed.model_dump_json()),
                lambda: [images for images, _ in data.eval_batches("calib", fed, batch_size=EVAL_BATCH)],
            )
        )

    def _calibration_logits(self, model: Fed) -> Tensor:
        file, path = self.export(model), self._served(model)
        return self._once(("logits", file.sha256, model.input.model_dump_json()), lambda: self._logits(path, model))

    def _logits(self, path: Path, model: Fed) -> Tensor:
        with serving(path, self.on, threads=environment.usable_cores()) as session:
            return torch.cat([logits(session, one, place=str(path)) for one in self._calibration(model.input)])

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


def _quantization(model: Artifact | Fed) -> Quantization | None:
    return quantization_of(model.history) if isinstance(model, Artifact) else model.quantization


def _unquantized(model: Artifact | Fed) -> Artifact | Fed:
    """The network itself: to be served in fewer bits changes neither its structure nor its values."""
    if isinstance(model, Fed):
        return replace(model, quantization=None)
    return replace(model, history=tuple(step for step in model.history if quantization_of((step,)) is None))


def _precision(model: Artifact | Fed) -> str | None:
    served = _quantization(model)
    return served.precision if served else None


def _digest(model: Artifact | Fed) -> str:
    if isinstance(model, Artifact):
        return model.digest
    # Without a history its structure is known by its classes and settings, printed, and its values.
    known = f"{model.model}{state_digest(model.model.state_dict())}{model.input.model_dump_json()}"
    return hashlib.sha256(known.encode()).hexdigest()
