"""`slim family` that is killed, refused by the guard, or not alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from slim import family as families
from slim import store
from slim.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")

# fmt: off
NETWORK = (
    "--model", "vit_tiny_patch16_224", "--model-arg", "img_size=32", "--model-arg", "patch_size=8",
    "--model-arg", "depth=2", "--model-arg", "embed_dim=32", "--model-arg", "num_heads=2", "--input-size", "32",
    "--weights", "none", "--data", "digits", "--limit-train", "400", "--limit-val", "100", "--threads", "1",
)
CHAIN = (
    "finetune", "--epochs", "20", "--lr", "0.005", "--flip", "0", "--scale-low", "0.8", "--precision", "fp32",
    "elastic", "--epochs", "0", "--held-out", "100", "--criterion", "group-l2",
)
# fmt: on
SINGLES = 1 + 2 * 2 + 2 * 1 + 2
"""Evaluated alone: the largest, two smaller MLPs and one head in each block, and either block left out."""
EVALUATIONS = 5


@pytest.fixture(scope="module")
def elastic(call: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network has 48 subnets; not to be changed."""
    out = Path(tmp_path_factory.mktemp("elastic") / "run")
    said = call("run", *NETWORK, "--out", out, *CHAIN)
    assert said.code == 0, said.err
    return out


FORKED = """
import os, shutil, signal, sys
from slim import cli, commands  # once for all processes
from slim.passes.elastic.examine import Examiner
from slim.passes.elastic.subnet import BestSubnet

def dying(cls, name, left):
    does = getattr(cls, name)
    def method(self, *given):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return does(self, *given)
    setattr(cls, name, method)

def begin(words, doomed=()):
    if pid := os.fork():
        return pid
    if doomed:
        dying(*doomed)
    try:
        cli.main(words)
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(ended.code)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
"""`begin` starts `slim` in a process of its own, and may have it killed when a method is called once too often."""


def forked(code: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKED + code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr


def words(elastic: Path, to: str, out: Path, *more: object) -> list[str]:
    few = ("--evaluations", EVALUATIONS, "--proposals", 200)
    return [str(word) for word in ("family", elastic, "--to", to, *few, "--out", out, *more)]


def trials(url: str) -> list[optuna.trial.FrozenTrial]:
    (study,) = optuna.get_all_study_names(storage=url)
    return optuna.load_study(study_name=study, storage=url).trials


def evaluated(url: str) -> list[str]:
    """Subnets whose evaluation was finished, once for each time."""
    return [json.dumps(one.user_attrs["subnet"]) for one in trials(url) if one.state.name == "COMPLETE"]


def state(url: str, name: str) -> int:
    return sum(one.state.name == name for one in trials(url))


# Killed


def test_a_family_killed_in_its_search_and_while_it_cuts_goes_on(call: Any, elastic: Path, tmp_path: Path) -> None:
    to, out = "0.8x-macs,0.6x-macs", tmp_path / "out"
    line, place, first = words(elastic, to, out), out / "search.db", tmp_path / "first.db"
    forked(f"""
