"""Which of two timm networks is faster on this machine? Measured on their exported files, paired in one run.

python examples/compare_backbones.py resnet18 mobilenetv3_small_100
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from slim.artifact import Backbone
from slim.bench.latency import compare, differs
from slim.export.onnx import export_onnx
from slim.export.target import Target


def main(reference: str, candidate: str) -> None:
    """Export both, time them in lockstep, print the ratio and what it allows to say."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name in (candidate, reference):
            backbone = Backbone(name=name, num_classes=1000)
            files.append(export_onnx(backbone.build(), Path(folder) / f"{name}.onnx", backbone.input).path)
        ratio = compare(*files, Target.parse("ort:cpu,threads=1"), seed=0)
    verdict = "no difference that can be shown" if not differs(ratio) else "faster" if ratio.value < 1 else "slower"
    print(f"{candidate} against {reference}: {ratio}: {verdict}")


if __name__ == "__main__":
    main(*sys.argv[1:])
