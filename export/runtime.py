"""Runtimes: one small class for each, and what each can do on this machine.

Another package adds one of its own by an entry point of the group `slim.targets`: its name is the runtime's, its value
a subclass of `Runtime`. Only what is installed on this machine is looked at; no file names one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slim.errors import SlimError, StoreError, TargetError, UsageError
from slim.export.session import HINTS, Session, open_file

if TYPE_CHECKING:
    from torch import nn

    from slim.export.lint import Rule
    from slim.export.onnx import OnnxFile
    from slim.export.quantized import Coverage
    from slim.export.target import Target

GROUP = "slim.targets"
"""Entry-point group of runtimes from other packages."""

Form = Literal["u8", "s8"]
"""How INT8 is written: uint8 activations, or what TensorRT takes: int8, zero point 0; see export/quantized.py."""

Level = Literal["ready", "build only", "emit only", "missing"]


@dataclass(frozen=True)
class State:
    """What a runtime can do on this machine."""

    level: Level
    """`ready` runs files, `build only` makes engines that cannot be run here, `emit only` writes what is built on the
    device, `missing` is not installed."""
    version: str | None = None
    reason: str = ""
    """Why it can do no more."""
    remedy: str = ""
    """The way out."""

    def __str__(self) -> str:
        words = [f"{self.level}, {self.version}" if self.version else self.level, self.reason, self.remedy]
        return "; ".join(filter(None, words))


class Runtime:
    """A runtime on a device that is served ONNX files as they are."""

    name: ClassVar[str]
    """`runtime:device`, or the runtime alone where there is one device."""
    about: ClassVar[str]
    """One line of help."""
    module: ClassVar[str]
    """What is imported to open a file."""
    distributions: ClassVar[tuple[str, ...]]
    """Packages that may hold the module."""
    remedy: ClassVar[str]
    """How to get it."""
    opener: ClassVar[str]
    """What opens a file: a key of OPENERS in export/session.py, or `module:function` of the package that adds it."""
    form: ClassVar[Form | None] = "s8"
    """How INT8 is written for it; none where it cannot serve it."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    """Words that `precision=` takes; the first is the default."""
    builds: ClassVar[bool] = False
    """Whether it is served engines, built from the files."""
    remote: ClassVar[bool] = True
    """Whether its files can be served on another machine by export/session.py alone."""
    modes: ClassVar[tuple[str, ...]] = ()
    """Words that `mode=` takes; the first is the default."""

    def probe(self) -> State:
        """What it can do here. Imports nothing heavy."""
        if util.find_spec(self.module) is None:
            return State("missing", reason=f"{self.module} is not installed", remedy=self.remedy)
        return State("ready", self._version())

    def rules(self) -> tuple[Rule, ...]:
        """What a graph must keep to be served by it."""
        return ()

    def build(self, file: OnnxFile, model: Callable[[], nn.Module], folder: Path, target: Target) -> Path:
        """What is opened on `target` to serve `file`, the export of `model`; what has to be made is put in `folder`.

        Raises:
            SlimError: it cannot be built.
        """
        return file.path

    def coverage(self, path: Path) -> Coverage | None:
        """How many layers of the INT8 file at `path` it computes in INT8; none where it does not tell."""
        return None

    def open(self, path: Path, *, threads: int, precision: str, mode: str = "") -> Session:
        """The file at `path`, opened in this process.

        Raises:
            UsageError: no such file.
            StoreError: the runtime cannot load it.
        """
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give an exported file")
        try:
            return open_file(self.opener, str(path), threads=threads, precision=precision, mode=mode)
        except SlimError:
            raise
        except Exception as error:  # the runtimes' own exceptions share no base class
            reason = " ".join(str(error).split())[:300]
            raise StoreError(f"{path}: {self.name} cannot load it: {reason}; export it again") from error

    def _version(self) -> str:
        for distribution in self.distributions:
            try:
                return metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return "unknown"


class OnnxRuntimeCpu(Runtime):
    """ONNX Runtime's CPU provider: the oracle of parity, and the runtime that every machine can have."""

    name = opener = "ort:cpu"
    about = "ONNX Runtime on the processor"
    module = "onnxruntime"
    distributions = ("onnxruntime", "onnxruntime-gpu")
    remedy = "pip install 'slim[cpu]'"
    form = "u8"

    def coverage(self, path: Path) -> Coverage:
        """By the kernels in the graph as it is after loading."""
        from slim.export.quantized import coverage

        return coverage(path)

    def rules(self) -> tuple[Rule, ...]:
        """See export/lint.py."""
        from slim.export.lint import ONNXRUNTIME

        return ONNXRUNTIME


