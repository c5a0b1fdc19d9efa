"""`slim table build` and `slim family`: one elastic network, a table of latencies, a network for each budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import optuna
import pytest

import slim
from slim import store
from slim.runs import Run

# fmt: off
NETWORK = (
    "--model", "convnext_atto", "--model-arg", "depths=[1,1,2,1]", "--model-arg", "dims=[8,8,16,16]",
    "--model-arg", "patch_size=2", "--input-size", "32", "--weights", "none", "--data", "digits",
    "--limit-train", "160", "--limit-val", "40", "--calib", "16", "--threads", "1",
)
CHAIN = ("finetune", "--epochs", "1", "elastic", "--epochs", "0", "--held-out", "40", "--criterion", "group-l2")
# fmt: on
FEW = ("--evaluations", "4", "--proposals", "200")
BUDGETS = ("--to", "0.9x-macs,0.75x-macs,0.001x-macs", *FEW, "--polish", "1")


@pytest.fixture(scope="module")
def elastic(call: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network is elastic in five widths and two blocks; not to be changed."""
    out = Path(tmp_path_factory.mktemp("elastic") / "run")
    said = call("run", *NETWORK, "--out", out, *CHAIN)
    assert said.code == 0, said.err
    return out


@pytest.fixture(scope="module")
def of_four(call: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network has one elastic width of four choices: four subnets are soon measured."""
    out = Path(tmp_path_factory.mktemp("four") / "run")
    few = (
        "--depth",
        "1",
        "--skip",
        "stages.[0-2].*",
        *(word for w in (1.0, 0.75, 0.5, 0.25) for word in ("--widths", w)),
    )
    said = call("run", *NETWORK, "--out", out, *CHAIN, *few)
    assert said.code == 0, said.err
    assert [*dict(cast(Any, store.load(out / "final").history[-1].plan["dims"]))] == ["stages.3.blocks.0.mlp.fc1"]
    return out


@pytest.fixture(scope="module")
def table(call: Any, of_four: Path) -> tuple[Path, str]:
    """The table of `of_four`, and what was said when it was made; not to be changed."""
    said = call("table", "build", of_four)
    assert said.code == 0, said.err
    return of_four / "table.json", said.out


@pytest.fixture(scope="module")
def family(call: Any, elastic: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What is cut out for three budgets, one of which cannot be reached; to be left as it is found."""
    out = Path(tmp_path_factory.mktemp("family") / "out")
    return out, call("family", elastic, *BUDGETS, "--out", out)


def begun(url: str) -> list[optuna.trial.FrozenTrial]:
    """Evaluations in a storage that were not given up."""
    (study,) = optuna.get_all_study_names(storage=url)
    return [one for one in optuna.load_study(study_name=study, storage=url).trials if one.state.name != "FAIL"]


# The table


def test_a_table_is_measured_and_its_errors_are_told(table: tuple[Path, str]) -> None:
    path, said = table
    held = json.loads(path.read_text())
    assert len(held["rows"]) == 4
    assert sum(row["held_out"] for row in held["rows"]) == 1
    assert {tuple(row["units"]) for row in held["rows"]} == {(64,), (48,), (32,), (16,)}
    measured, error, place = said.splitlines()
    assert measured.startswith("measured  4 subnets on ort:cpu,threads=1,batch=1,precision=fp32, ")
    assert "% off on 1 networks held out (at most" in error
    assert "tau none" in error  # of one network there is no order
    assert place == f"table     {path}"


def test_a_table_that_was_interrupted_is_gone_on_with(call: Any, of_four: Path, table: tuple[Path, str]) -> None:
    whole = json.loads(table[0].read_text())
    begun = {key: value for key, value in whole.items() if key in ("format", "device", "target", "network")}
    part = of_four.parent / "part.json"
    part.write_text(json.dumps({**begun, "rows": whole["rows"][:3]}))
    said = call("table", "build", of_four, "--out", part, "--json", "--quiet")
    assert said.code == 0, said.err
    now = json.loads(said.out)
    assert (now["table"], now["kept"]) == (str(part), False)
    assert now["rows"][:3] == whole["rows"][:3]
    assert (now["rows"][3]["units"], now["rows"][3] != whole["rows"][3]) == (whole["rows"][3]["units"], True)
    assert now.items() > json.loads(part.read_text()).items()


def test_a_finished_table_is_kept_and_said_to_be_finished(call: Any, of_four: Path, table: tuple[Path, str]) -> None:
    before = table[0].read_bytes()
    said = call("table", "build", of_four)
    assert said.out.splitlines()[-1] == f"table     {table[0]}, finished before and kept; --again measures again"
    assert json.loads(call("table", "build", of_four, "--json").out)["kept"] is True
    assert table[0].read_bytes() == before


def test_again_measures_every_row_again_whatever_the_table_was_of(
    call: Any, of_four: Path, table: tuple[Path, str], tmp_path: Path
) -> None:
    whole, place = json.loads(table[0].read_text()), tmp_path / "table.json"
    slow = [{**row, "ms": 1e6, "low": 1e6, "high": 1e6} for row in whole["rows"]]
    place.write_text(json.dumps({**whole, "device": "0123456789ab", "rows": slow}))
    said = call("table", "build", of_four, "--out", place, "--again", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["kept"] is False
    now = json.loads(place.read_text())
    assert now["device"] == whole["device"]
    assert [row["units"] for row in now["rows"]] == [row["units"] for row in whole["rows"]]
    assert all(0 < row["low"] <= row["ms"] <= row["high"] < 1e6 for row in now["rows"])
    # What is predicted follows what was measured: no term is of the rows before.
    assert max(now["terms"].values()) < 1e6


def test_the_table_of_another_target_or_device_is_refused(
    call: Any, of_four: Path, table: tuple[Path, str], tmp_path: Path
) -> None:
    said = call("table", "build", of_four, "--target", "ort:cpu,threads=2")
    assert (said.code, said.error) == (
        1,
        "latency table: it was measured for target 'ort:cpu,threads=1,batch=1,precision=fp32', not "
        "'ort:cpu,threads=2,batch=1,precision=fp32'; measure again",
    )
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(table[0].read_text()), "device": "0123456789ab"}))
    said = call("table", "build", of_four, "--out", other)
    assert said.error.startswith("latency table: it was measured for device '0123456789ab', not ")


