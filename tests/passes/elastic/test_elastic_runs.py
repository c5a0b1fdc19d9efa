"""Whole runs of `elastic` and `subnet`: by two processes, and killed in training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import optuna
import pytest

from slim import store
from slim.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# fmt: off
NETWORK = (
    "--model", "convnext_atto", "--model-arg", "depths=[1,1,2,1]", "--model-arg", "dims=[16,16,32,32]",
    "--model-arg", "patch_size=2", "--model-arg", "output_stride=16", "--input-size", "32", "--weights", "none",
)
DIGITS = ("--data", "digits", "--limit-train", "200", "--limit-val", "40", "--threads", "1", "--batch-size", "25")
TAUGHT = ("finetune", "--epochs", "6", "--lr", "0.003", "--flip", "0", "--precision", "fp32")
ELASTIC = (
    "elastic", "--ranks", "1", "--ranks", "0.5", "--min-width", "8", "--align", "4", "--pixels", "24",
    "--criterion", "group-l2", "--held-out", "80", "--precision", "fp32", "--nets", "3",
)
SUBNET = ("subnet", "--to", "0.6x-macs", "--evaluations", "6", "--proposals", "100")
# fmt: on


@pytest.fixture(scope="module")
def taught(call: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows some digits; not to be changed."""
    out = Path(tmp_path_factory.mktemp("taught") / "run")
    said = call("run", *NETWORK, *DIGITS, "--out", out, *TAUGHT)
    assert said.code == 0, said.err
    return out


def line(taught: Path, out: Path, epochs: int, *more: str) -> list[str]:
    """120 images to train on: 4 steps an epoch."""
    return ["run", "--model", str(taught), *DIGITS, "--out", str(out), *ELASTIC, "--epochs", str(epochs), *more]


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# Two processes

SCRIPT = """
import sys
from pathlib import Path
from slim import cli, job, recipe
from slim.distributed import rank

def slim(words):
    try:
        cli.main([str(word) for word in words])
    except SystemExit as ended:
        assert not ended.code, ended.code

folder = Path(sys.argv[1])
slim(sys.argv[2:])
whole = folder / "two" / "steps" / "01-elastic"
few = ("--evaluations", 4, "--proposals", 100)
slim(["family", whole, "--to", "0.8x-macs,0.6x-macs", *few, "--out", folder / "family"])
for epochs in (1, 0):
    values = recipe.read(folder / "two" / "recipe.yaml")
    values["passes"][0]["epochs"] = epochs
    found = job.prepare(recipe.parse(values, place="test"))
    artifact = found.recipe.pipeline()(found.start.artifact, found.context()).artifact
    (folder / f"{epochs}-{rank()}").write_text(artifact.digest)
"""


@pytest.fixture(scope="module")
def two(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes left: a run, a family, digests of the chain trained and not trained; and what they said."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(folder / "script.py"), str(folder), *line(taught, folder / "two", 1, *SUBNET)]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


@pytest.fixture(scope="module")
def alone(call: Any, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The chain by one process, nothing trained."""
    out = Path(tmp_path_factory.mktemp("alone") / "run")
    said = call(*line(taught, out, 0, *SUBNET))
    assert said.code == 0, said.err
    return Run(out)


def test_two_processes_hold_one_artifact_and_rank_0_alone_writes_it(two: tuple[Path, str], alone: Run) -> None:
    folder, said = two
    run = Run(folder / "two")
    assert [step.name for step in run.artifact.history] == ["finetune", "elastic", "subnet"]
    assert [(record.position, record.outcome) for record in run.records()] == [(1, "kept"), (2, "kept")]
    assert files(run.root) == files(alone.root)
    assert said.count("report.html") == 1
    # Trained once by the command line and once more: all that came of it is the same, in either process.
    assert {(folder / f"1-{rank}").read_text() for rank in (0, 1)} == {run.artifact.digest}
    assert cast(Any, run.artifact.history[1].metrics)["steps"] == 4
    assert run.artifact.weights != alone.artifact.weights


def test_two_processes_cut_out_what_one_cuts_out(two: tuple[Path, str], alone: Run) -> None:
    assert {(two[0] / f"0-{rank}").read_text() for rank in (0, 1)} == {alone.artifact.digest}
    assert cast(Any, alone.artifact.history[-1].plan)["search"]["evaluations"] == 6
    assert alone.artifact.costs["macs"] < 0.6 * store.load(alone.root / "steps" / "01-elastic").costs["macs"]


def test_two_processes_leave_one_family(two: tuple[Path, str]) -> None:
    folder, said = two
    listed = json.loads((folder / "family" / "family.json").read_text())
    assert [(row["to"], row["outcome"]) for row in listed["budgets"]] == [("0.8x-macs", "kept"), ("0.6x-macs", "kept")]
    assert listed["search"]["evaluations"] == 4
    url = f"sqlite:///{folder / 'family' / 'search.db'}"
    (study,) = optuna.get_all_study_names(storage=url)
    trials = optuna.load_study(study_name=study, storage=url).trials
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert len({json.dumps(trial.user_attrs["subnet"]) for trial in trials}) == len(trials)
    for row in listed["budgets"]:
        run = Run(Path(row["folder"]))
        assert [(record.position, record.outcome) for record in run.records()] == [(1, "kept")]
        assert [path.name for path in (run.root / "steps").iterdir()] == ["01-subnet"]
    assert said.count("front.svg") == 1


# Killed


def test_elastic_ranks_and_sides_killed_in_training_end_with_the_same_values(
    call: Any, taught: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = line(taught, out, 5)
    killed = subprocess.Popen(
        [sys.executable, "-m", "slim", *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (found := list((out / "steps").glob("*.checkpoint"))):
            assert killed.poll() is None, "the run ended before it wrote a checkpoint"
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert found[0].name.startswith(".01-elastic-")
    assert not (out / "steps" / "01-elastic").exists()
    said = call("run", "--resume", *words[1:])
    assert said.code == 0, said.err
    assert "training goes on from step " in " ".join(said.err.split())
    assert call(*line(taught, tmp_path / "whole", 5)).code == 0

    resumed, whole = (Run(place).artifact for place in (out, tmp_path / "whole"))
    plan: Any = whole.history[-1].plan
    assert all(len(one["choices"]) == 2 for one in plan["ranks"].values())
    assert (len(plan["ranks"]), plan["pixels"]) == (14, [0, 24])
    assert whole.weights != store.load(taught / "final").weights, "nothing was learned"
    assert resumed.weights == whole.weights
    assert resumed.history[-1].metrics == whole.history[-1].metrics
