"""Several processes: a network and its subnets learn what they learn in one."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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
from slim.passes.elastic import trials
from slim.passes.elastic.sampling import ladder, sandwich
from slim.passes.elastic.space import Subnet
from slim.passes.elastic.trials import Trials
from slim.training import Training
from tests.passes.elastic import toys_of_search
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


# What all processes of a search need


@dataclass
class Two:
    """Two processes of two machines with one storage, in one."""

    here: Trials
    there: Trials
    who: str
    asked: list[str] = field(default_factory=list)
    meanwhile: float | None = None

    def accuracy(self, subnet: Subnet) -> float:
        self.asked.append(self.who)
        return 50.0

    def at_once(self, subnet: Subnet) -> float:
        """Evaluated there; meanwhile it is asked for here."""
        self.who = "here:1"
        self.meanwhile = self.here.once(subnet, self.accuracy)
        self.who = "there:1"
        return self.accuracy(subnet)


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    url, space = f"sqlite:///{tmp_path / 'search.db'}", toys_of_search.space(2)
    made = Two(Trials("toy", url, space), Trials("toy", url, space), "there:1")
    monkeypatch.setattr(trials, "_owner", lambda: made.who)
    return made


def test_what_all_need_is_evaluated_by_one_and_the_others_wait(both: Two) -> None:
    largest = toys_of_search.space(2).largest
    assert both.there.once(largest, both.at_once) == 50.0
    assert both.meanwhile is None
    assert both.here.once(largest, both.accuracy) == 50.0
    assert both.asked == ["there:1"]


def test_what_another_process_does_not_end_is_not_waited_for_for_ever(
    both: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "PATIENCE_S", 0)
    assert both.there.once(toys_of_search.space(2).largest, both.at_once) == 50.0
    assert (both.meanwhile, both.asked) == (50.0, ["here:1", "there:1"])


def test_what_raises_is_evaluated_by_the_next_that_needs_it(both: Two) -> None:
    largest = toys_of_search.space(2).largest

    def fails(subnet: Subnet) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both.there.once(largest, fails)
    both.who = "here:1"
    assert both.here.once(largest, both.accuracy) == 50.0