def test_a_family_is_of_an_elastic_network(call: Any, elastic: Path, family: tuple[Path, Any], tmp_path: Path) -> None:
    plain, done = elastic / "steps" / "01-finetune", family[0] / "0.9x-macs"
    for folder, code, message in (
        (plain, 2, f"{plain}: its network is not elastic; `slim run --model {plain} ... elastic` makes it so"),
        (
            done,
            2,
            f"{done}: its network is elastic no more, for 'subnet' cut one out; give the step of its run that "
            "'elastic' left, in steps/",
        ),
        (tmp_path / "no", 2, f"{tmp_path / 'no'}: no such folder; give a run or an artifact"),
        (tmp_path, 1, f"{tmp_path}: holds no artifact and no run; give one that `slim run` wrote"),
    ):
        said = call("family", folder, *BUDGETS, "--out", tmp_path / "out")
        assert (said.code, said.error) == (code, message)


def test_a_table_is_of_a_network_and_goes_where_there_is_a_folder(call: Any, elastic: Path, tmp_path: Path) -> None:
    for folder, code, message in (
        (tmp_path / "no", 2, f"{tmp_path / 'no'}: no such folder; give a run or an artifact"),
        (tmp_path, 1, f"{tmp_path}: holds no artifact and no run; give one that `slim run` wrote"),
    ):
        said = call("table", "build", folder)
        assert (said.code, said.error) == (code, message)
    place = tmp_path / "no" / "table.json"
    said = call("table", "build", elastic, "--out", place)
    assert (said.code, said.error) == (2, f"--out {place}: there is no folder {place.parent}; make it")


# The family


