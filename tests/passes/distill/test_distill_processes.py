"""Several processes: distillation by torchrun ends where one process does, whatever is trained along or left unused."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slim import distributed, job, recipe, store
from slim.artifact import Artifact
from tests.passes.distill.classroom import artifact, noise, saved

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")
# Shares of 13 and 12 images: equal weights for both would be wrong by 4 %. No method compares images with each other
# but infonce, which gathers them.
RECIPE = """\
model:
  name: vit_tiny_patch16_224
  args: {img_size: 32, patch_size: 8, depth: 2, embed_dim: 32, num_heads: 2}
  weights: none
  input: {size: [3, 32, 32], crop: 1.0}
data: {source: digits, batch_size: 25, limit: {train: 100, val: 16}}
threads: 1
device: cpu
passes:
  - {name: distill, teacher: TEACHER, method: kd, label_weight: 0.5, mixup: 0.2, epochs: 2, OPTIONS}
  - {name: distill, teacher: TEACHER, method: cosine, epochs: 1, OPTIONS}
  - {name: distill, teacher: TEACHER, method: scalekd=0.1, epochs: 1, OPTIONS}
  - {name: distill, teacher: TEACHER, method: infonce, epochs: 1, OPTIONS}
  - {name: distill, teacher: TEACHER, method: kd, cache: CACHE, epochs: 2, OPTIONS}
"""
OPTIONS = "lr: 0.02, optimizer: sgd, flip: 0.0, precision: fp32"


SCRIPT = """\
import sys
from pathlib import Path
from slim import distributed, job, recipe, store
"""


def learn(file: Path, place: Path) -> None:
    """What the recipe comes to, without files that are measured or shipped; also the script of several processes."""
    prepared = job.prepare(recipe.parse(recipe.read(file), place="test"))
    result = prepared.recipe.pipeline()(prepared.start.artifact, prepared.context())
    distributed.on_main(lambda: store.save(result.artifact, place))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, Path]:
    """What one process and two came to, and the folder that has the caches of both."""
    folder = tmp_path_factory.mktemp("distributed")
    teacher = saved(artifact("wide"), folder / "teacher")
    files = {}
    for which in ("one", "two"):
        text = RECIPE.replace("TEACHER", teacher).replace("CACHE", str(folder / which / "cache"))
        files[which] = folder / f"{which}.yaml"
        files[which].write_text(text.replace("OPTIONS", OPTIONS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = folder / "script.py"
    script.write_text(f"{SCRIPT}\n{inspect.getsource(learn)}\nlearn(Path(sys.argv[1]), Path(sys.argv[2]))\n")
    command += [str(script), str(files["two"]), str(folder / "together")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    learn(files["one"], folder / "alone")
    return store.load(folder / "alone"), store.load(folder / "together"), folder


def test_two_processes_learn_what_one_learns(runs: tuple[Artifact, Artifact, Path]) -> None:
    alone, together, _ = runs
    assert len(alone.history) == 5
    for one, two in zip(alone.history, together.history, strict=True):
        expected, found = every_loss(one.metrics), every_loss(two.metrics)
        assert expected.keys() == found.keys()
        for name, losses in expected.items():
            # SGD is linear in the gradient, so float32 sums in another order stay small; losses are recorded to 1e-6.
            assert found[name] == pytest.approx(losses, rel=1e-5, abs=1e-6), (one.config["method"], name)
    first = alone.history[0].metrics["loss"]
    assert first[-1] < first[0], "nothing was learned, so nothing is compared"
    images = noise(16)
    with torch.inference_mode():
        torch.testing.assert_close(together.model()(images), alone.model()(images), rtol=0, atol=1e-4)


def every_loss(metrics: Any) -> dict[str, list[float]]:
    return {"total": metrics["loss"], **metrics.get("losses", {})}


def test_two_processes_fill_one_cache_with_what_one_would(runs: tuple[Artifact, Artifact, Path]) -> None:
    alone, together, folder = runs
    stored = [
        {file.name: file.read_bytes() for file in (folder / which / "cache").iterdir()} for which in ("one", "two")
    ]
    assert set(stored[0]) == set(stored[1]) == {"index.json", "00000-00000.bin", "00001-00000.bin"}
    assert stored[0] == stored[1]
    checks: list[Any] = [one.history[-1].metrics["cache"] for one in (alone, together)]
    assert checks[0] == checks[1]
    assert checks[0]["records"] == 64