assert ended(begin({line}, (Examiner, "accuracy", {SINGLES + 3}))) == -signal.SIGKILL
shutil.copy({str(place)!r}, {str(first)!r})
assert ended(begin({[*line, "--resume"]}, (BestSubnet, "fit", 1))) == -signal.SIGKILL
""")
    assert (len(evaluated(f"sqlite:///{first}")), state(f"sqlite:///{first}", "RUNNING")) == (SINGLES + 3, 1)
    url = f"sqlite:///{place}"
    assert (len(evaluated(url)), state(url, "FAIL")) == (SINGLES + EVALUATIONS, 1)
    assert [(out / one / "report.json").exists() for one in to.split(",")] == [True, False]
    before = (out / "0.8x-macs" / "report.json").stat().st_mtime_ns
    said = call(*words(elastic, to, out, "--resume"))
    assert said.code == 0, said.err
    assert (out / "0.8x-macs" / "report.json").stat().st_mtime_ns == before
    # What was finished is not evaluated again, and what was under way is evaluated once.
    assert len({*evaluated(url)}) == len(evaluated(url)) == SINGLES + EVALUATIONS
    assert (state(url, "FAIL"), state(url, "RUNNING")) == (1, 0)

    listed = json.loads((out / "family.json").read_text())
    assert [(row["to"], row["outcome"]) for row in listed["budgets"]] == [(one, "kept") for one in to.split(",")]
    assert [row["subnet"] for row in listed["budgets"]] == [
        Run(out / one).report.steps[0].plan["subnet"] for one in to.split(",")
    ]
    assert listed["search"]["evaluations"] == EVALUATIONS


# Refused


def test_a_budget_that_the_guard_refuses_is_said_and_the_others_are_kept(
    call: Any, elastic: Path, tmp_path: Path
) -> None:
    # Half of each MLP costs a few points; without a block, and trained without leaving any out, most are lost.
    out, guard = tmp_path / "out", ("--target", "ort:cpu", "--min-gain", "0", "--max-drop", "12")
    said = call(*words(elastic, "0.8x-macs,0.4x-macs", out, *guard))
    assert said.code == 3, said.err
    kept, refused = json.loads((out / "family.json").read_text())["budgets"]
    assert refused["outcome"] == "rolled back"
    record = Run(out / "0.4x-macs").report.steps[0]
    assert (record.outcome, record.reason) == ("rolled back", refused["reason"])
    assert f"rolled back: {refused['reason']}" in " ".join(said.out.split())
    # Its figures are those of what was refused, and what lies in its folder is the whole network.
    assert refused["cost"] == record.figures["macs"].value < 0.4 * store.load(elastic / "final").costs["macs"]
    assert refused["points"] == -record.figures["top1_drop_points"].value
    assert Run(out / "0.4x-macs").artifact.weights == store.load(elastic / "final").weights
    if "latency inconclusive" in refused["reason"] + kept["reason"]:
        pytest.skip(f"this machine is too noisy to time anything: {refused['reason']} {kept['reason']}")
    assert refused["reason"].startswith("lost ")
    assert refused["points"] < -12 <= kept["points"]
    assert (kept["outcome"], kept["reason"]) == ("kept", "")
    assert "dense" in store.traits(Run(out / "0.8x-macs").artifact)


# Not alone


def test_two_families_at_once_with_one_storage_evaluate_nothing_twice(elastic: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    lines = [words(elastic, to, tmp_path / to, "--storage", url) for to in ("0.8x-macs", "0.75x-macs")]
    forked(f"assert [ended(pid) for pid in [begin(line) for line in {lines}]] == [0, 0]")
    found = evaluated(url)
    assert len({*found}) == len(found) == SINGLES + 2 * EVALUATIONS
    assert state(url, "RUNNING") == 0
    for to in ("0.8x-macs", "0.75x-macs"):
        (row,) = json.loads((tmp_path / to / "family.json").read_text())["budgets"]
        assert row["outcome"] == "kept"


def test_a_subnet_that_another_process_found_since_the_search_is_cut_out(
    call: Any, elastic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, does, found = tmp_path / "out", families._row, list[str]()

    def later(*given: Any) -> families.Row:
        url = f"sqlite:///{out / 'search.db'}"
        # All are within 0.72 of the operations, and no more than five were evaluated.
        units = [[1, one, 1, other] for one in (64, 96, 128) for other in (64, 96, 128) if one + other <= 192]
        some = [{"units": one, "on": [True, True], "ranks": [], "pixels": 0} for one in units]
        found.append(next(json.dumps(one) for one in some if json.dumps(one) not in evaluated(url)))
        (study,) = optuna.get_all_study_names(storage=url)
        said = {"subnet": json.loads(found[0]), "aims": ["0.8x-macs"]}
        optuna.load_study(study_name=study, storage=url).add_trial(
            optuna.trial.create_trial(value=100.0, user_attrs=said)
        )
        return does(*given)

    monkeypatch.setattr(families, "_row", later)
    said = call(*words(elastic, "0.8x-macs", out))
    assert said.code == 0, said.err
    (row,) = json.loads((out / "family.json").read_text())["budgets"]
    assert json.dumps(row["subnet"]) == found[0]
    assert (out / "front.svg").is_file()