def test_each_budget_has_a_run_of_its_own(family: tuple[Path, Any], elastic: Path) -> None:
    out, said = family
    whole = store.load(elastic / "final")
    for share in (0.9, 0.75):
        run = Run(out / f"{share}x-macs")
        assert [step.outcome for step in run.report.steps] == ["kept", "kept"]
        assert [step.name for step in run.artifact.history] == ["finetune", "elastic", "subnet", "distill"]
        # What polishes it is the network it was cut out of.
        assert run.artifact.history[-1].digests["reference"] == whole.digest
        assert run.artifact.costs["macs"] <= share * whole.costs["macs"]
        assert (run.bundle / "model.onnx").is_file()
        assert "dense" in store.traits(run.artifact)
    assert said.code == 3
    assert not (out / "0.001x-macs" / "final").exists()


def test_the_table_at_the_end_says_what_became_of_each(family: tuple[Path, Any]) -> None:
    out, said = family
    heading, *lines = said.out.splitlines()
    assert heading.split() == ["budget", "measured", "ratio", "top-1", "points", "verdict", "and", "why"]
    assert [line.split()[0] for line in lines[:3]] == ["0.9x-macs", "0.75x-macs", "0.001x-macs"]
    assert lines[-2:] == [f"runs      {out}/0.9x-macs, {out}/0.75x-macs", f"picture   {out}/front.svg"]
    assert "not cut: --to 0.001x-macs cannot be reached" in " ".join(" ".join(lines).split())
    listed = json.loads((out / "family.json").read_text())
    assert [row["outcome"] for row in listed["budgets"]] == ["kept", "kept", "not cut"]
    for row, share in zip(listed["budgets"], (0.9, 0.75), strict=False):
        report = Run(Path(row["folder"])).report
        assert row["cost"] == report.final["macs"].value
        assert row["ratio"] == row["cost"] / report.dense["macs"].value <= share
        there = [point for point in listed["search"]["points"] if point.items() >= row["subnet"].items()]
        assert [point["cost"] for point in there] == [row["cost"]]
    assert listed["unit"] == "macs"


def test_all_that_was_evaluated_is_in_the_picture(family: tuple[Path, Any]) -> None:
    out, _ = family
    listed = json.loads((out / "family.json").read_text())
    drawn = ElementTree.parse(out / "front.svg").getroot()
    marks = [one.get("class") for one in drawn.iter() if one.tag.endswith("circle")]
    worst = min(point["top1"] for point in listed["search"]["front"])
    assert marks.count("tried") == sum(point["top1"] >= worst for point in listed["search"]["points"])
    assert marks.count("chosen") == 2
    assert {"0.9x-macs", "0.75x-macs"} <= {one.text for one in drawn.iter() if one.tag.endswith("text")}


def test_one_search_serves_all_budgets_and_nothing_is_evaluated_twice(family: tuple[Path, Any]) -> None:
    out, _ = family
    found = begun(f"sqlite:///{out / 'search.db'}")
    aims = ["0.9x-macs", "0.75x-macs", "0.001x-macs"]
    # Alone: the largest, five widths with two choices less, and two blocks.
    assert [one.user_attrs["aims"] for one in found] == [[]] * 13 + [aims] * 4
    assert len({json.dumps(one.user_attrs["subnet"]) for one in found}) == len(found)
    for share in (0.9, 0.75):
        assert Run(out / f"{share}x-macs").report.steps[0].plan["search"]["evaluations"] == 4


