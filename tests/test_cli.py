"""Every command, on one small run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slim
from slim import cli
from slim.measurement import Measurement
from slim.passes import PASSES


def test_help_loads_neither_torch_nor_timm() -> None:
    code = (
        "import sys\nfrom slim.cli import cli\nimport click\n"
        "for words in ([], ['run']):\n    cli.main([*words, '--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'timm', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_help_of_every_command_is_whole(call: Any) -> None:
    whole = call("--help").out
    for name, command in cli.cli.commands.items():
        said = call(name, "--help")
        assert said.code == 0
        assert re.search(rf"^  {name} +\w", whole, re.MULTILINE)
        for option in command.params:
            if isinstance(option, cli.click.Option):
                assert option.help, f"{name} {option.name}"
    assert not [line for line in whole.splitlines()[1:] if line.endswith("...")]
    assert "130  interrupted" in whole


def test_help_of_run_shows_the_passes_and_an_example_on_lines_of_its_own(call: Any) -> None:
    lines = call("run", "--help").out.splitlines()
    for name, (_, _, text) in PASSES.items():
        assert f"  {name:<8}  {text}" in lines
    assert any(line.endswith("runs/r50 \\") for line in lines)


@pytest.mark.parametrize("name", PASSES)
def test_help_of_a_pass_has_every_field(call: Any, name: str) -> None:
    said = call("run", name, "--help")
    assert said.code == 0
    for field in slim.passes.resolve(name).model_fields:  # type: ignore[attr-defined]
        assert f"--{field.replace('_', '-')}" in said.out


def test_the_version_is_told(call: Any) -> None:
    assert call("--version").out.split()[-1] == slim.__version__


# The run


def test_a_run_says_its_result_on_stdout_and_how_it_goes_on_stderr(finished: Any) -> None:
    root, said = finished
    assert said.out.splitlines()[0].count(" ms") == 2  # the headline: ms instead of ms
    assert f"report    {root}/report.html" in said.out.splitlines()
    assert f"bundle    {root}/bundle" in said.out.splitlines()
    assert not [line for line in said.out.splitlines() if len(line) > 120 and str(root) not in line]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in said.err.splitlines()), said.err
    assert "1 finetune: kept" in said.err
    assert "training 1 epochs: 3 of 3" in said.err


def test_a_run_leaves_what_the_design_names(finished: Any) -> None:
    root, _ = finished
    left = {path.name for path in root.iterdir()}
    assert left == {
        "recipe.yaml",
        "dense.onnx",
        "steps",
        "final",
        "bundle",
        "steps.jsonl",
        "report.json",
        "report.html",
    }
    assert {path.name for path in (root / "steps").iterdir()} == {"01-finetune", "02-low-rank"}


def test_a_real_process_is_quiet_on_stderr_and_pure_json_on_stdout(
    finished: Any, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """Libraries that warn or print would show here."""
    line = [*tiny, "--out", str(tmp_path / "r"), "--json", "--quiet", "finetune", "--epochs", "1"]
    line += ["low-rank", "--ratio", "0.2", "export"]
    done = subprocess.run([sys.executable, "-m", "slim", "run", *line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert [step["outcome"] for step in report["steps"]] == ["kept", "kept"]
    assert report["notices"] == ["latency was not measured: the run had no --target"]


def test_dry_run_prints_the_plan_and_does_nothing(call: Any, tiny: tuple[str, ...], tmp_path: Path) -> None:
    line = (*tiny, "--target", "ort:cpu", "--out", tmp_path / "r", "--dry-run")
    chain = ("finetune", "low-rank", "--energy", "0.8", "export")
    said = call("run", *line, *chain)
    assert said.code == 0
    assert said.out.splitlines() == [
        "model     vit_tiny_patch16_224, 10 classes (new head), input 3x32x32",
        "data      digits: 200 train, 100 val, 32 calib",
        "target    ort:cpu,threads=1,batch=1,precision=fp32",
        "guard     max drop 1 points, min gain 2 %",
        "stage 1   1 finetune (repair): defaults",
        "stage 2   2 low-rank (structure): energy=0.8",
        "export    onnx",
        "Order and inputs can work; nothing was done.",
    ]
    found = json.loads(call("run", "--json", *line, *chain).out)
    assert found["splits"] == {"train": 200, "val": 100, "calib": 32}
    assert found["recipe"]["passes"][1]["energy"] == 0.8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [("1,0.5",), ("1", "0.5"), ("1.0, 0.5",)])
def test_several_numbers_come_with_commas_or_one_by_one(
    given: tuple[str, ...], call: Any, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    widths = [word for one in given for word in ("--widths", one)]
    line = (*tiny, "--target", "ort:cpu", "--out", tmp_path / "r", "--dry-run", "--json")
    said = call("run", *line, "finetune", "elastic", *widths, "--held-out", "20")
    assert said.code == 0, said.error
    (_, step) = json.loads(said.out)["recipe"]["passes"]
    assert step["widths"] == [1.0, 0.5]


def test_all_rolled_back_is_said_first_and_is_a_failure_only_on_demand(
    call: Any, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "r"
    line = (*tiny, "--target", "ort:cpu", "--out", out, "--min-gain", "99")
    chain = ("finetune", "--epochs", "1", "low-rank", "--ratio", "0.2", "export")
    said = call("run", "--quiet", *line, *chain)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("Every compression stage was rolled back: what ships is as large as it was")
    assert "notice: every structural stage was rolled back" in said.out
    again = call("run", "--json", "--quiet", "--resume", "--require-gain", *line, *chain)
    assert again.code == 1
    assert again.error == "--require-gain: no structural stage was kept; the reasons are above"
    report = json.loads(again.out)
    assert [step["outcome"] for step in report["steps"]] == ["kept", "rolled back"]
    # The file that ships is the dense one, so these are known without measuring, and the gate can judge them.
    ratio, drop = report["final"]["latency_ratio"], report["final"]["top1_drop_points"]
    assert (ratio["value"], drop["value"], ratio["low"]) == (1.0, 0.0, None)
    budgets = tmp_path / "budgets.yaml"
    limits = "[{metric: latency_ratio, max: 1}, {metric: top1_drop_points, max: 0}, {metric: top1_agreement, min: 100}]"
    budgets.write_text(f"format: slim-budgets/1\ntarget: ort:cpu\nbudgets: {limits}\n")
    assert call("gate", out, "--budgets", budgets, "--stored").code == 0


def test_require_gain_without_a_pass_that_could_gain_is_refused(
    call: Any, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    said = call("run", *tiny, "--out", tmp_path / "r", "--require-gain", "finetune")
    assert said.code == 2
    assert said.error.startswith("--require-gain: the chain has no pass that could gain")


# Looking at a run


def test_show_tells_the_lineage_and_the_figures(call: Any, finished: Any) -> None:
    root, _ = finished
    said = call("show", root)
    assert (said.code, said.err) == (0, "")
    assert "model     vit_tiny_patch16_224(img_size=32, patch_size=8, " in said.out
    assert re.search(r"^1 finetune \(guard off\) +1 +epochs=1 +0 +[0-9a-f]{12} +[0-9a-f]{12}$", said.out, re.MULTILINE)
    assert re.search(r"^2 low-rank \(guard off\) +2 +ratio=0.2 ", said.out, re.MULTILINE)
    assert "notice: the guard was off" in said.out
    found = json.loads(call("show", "--json", root).out)
    assert [step["name"] for step in found["history"]] == ["finetune", "low-rank"]
    assert found["digest"] == slim.load(root / "final").digest
    only = json.loads(call("show", "--json", root / "steps" / "01-finetune").out)
    assert [step["name"] for step in only["history"]] == ["finetune"]


@pytest.mark.parametrize("place", ["", "bundle", "bundle/model.onnx", "dense.onnx"])
def test_eval_repeats_the_figure_of_the_report(call: Any, finished: Any, place: str) -> None:
    root, _ = finished
    said = call("eval", "--json", "--quiet", root / place)
    assert (said.code, said.err) == (0, "")
    (found,) = json.loads(said.out)
    report = json.loads((root / "report.json").read_text())
    wanted = report["dense" if "dense" in place else "final"]["accuracy_top1"]
    assert found["measurement"]["samples"] == wanted["samples"]
    assert found["file"] == str(root / place)


def test_eval_of_a_file_that_stands_alone_needs_to_be_told_how_it_is_fed(
    call: Any, finished: Any, tmp_path: Path
) -> None:
    root, _ = finished
    plain = tmp_path / "plain.onnx"
    plain.write_bytes((root / "dense.onnx").read_bytes())
    assert "--data is missing, and the file belongs to no run" in call("eval", plain).error
    said = call("eval", plain, "--data", "digits", "--mean", "0.5,0.5,0.5")
    assert said.code == 2
    assert said.error.endswith("nothing beside it says how images become its input; give --std --crop --interpolation")
    fed = ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--crop", "0.9", "--interpolation", "bicubic")
    (found,) = json.loads(call("eval", "--json", plain, "--data", "digits", *fed).out)
    (same,) = json.loads(call("eval", "--json", root / "dense.onnx", "--data", "digits").out)
    assert found["measurement"]["n"] == 500
    assert found["measurement"]["samples"] == same["measurement"]["samples"]


def test_a_bundle_alone_says_how_it_is_fed(call: Any, finished: Any, tmp_path: Path) -> None:
    root, _ = finished
    bundle = tmp_path / "bundle"
    said = call("export", root / "final", "--out", bundle, "--json", "--quiet")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)["bundle"] == str(bundle)
    assert (bundle / "model.onnx").read_bytes() == (root / "bundle" / "model.onnx").read_bytes()
    alone, ours = (
        json.loads(call("eval", "--json", place, "--data", "digits").out) for place in (bundle, root / "bundle")
    )
    assert alone[0]["measurement"]["samples"] == ours[0]["measurement"]["samples"]


def test_export_of_a_run_carries_its_figures(call: Any, finished: Any, tmp_path: Path) -> None:
    root, _ = finished
    said = call("export", root, "--out", tmp_path / "b")
    assert (said.code, said.out) == (0, f"Bundle in {tmp_path / 'b'}\n")
    ours, theirs = (json.loads((path / "manifest.json").read_text()) for path in (tmp_path / "b", root / "bundle"))
    assert ours == theirs
    again = call("export", root, "--out", tmp_path / "b")
    assert (again.code, again.error) == (2, f"--out {tmp_path / 'b'}: exists; choose another place")
    assert "'onxx' should be 'onnx'" in call("export", root, "--format", "onxx", "--out", tmp_path / "c").error


def test_a_bundle_is_whole_and_may_take_bytes(call: Any, finished: Any, tmp_path: Path) -> None:
    root, _ = finished
    assert call("bundle", "verify", root / "bundle").code == 0
    assert call("export", root, "--out", tmp_path / "b", "--uint8-input", "--quiet").code == 0
    said = call("bundle", "verify", tmp_path / "b")
    assert (said.code, said.err) == (0, "")
    assert "2 models on 8 inputs (images)" in said.out
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "bundle.json").write_text('{"format": "slim-bundle/1"}')
    said = call("eval", tmp_path / "old", "--data", "digits")
    words = "a bundle of format slim-bundle/1; write it again with `slim export`"
    assert (said.code, said.error) == (1, f"{tmp_path / 'old'}: {words}")


def test_bench_compares_runs_and_plain_files(call: Any, finished: Any) -> None:
    root, _ = finished
    said = call("bench", "--json", "--quiet", root / "dense.onnx", root)
    assert (said.code, said.err) == (0, "")
    reference, candidate, ratio = json.loads(said.out)
    assert [one["file"] for one in (reference, candidate, ratio)] == [f"{root}/dense.onnx", str(root), str(root)]
    assert ratio["against"] == f"{root}/dense.onnx"
    metrics = [Measurement.model_validate(one["measurement"]).metric for one in (reference, candidate, ratio)]
    assert metrics == ["latency_p50_ms", "latency_p50_ms", "latency_ratio"]
    assert ratio["measurement"]["details"]["reference"]["file"] == "dense.onnx"
    assert ratio["measurement"]["details"]["candidate"]["file"] == "model.onnx"


def test_bench_of_one_file_on_two_targets_is_two_lines(call: Any, finished: Any) -> None:
    root, _ = finished
    said = call("bench", "--quiet", root, "--target", "ort:cpu,batch=1", "--target", "ort:cpu,batch=2")
    assert said.code == 0
    lines = said.out.splitlines()
    assert [f"batch={n}" in line and " ms (p50, n=" in line for n, line in enumerate(lines, 1)] == [True, True]


# What else there is


def test_doctor_names_the_machine_and_the_targets(call: Any) -> None:
    said = call("doctor")
    assert said.code == 0
    found = json.loads(call("doctor", "--json").out)
    assert f"fingerprint {found['fingerprint']}" in said.out
    assert found["targets"]["ort:cpu"].startswith("ready, ")
    assert f"torch {found['versions']['torch']}" in said.out
    assert max(map(len, said.out.splitlines())) > 80  # lines are not broken where they cannot be drawn


def test_passes_are_listed_and_each_has_a_card(call: Any) -> None:
    assert json.loads(call("passes", "--json").out) == {name: text for name, (_, _, text) in PASSES.items()}
    assert [line.split()[0] for line in call("passes").out.splitlines()] == list(PASSES)
    for name in PASSES:
        card = json.loads(call("passes", "--json", "--card", name).out)
        assert card["pass"] == name
        assert card["card"].startswith("# ")
        assert call("passes", "--card", name).out.strip()
    said = call("passes", "--card", "lowrank")
    assert (said.code, said.error) == (2, "--card lowrank: no such pass; did you mean 'low-rank'?")


def test_schema_is_json(call: Any) -> None:
    found = json.loads(call("schema").out)
    assert found["properties"]["passes"]["items"]["oneOf"]
