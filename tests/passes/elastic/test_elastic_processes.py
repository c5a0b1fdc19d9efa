"""Several processes: a network and its subnets learn what they learn in one."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim import training
from slim.artifact import Backbone
from slim.contract import Context, Loading
from slim.data import Augment, open_data
from slim.distributed import is_main
from slim.passes.elastic.sampling import ladder, sandwich
from slim.training import Training
from tests.passes.elastic.toys_of_training import VIT, branched, sandwiched, space_of

pytestmark = pytest.mark.usefixtures("one_thread")

IMPORTS = """\
from __future__ import annotations
import copy, json, sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from safetensors.torch import save_file
from slim import training
from slim.artifact import Backbone
from slim.contract import Context, Loading
from slim.data import Augment, open_data
from slim.distributed import is_main
from slim.passes.elastic.blocks import Block
from slim.passes.elastic.gates import gated
from slim.passes.elastic.objective import Branches, Sandwich
from slim.passes.elastic.sampling import ladder, sandwich
from slim.passes.elastic.space import Dim, Space
from slim.passes.prune.groups import groups_of
from slim.training import Training
"""


def learn(backbone: Backbone, kind: str, place: Path) -> None:
    """Train and write down what came of it; also the script of several processes."""
    model = backbone.build()
    fields = {"ramp": 0.5, "divergence": "alpha", "temperature": 2.0, "guard": 0.5, "original": copy.deepcopy(model)}
    # Shares of 13 and 12 images: equal weights for both would be wrong by 4 %.
    context = Context(data=open_data("digits", limit_train=100, limit_val=16), backbone=backbone, loading=Loading(25))
    settings, augment = Training(epochs=2, lr=0.05, optimizer="sgd", precision="fp32"), Augment(flip=0.0, mixup=0.2)
    with sandwiched(model, **fields) if kind == "sandwich" else branched(model) as (objective, space):
        objective.draw = partial(sandwich, space, 0, count=3) if kind == "sandwich" else partial(ladder, space, 0)
        figures = training.train(model, objective, settings, augment, context)
    if is_main():
        Path(f"{place}-{kind}.json").write_text(json.dumps(figures))
        save_file(model.state_dict(), f"{place}-{kind}.safetensors")


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    # No batch norms: each process would normalise by its own share.
    script, kinds = tmp_path / "script.py", ("sandwich", "branches")
    call = f"for kind in {kinds}:\n    learn(Backbone(**{VIT.model_dump(mode='json')}), kind, Path(sys.argv[1]))\n"
    parts: list[Callable[..., Any]] = [space_of, sandwiched, branched, learn]
    script.write_text("\n".join([IMPORTS, *(inspect.getsource(part) for part in parts), call]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(script), str(tmp_path / "two")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    fresh = VIT.build().state_dict()
    for kind in kinds:
        learn(VIT, kind, tmp_path / "one")
        alone, together = (json.loads((tmp_path / f"{name}-{kind}.json").read_text()) for name in ("one", "two"))
        for name, losses in alone["losses"].items():
            # SGD is linear in the gradient, so sums in another order stay small; losses are recorded to 1e-6.
            assert together["losses"][name] == pytest.approx(losses, rel=1e-5, abs=2e-6), name
        one, two = (load_file(tmp_path / f"{name}-{kind}.safetensors") for name in ("one", "two"))
        assert max(float((one[name] - fresh[name]).abs().max()) for name in fresh) > 1e-3, "nothing was learned"
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
