"""Programs of torch.export, served by torch itself: eager, through torch.compile, or compiled ahead of time.

The program is written beside the ONNX file, with the names of its input and output. Ahead-of-time compilation
(AOTInductor) is experimental: it takes a C++ compiler, and its package runs only on processors like this one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from slim.errors import SlimError
from slim.export.onnx import OnnxFile, quiet, reason
from slim.export.runtime import Runtime, State, needs_gpu
from slim.export.target import Target
from slim.store import write_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchCpu(Runtime):
    """torch on the processor. What it computes in is decided by `precision`; INT8 files are not for it."""

    name = opener = "torch:cpu"
    about = "torch on the processor: eager, compiled or ahead of time (experimental)"
    module = "torch"
    distributions = ("torch",)
    remedy = "pip install torch"
    form = None
    remote = False
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    modes = ("eager", "compiled", "aoti")
    device: ClassVar[str] = "cpu"

    def build(self, file: OnnxFile, model: Callable[[], nn.Module], folder: Path, target: Target) -> Path:
        """A `.pt2` program with the free batch of `file`, and its ports as JSON beside it."""
        path = folder / f"{file.path.stem}-{target.precision}-{target.mode}-{self.device}.pt2"
        served = _Cast(copy.deepcopy(model()).to(self.device, DTYPES[target.precision])).eval()
        source = file.inputs[0]
        size = [side for side in source.shape[1:] if isinstance(side, int)]
        low, high = file.batch_range
        fixed = target.mode != "eager"  # a compiler that knows the batch makes faster kernels
        batch = target.batch if fixed else max(2, low)
        example = torch.zeros(batch, *size, device=self.device)
        shapes = None if fixed else ({0: torch.export.Dim("batch", min=low, max=high)},)
        try:
            with torch.inference_mode(False), torch.no_grad(), quiet():
                program = torch.export.export(served, (example,), dynamic_shapes=shapes)
                if target.mode == "aoti":
                    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
                else:
                    torch.export.save(program, path)
        except Exception as error:  # the compiler raises what any operator in the network raises
            raise SlimError(
                f"{target}: {file.path.name} cannot be built: {reason(error)}; take mode=eager, or another runtime"
            ) from error
        ports = {
            name: [[port.name, port.dtype, [batch if fixed else port.shape[0], *port.shape[1:]]] for port in found]
            for name, found in (("inputs", file.inputs), ("outputs", file.outputs))
        }
        write_text(path.with_name(f"{path.name}.json"), json.dumps(ports))
        return path


class TorchCuda(TorchCpu):
    """torch on an NVIDIA GPU."""

    name = opener = "torch:cuda"
    about = "torch on an NVIDIA GPU: eager, compiled or ahead of time (experimental)"
    precisions = ("fp32", "bf16", "fp16")
    device = "cuda"

    def probe(self) -> State:
        """Ready where torch sees a device."""
        return needs_gpu(super().probe())


class _Cast(nn.Module):
    """Takes and gives 32-bit floats, whatever lies between."""

    def __init__(self, served: nn.Module) -> None:
        super().__init__()
        self.served = served
        self.dtype = next((value.dtype for value in served.parameters()), torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.served(images.to(self.dtype))
        return logits.float()
