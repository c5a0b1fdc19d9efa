"""Targets of TensorRT and TensorRT-RTX: an engine is built from the ONNX file, and opened where there is a GPU.

Without one TensorRT-RTX still builds, ahead of time, and TensorRT's files are written for the device to build. How far
that was tested is said by `State.reason`, and by whoever reports it: built is not executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from slim.errors import StoreError
from slim.export import tensorrt
from slim.export.engine import ARCH, OS, PLAN, Sidecar, read_engine, read_sidecar, write_engine
from slim.export.onnx import OnnxFile
from slim.export.runtime import Runtime, State
from slim.export.session import Session
from slim.export.target import Target
from slim.export.tensorrt import APIS, BuildOptions

if TYPE_CHECKING:
    from slim.export.lint import Rule


class TensorRt(Runtime):
    """TensorRT 10.3 to 11.4, where it is installed: on the device, as a rule."""

    name = "tensorrt"
    about = "TensorRT's Python API on an NVIDIA GPU"
    module: ClassVar[Literal["tensorrt", "tensorrt_rtx"]] = "tensorrt"
    distributions: ClassVar[tuple[str, ...]] = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
    remedy = "export here, and build the s8 file on the device, by trtexec or by slim"
    opener = "slim.export.tensorrt_targets:open_tensorrt"
    builds = True
    remote = False

    def probe(self) -> State:
        """Ready with the module and a GPU; else the file it takes is all that can be had here."""
        found = super().probe()
        if found.level != "ready":
            return State("emit only", reason=found.reason, remedy=self.remedy)
        return found if _gpu() else State("emit only", found.version, "there is no NVIDIA GPU here", self.remedy)

    def rules(self) -> tuple[Rule, ...]:
        """See export/lint.py."""
        from slim.export.lint import TENSORRT

        return TENSORRT

    def build(self, file: OnnxFile, model: Callable[[], nn.Module], folder: Path, target: Target) -> Path:
        """The plan of `file` for batches up to the target's, in a folder with its sidecar; one that fits is kept.

        Raises:
            SlimError: the parser or the builder refuses the graph.
            MissingExtra: the module is not installed.
        """
        options = BuildOptions(batch=(1, target.batch, target.batch))
        asked = options.model_dump(mode="json")
        place = folder / f"{file.path.stem}-{self.module}-{target.batch}"
        if place.exists():
            try:
                _checked(place, self.module, file.sha256, asked)
                return place / PLAN
            except StoreError:
                pass  # of another file or build: made anew below, and replaced as a whole
        built = tensorrt.build(self.module, file.path, options)
        gpu = _gpu()
        sidecar = Sidecar(
            onnx_sha256=file.sha256,
            plan_sha256=hashlib.sha256(built.plan).hexdigest(),
            size_bytes=len(built.plan),
            api=self.module,
            version=built.version,
            gpu=gpu[0] if gpu else None,
            compute_capability=gpu[1] if gpu else None,
            driver=None,
            os=OS,
            arch=ARCH,
            options=asked,
            timing_cache_sha256=None,
            executed=False,
        )
        return write_engine(place, built.plan, sidecar)


class TensorRtRtx(TensorRt):
    """TensorRT-RTX: builds ahead of time on any x86-64 machine, under NVIDIA's licence."""

    name = "tensorrt-rtx"
    about = "TensorRT-RTX: builds engines without a GPU, runs them on one"
    module = "tensorrt_rtx"
    distributions = ("tensorrt-rtx", "tensorrt_rtx")
    remedy = APIS["tensorrt_rtx"][1]
    opener = "slim.export.tensorrt_targets:open_tensorrt_rtx"

    def probe(self) -> State:
        """Ready with a GPU, `build only` without."""
        found = Runtime.probe(self)
        if found.level != "ready" or _gpu():
            return found
        reason = "there is no NVIDIA GPU here: engines are built ahead of time, not executed"
        return State("build only", found.version, reason, "run slim on the device")


def open_tensorrt(path: str, *, threads: int, precision: str, mode: str) -> Session:
    """The plan at `path`, in a folder with its sidecar, once it is known to be for this machine."""
    return _opened(Path(path), "tensorrt")


def open_tensorrt_rtx(path: str, *, threads: int, precision: str, mode: str) -> Session:
    """As `open_tensorrt`."""
    return _opened(Path(path), "tensorrt_rtx")


def _opened(path: Path, api: str) -> Session:
    sidecar = read_sidecar(path.parent)
    return tensorrt.Session(api, _checked(path.parent, api, sidecar.onnx_sha256, sidecar.options))


def _checked(folder: Path, api: str, onnx_sha256: str, options: Mapping[str, Any]) -> bytes:
    """The plan in `folder`; before it is deserialised, for a plan is a program."""
    gpu = _gpu()
    return read_engine(
        folder,
        onnx_sha256=onnx_sha256,
        api=api,
        version=tensorrt.version(api),
        gpu=gpu[0] if gpu else None,
        compute_capability=gpu[1] if gpu else None,
        options=options,
    )


def _gpu() -> tuple[str, str] | None:
    """Name and compute capability of the GPU here."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"