class _OnnxRuntimeGpu(Runtime):
    module = "onnxruntime"
    distributions = ("onnxruntime-gpu",)
    provider: ClassVar[str]

    def probe(self) -> State:
        found = super().probe()
        if found.level == "missing":
            return found
        import onnxruntime

        if self.provider not in onnxruntime.get_available_providers():
            reason = f"the installed onnxruntime {onnxruntime.__version__} has no {self.provider}"
            return State("missing", reason=reason, remedy=self.remedy)
        return needs_gpu(found)


class OnnxRuntimeCuda(_OnnxRuntimeGpu):
    """ONNX Runtime's CUDA provider."""

    name = opener = "ort:cuda"
    about = "ONNX Runtime on an NVIDIA GPU"
    remedy = "pip install 'slim[gpu]' in place of onnxruntime"
    provider = "CUDAExecutionProvider"


class OnnxRuntimeTensorRt(_OnnxRuntimeGpu):
    """ONNX Runtime's TensorRT provider; the wheel on PyPI is built against TensorRT 10."""

    name = opener = "ort:tensorrt"
    about = "ONNX Runtime with TensorRT 10 on an NVIDIA GPU"
    remedy = "pip install 'slim[gpu]' in place of onnxruntime, and TensorRT 10"
    provider = "TensorrtExecutionProvider"

    def rules(self) -> tuple[Rule, ...]:
        """TensorRT parses what it is given."""
        from slim.export.lint import TENSORRT

        return TENSORRT


class OpenVinoCpu(Runtime):
    """OpenVINO's CPU plugin. `precision=fp32` is asked for: left alone it computes in bf16 where the processor can."""

    name = opener = "openvino:cpu"
    about = "OpenVINO on the processor"
    module = "openvino"
    distributions = ("openvino",)
    remedy = "pip install 'slim[openvino]'"
    precisions = ("fp32", "bf16", "fp16")

    def coverage(self, path: Path) -> Coverage:
        """By the precision that each layer of the compiled graph says it runs in."""
        import openvino

        from slim.export.quantized import NOT_FUSED, Coverage

        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": HINTS["fp32"]})
        layers = {}
        for operator in compiled.get_runtime_model().get_ordered_ops():
            notes = operator.get_rt_info()
            if notes["layerType"].astype(str) in ("Convolution", "FullyConnected"):
                layers[operator.get_friendly_name()] = notes["runtimePrecision"].astype(str)
        floats = {name: NOT_FUSED for name, kind in layers.items() if kind not in ("u8", "i8")}
        return Coverage(len(layers) - len(floats), len(layers), floats)

    def rules(self) -> tuple[Rule, ...]:
        """See export/lint.py."""
        from slim.export.lint import OPENVINO

        return OPENVINO


BUILT_IN: tuple[type[Runtime], ...] = (OnnxRuntimeCpu, OnnxRuntimeCuda, OnnxRuntimeTensorRt, OpenVinoCpu)


@cache
def runtimes() -> Mapping[str, Runtime]:
    """Every runtime by name: slim's own, and those of installed packages.

    Raises:
        TargetError: an entry point that is no runtime, or takes a name that is taken.
    """
    from slim.export.tensorrt_targets import TensorRt, TensorRtRtx
    from slim.export.torch_program import TorchCpu, TorchCuda

    own: tuple[type[Runtime], ...] = (*BUILT_IN, TorchCpu, TorchCuda, TensorRt, TensorRtRtx)
    found = {runtime.name: runtime() for runtime in own}
    for entry in metadata.entry_points(group=GROUP):
        place = f"target {entry.name!r} of {entry.dist.name if entry.dist else entry.value}"
        loaded: Any = entry.load()
        if not isinstance(loaded, type) or not issubclass(loaded, Runtime):
            raise TargetError(f"{place}: {entry.value} is no subclass of slim.export.Runtime; mend or remove it")
        if loaded.name != entry.name or entry.name in found:
            rule = "is taken" if entry.name in found else f"is not the name it has itself, {loaded.name!r}"
            raise TargetError(f"{place}: the name {rule}; mend or remove that package")
        found[entry.name] = loaded()
    return found


def needs_gpu(found: State) -> State:
    """`found`, or `missing` where torch sees no NVIDIA device."""
    import torch

    if torch.cuda.is_available():
        return found
    return State("missing", found.version, "there is no NVIDIA GPU here", "run slim on the device, or name it: @ssh://")
