"""The gate on a real run: exit codes, the forms of its verdicts, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import slim
from slim import environment
from slim.errors import StoreError, UsageError

HERE = environment.fingerprint()
Written = Callable[..., Path]


@pytest.fixture
def budgets(tmp_path: Path) -> Written:
    """A budgets file of these lines, such as `metric: params, max: 1`."""

    def write(*limits: str, target: str = "ort:cpu") -> Path:
        path = tmp_path / "budgets.yaml"
        lines = "".join(f"  - {{{limit}}}\n" for limit in limits)
        path.write_text(f"format: slim-budgets/1\ntarget: {target}\nbudgets:\n{lines}")
        return path

    return write


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Path:
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_what_ships_is_measured_again_and_nothing_is_written(call: Any, finished: Any, budgets: Written) -> None:
    root, _ = finished
    before, stored = tree(root), report_of(root)["final"]
    path = budgets(
        "metric: latency_ratio, max: 100",
        f"metric: latency_p50_ms, max: 1000, device: {HERE}",
        "metric: size_bytes, max: 1e9",
        "metric: params, max: 1e9",
        "metric: macs, max: 1e12",
        "metric: top1_drop_points, max: 100",
        "metric: top1_agreement, min: 0",
    )
    said = call("gate", root, "--budgets", path, "--json", "--quiet")
    assert (said.code, said.err) == (0, "")
    verdicts = {one["budget"]["metric"]: one for one in json.loads(said.out)["verdicts"]}
    assert {one["outcome"] for one in verdicts.values()} == {"pass"}
    for counted in ("size_bytes", "params", "macs", "top1_drop_points", "top1_agreement"):
        assert verdicts[counted]["value"] == stored[counted]["value"]
    for timed in ("latency_ratio", "latency_p50_ms"):
        assert verdicts[timed]["value"] != stored[timed]["value"]
        assert verdicts[timed]["low"] < verdicts[timed]["value"] < verdicts[timed]["high"]
    assert tree(root) == before


def test_a_miss_is_3_and_says_by_how_much(call: Any, finished: Any, budgets: Written, tmp_path: Path) -> None:
    root, _ = finished
    path = budgets("metric: params, max: 1000", "metric: macs, max: 1e12")
    written = {form: tmp_path / form for form in ("junit", "markdown")}
    forms = [word for form, place in written.items() for word in (f"--{form}", place)]
    said = call("gate", root, "--budgets", path, "--stored", *forms)
    value = report_of(root)["final"]["params"]["value"]
    miss = f"params is {value:.4g} params, max 1000: missed by {value - 1000:.0f} params ({value / 1000 - 1:.1%})"
    assert said.code == 3
    assert said.out.splitlines()[-1] == f"fail: {miss}"
    suite = ElementTree.parse(written["junit"]).getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("2", "1")
    assert [node.attrib["message"] for node in suite.iter("failure")] == [miss]
    assert written["markdown"].read_text().splitlines()[-1] == f"- **fail**: {miss}"
    found = json.loads(call("gate", root, "--budgets", path, "--stored", "--json").out)
    assert (found["exit_code"], found["format"]) == (3, "slim-gate/1")


def test_an_undecided_ratio_is_4_unless_that_is_allowed(call: Any, copied: Path, budgets: Written) -> None:
    report = report_of(copied)
    report["final"]["latency_ratio"] |= {"value": 0.9, "low": 0.85, "high": 0.95}
    report["final"]["latency_ratio"]["details"]["control"]["fit"] = True
    (copied / "report.json").write_text(json.dumps(report))
    path = budgets("metric: latency_ratio, max: 0.92", "metric: params, max: 1e9")
    said = call("gate", copied, "--budgets", path, "--stored")
    assert said.code == 4
    assert said.out.splitlines()[-1].startswith("inconclusive: latency_ratio is 0.9 ratio")
    assert call("gate", copied, "--budgets", path, "--stored", "--allow-inconclusive").code == 0
    found = json.loads(call("gate", copied, "--budgets", path, "--stored", "--allow-inconclusive", "--json").out)
    assert found["exit_code"] == 0


def test_points_are_judged_by_the_figure_not_by_how_other_images_might_fare(
    call: Any, copied: Path, budgets: Written
) -> None:
    report = report_of(copied)
    report["final"]["top1_drop_points"] |= {"value": 1.0, "low": -1.0, "high": 3.0}
    (copied / "report.json").write_text(json.dumps(report))
    for limit, code in ((1.0, 0), (0.99, 3)):
        path = budgets(f"metric: top1_drop_points, max: {limit}")
        assert call("gate", copied, "--budgets", path, "--stored").code == code


@pytest.mark.parametrize("stored", [(), ("--stored",)], ids=["measured", "stored"])
def test_milliseconds_of_another_device_are_5(call: Any, finished: Any, budgets: Written, stored: Any) -> None:
    path = budgets("metric: latency_p50_ms, max: 1000, device: 0123456789ab")
    said = call("gate", finished[0], "--budgets", path, *stored)
    assert said.code == 5
    assert f"is for device 0123456789ab, this is {HERE}; run the gate there" in said.out


def test_stored_timings_of_another_target_or_machine_are_refused(call: Any, copied: Path, budgets: Written) -> None:
    path = budgets("metric: latency_ratio, max: 100", target="ort:cpu,threads=2")
    said = call("gate", copied, "--budgets", path, "--stored")
    assert said.code == 2
    assert (
        "was measured on ort:cpu,threads=1,batch=1,precision=fp32, the budgets are for ort:cpu,threads=2" in said.error
    )
    report = report_of(copied)
    report["environment"]["fingerprint"] = "0123456789ab"
    (copied / "report.json").write_text(json.dumps(report))
    said = call("gate", copied, "--budgets", budgets("metric: latency_ratio, max: 100"), "--stored")
    assert said.code == 2
    assert said.error.endswith("were taken on another device; leave out --stored")
    assert call("gate", copied, "--budgets", budgets("metric: params, max: 1e9"), "--stored").code == 0


@pytest.mark.parametrize("stored", [False, True], ids=["measured", "stored"])
def test_a_file_changed_after_it_was_measured_is_refused(copied: Path, budgets: Written, stored: bool) -> None:
    path = budgets("metric: size_bytes, max: 1e9")
    with (copied / "bundle" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(StoreError, match=r"model\.onnx: sha256 \w{12} is not \w{12} of manifest\.json; the file was"):
        slim.gate(copied, path, stored=stored)
    (copied / "bundle" / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match=r"manifest\.json: names no sha256 of model\.onnx; write the bundle again"):
        slim.gate(copied, path, stored=stored)
    (copied / "bundle" / "model.onnx").unlink()
    with pytest.raises(UsageError, match=r"model\.onnx: is missing; end the chain of `slim run` with export"):
        slim.gate(copied, path, stored=stored)


def test_a_gate_without_the_reference_says_what_is_missing(copied: Path, budgets: Written) -> None:
    (copied / "dense.onnx").unlink()
    with pytest.raises(UsageError, match=r"dense\.onnx: is missing; finish the run"):
        slim.gate(copied, budgets("metric: latency_ratio, max: 1"))


def test_what_no_run_can_give_is_named(call: Any, finished: Any, budgets: Written) -> None:
    said = call("gate", finished[0], "--budgets", budgets("metric: fusion_coverage, min: 90"), "--stored")
    assert said.code == 2
    assert said.error.startswith("budgets: fusion_coverage was not measured; it comes from the graph of an int8 file")


def test_a_job_summary_gets_the_table(
    call: Any, finished: Any, budgets: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    summary.write_text("before\n")
    call("gate", finished[0], "--budgets", budgets("metric: params, max: 1e9"), "--stored")
    lines = summary.read_text().splitlines()
    assert lines[:2] == ["before", "| budget | measured | margin | verdict |"]


@pytest.mark.parametrize("wrong", ["run", "budgets"])
def test_a_run_or_file_that_is_not_there_is_2(call: Any, finished: Any, budgets: Written, wrong: str) -> None:
    path = budgets("metric: params, max: 1")
    line = ("none", "--budgets", path) if wrong == "run" else (finished[0], "--budgets", "none.yaml")
    said = call("gate", *line)
    assert said.code == 2
    assert said.error.startswith("none: holds no run" if wrong == "run" else "none.yaml: no such file")