def test_another_budget_knows_what_was_evaluated_for_these(
    call: Any, elastic: Path, family: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copy(family[0] / "search.db", tmp_path / "search.db")
    url = f"sqlite:///{tmp_path / 'search.db'}"
    before = begun(url)
    said = call("family", elastic, "--to", "0.8x-macs", *FEW, "--storage", url, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    after = begun(url)
    assert [one.number for one in after[: len(before)]] == [one.number for one in before]
    assert [one.user_attrs["aims"] for one in after[len(before) :]] == [["0.8x-macs"]] * 4
    assert len({json.dumps(one.user_attrs["subnet"]) for one in after}) == len(after)


def test_a_family_goes_on_where_it_was(call: Any, elastic: Path, family: tuple[Path, Any]) -> None:
    out, _ = family
    done, again, url = out / "0.9x-macs", out / "0.75x-macs", f"sqlite:///{out / 'search.db'}"
    before, evaluated = (done / "report.json").stat().st_mtime_ns, len(begun(url))
    first = json.loads((out / "family.json").read_text())
    shutil.rmtree(again)
    (out / "family.json").write_text('{"format": "slim-family/1", "budgets": []}')  # as it is until the end
    said = call("family", elastic, *BUDGETS, "--out", out)
    assert (said.code, said.error) == (
        2,
        f"--out {out}: holds a family already; add --resume to go on, or choose another place",
    )
    said = call("family", elastic, *BUDGETS, "--out", out, "--resume", "--json")
    assert said.code == 3
    now = json.loads(said.out)
    assert [row["subnet"] for row in now["budgets"]] == [row["subnet"] for row in first["budgets"]]
    assert (done / "report.json").stat().st_mtime_ns == before
    assert (again / "bundle" / "model.onnx").is_file()
    assert len(begun(url)) == evaluated


def test_milliseconds_come_from_the_table_and_a_budget_may_be_met_already(
    call: Any, of_four: Path, table: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # No machine is so slow, and none so fast.
    words = ("--target", "ort:cpu", "--to", "1000ms,0.0001ms", *FEW, "--table", table[0])
    said = call("family", of_four, *words, "--out", out)
    assert said.code == 3
    met, missed = json.loads((out / "family.json").read_text())["budgets"]
    assert (met["outcome"], met["ratio"], met["points"]) == ("whole", 1.0, 0.0)
    assert met["cost"] == met["figures"]["latency_p50_ms"]["value"]
    assert Run(out / "1000ms").artifact.weights == store.load(of_four / "final").weights
    assert (out / "1000ms" / "bundle" / "model.onnx").is_file()
    assert (missed["outcome"], missed["folder"]) == ("not cut", None)
    assert missed["reason"].startswith("--to 0.0001ms cannot be reached: the smallest subnets give ")
    assert "whole: the whole network is within it" in said.out
    assert not (out / "table.json").exists()
    assert slim.load(out / "1000ms" / "final").backbone.name == "convnext_atto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "4sec"), "--to 4sec: '4sec' is no goal; give the share kept, as in 0.6x-latency"),
        (
            ("--to", "0.5x-macs,1k-params"),
            "--to 0.5x-macs,1k-params: budgets of macs, params in one picture; give those of one kind at a time",
        ),
        (("--to", "4ms"), "--to 4ms is measured on the exported file; add --target, as ort:cpu"),
        (("--to", "0.5x-macs", "--evaluations", "0"), "subnet: evaluations: 0 should be greater than or equal to 1"),
        (
            ("--to", "0.5x-macs", "--repair", "all"),
            "subnet: repair: 'all' should be 'both', 'norms', 'outputs' or 'none'",
        ),
        (("--to", "0.5x-macs", "--data", "nothing"), "data 'nothing': unknown source"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    words: tuple[str, ...], message: str, call: Any, elastic: Path, tmp_path: Path
) -> None:
    said = call("family", elastic, *words, "--out", tmp_path / "out")
    assert said.code == 2
    assert said.error.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(call: Any, elastic: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    said = call("family", elastic, "--to", "0.9x-macs", "--out", tmp_path)
    assert (said.code, said.error) == (2, f"--out {tmp_path}: exists and is not a family; choose another place")


def test_an_artifact_without_its_run_needs_data(call: Any, elastic: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(elastic / "final", tmp_path / "alone")
    said = call("family", alone, "--to", "0.9x-macs", "--out", tmp_path / "out")
    assert said.code == 2
    assert said.error.startswith("step 1 'subnet' reads the split 'train', which the data lacks; give --data with it")
