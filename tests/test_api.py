"""slim from Python: the public list, and the whole road without the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import slim
import slim.bench
import slim.export
from slim.data import open_data
from slim.errors import RecipeError
from slim.passes.finetune import Finetune
from slim.passes.low_rank import LowRank

MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "args": {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 1},
    "weights": "none",
    "input": {"size": [3, 32, 32]},
}
DATA = {"source": "digits", "limit": {"train": 128, "val": 64}, "calib": 32}


@pytest.mark.parametrize("package", [slim, slim.bench, slim.export], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_no_other(package: Any) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_importing_slim_and_its_packages_loads_nothing_heavy() -> None:
    code = (
        "import sys, slim, slim.bench, slim.export, slim.passes\n"
        "print(sorted({'torch', 'timm', 'numpy', 'pydantic', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> slim.Run:
    return slim.run(
        model=MODEL,
        data=DATA,
        # The second as a mapping, as a recipe has it.
        passes=[Finetune(epochs=1), {"name": "low-rank", "ratio": 0.2}],
        out=tmp_path_factory.mktemp("api") / "run",
        threads=1,
    )


def test_a_run_gives_its_artifact_and_its_report(ran: slim.Run) -> None:
    assert [step.name for step in ran.artifact.history] == ["finetune", "low-rank"]
    assert ran.artifact.history[1].config == LowRank(ratio=0.2).model_dump(mode="json")
    assert [record.outcome for record in ran.report.steps] == ["kept", "kept"]
    assert ran.report.final["params"].value < ran.report.dense["params"].value
    assert ran.report.notices == ("latency was not measured: the run had no --target",)
    assert sorted(path.name for path in ran.bundle.iterdir()) == [
        "MODEL_CARD.md",
        "bench",
        "golden.npz",
        "io.json",
        "labels.json",
        "lint.json",
        "manifest.json",
        "model.onnx",
        "parity.json",
        "predict.py",
        "preprocess.json",
        "scopes.json",
    ]


def test_a_loaded_artifact_is_a_plain_network(ran: slim.Run) -> None:
    artifact = slim.load(ran.root / "final")
    assert artifact.digest == ran.artifact.digest
    model = artifact.model()
    assert type(model).__module__.startswith("timm.")
    assert not model.training
    model.load_state_dict(artifact.state_dict())
    images, _ = next(open_data("digits", limit_val=8).eval_batches("val", artifact.backbone.input, batch_size=8))
    with torch.inference_mode():
        assert torch.equal(model(images), ran.artifact.model()(images))


def test_a_saved_artifact_is_found_again(ran: slim.Run, tmp_path: Path) -> None:
    assert slim.load(slim.save(ran.artifact, tmp_path / "copy")).digest == ran.artifact.digest


def test_the_gate_and_a_comparison_are_functions(ran: slim.Run, tmp_path: Path) -> None:
    budgets = tmp_path / "budgets.yaml"
    budgets.write_text("format: slim-budgets/1\ntarget: ort:cpu\nbudgets: [{metric: params, max: 1}]\n")
    (verdict,) = slim.gate(ran.root, budgets, stored=True)
    assert verdict.outcome == "fail"
    file = slim.export.export_onnx(ran.artifact.model(), tmp_path / "again.onnx", ran.artifact.backbone.input)
    assert file.path.read_bytes() == (ran.bundle / "model.onnx").read_bytes()
    ratio = slim.bench.compare(file.path, ran.dense, slim.Target.parse("ort:cpu"), seed=0)
    assert ratio.metric == "latency_ratio"


def test_a_wrong_value_is_the_error_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"slim\.run: model\.weigths: unknown key; did you mean 'weights'\?"):
        slim.run(model={**MODEL, "weigths": "none"}, passes=[], out=tmp_path / "run")
    assert issubclass(RecipeError, slim.SlimError)
    assert not list(tmp_path.iterdir())


FACTORY = """
import torch

def tiny(num_classes):
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                               torch.nn.Flatten(), torch.nn.Linear(8, num_classes))
"""


def test_a_factory_of_yours_runs_only_when_trusted_all_along(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    line = ("--model", "my_factory:tiny", "--weights", "none", "--input-size", "32", "--data", "digits")
    line = (*line, "--limit-train", "64", "--limit-val", "32", "--out", tmp_path / "run")
    refused = call("run", *line, "finetune", "--epochs", "1", "export")
    assert refused.code == 2
    assert refused.error.startswith("model 'my_factory:tiny' runs code of yours to build the network; add --trust")
    assert call("run", *line, "--trust", "finetune", "--epochs", "1", "export").code == 0
    budgets = tmp_path / "budgets.yaml"
    budgets.write_text("format: slim-budgets/1\ntarget: ort:cpu\nbudgets: [{metric: params, max: 1e9}]\n")
    for command in (("show",), ("eval",), ("gate", "--budgets", budgets), ("export", "--out", tmp_path / "again")):
        said = call(*command, tmp_path / "run")
        assert said.code in (1, 2)
        assert "add --trust" in said.error
        assert call(*command, tmp_path / "run", "--trust").code == 0
