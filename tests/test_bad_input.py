"""Bad input, a full disk and Ctrl-C: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import slim

CHAIN = ("finetune", "--epochs", "1", "low-rank", "--ratio", "0.2")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 12 images each in train/, 2 in val/."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoilt."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def model_of(tiny: tuple[str, ...]) -> tuple[str, ...]:
    """The options that say which network, without those of the data."""
    return tiny[: tiny.index("--data")]


# Words that nobody knows, and values that cannot be


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("runn", 2, "command 'runn' is unknown; did you mean 'run'?"),
        ("run TINY lowrank", 2, "pass 'lowrank' is unknown; did you mean 'low-rank'?"),
        (
            "run TINY --modle x",
            2,
            "No such option '--modle'. (Did you mean one of: '--mean', '--model', '--model-arg'?)",
        ),
        ("run TINY low-rank --enrgy 1", 2, "No such option '--enrgy'. Did you mean '--energy'?"),
        ("run TINY low-rank --out x", 2, "--out belongs to the run, not to 'low-rank'; put it before the first pass"),
        ("run TINY low-rank x", 2, "pass 'x' is unknown; known: distill, elastic, export, finetune, low-rank"),
        ("run TINY --out OUT low-rank --energy 1.5", 2, "low-rank: energy: 1.5 should be less than or equal to 1"),
        ("run TINY --out OUT low-rank --energy x", 2, "Invalid value for '--energy': 'x' is not a valid float."),
        ("run TINY --out OUT finetune --optimizer adamm", 2, "finetune: optimizer: "),
        ("run TINY --out OUT export finetune", 2, "'export' ends the chain, and something follows it; put one export,"),
        ("run TINY --out OUT export export", 2, "'export' ends the chain, and something follows it; put one export,"),
        ("run TINY --out OUT low-rank finetune", 2, "the first pass must train it, and 'low-rank' does not"),
        (
            "run TINY --out OUT --target ort:gpu finetune",
            2,
            "target 'ort:gpu': unknown runtime 'ort:gpu'; did you mean",
        ),
        ("run TINY --out OUT --target ort,thread=2 finetune", 2, "unknown option 'thread'; did you mean 'threads'?"),
        ("run TINY --out OUT --target ort@pi finetune", 2, "'pi' is not ssh://[user@]host[:port][/path/of/python]"),
        ("run TINY --out OUT --device gpu finetune", 2, "device: 'gpu' should be 'auto', 'cpu' or 'cuda'"),
        ("run TINY --out OUT --data digit finetune", 2, "data 'digit': unknown source 'digit'; did you mean 'digits'?"),
        ("run TINY --out OUT --data folder:/none/here finetune", 2, "there is no '/none/here'; give an existing path"),
        ("run TINY --out OUT --model-arg depht=2 finetune", 2, "model 'vit_tiny_patch16_224' cannot be built"),
        (
            "run --model resnet5 --data digits --out OUT finetune",
            2,
            "model 'resnet5' is not a timm model; did you mean",
        ),
        ("run --out OUT finetune", 2, "--model is missing: the network to compress, by its timm name"),
        ("run TINY finetune", 2, "--out is missing: the folder of the run"),
        (
            "run TINY --out OUT --weights w.pth finetune",
            2,
            "--weights w.pth: is not `pretrained`, `none` or a .safeten",
        ),
        ("run TINY --out OUT --weights none.safetensors finetune", 2, "--weights none.safetensors: no such file"),
        ("run -f none.yaml", 2, "none.yaml: cannot be read: No such file or directory"),
        ("show OUT", 2, "no such folder; give a run or an artifact"),
        ("eval none.onnx", 2, "none.onnx: no such file"),
        ("bench OUT", 2, "holds no run; give the --out of a `slim run`"),
        ("export OUT --out OUT", 2, "no such folder; give a run or an artifact"),
        ("bench OUT --target ort:gpu", 2, "holds no run"),
    ],
)
def test_bad_words_end_with_one_line(
    call: Any, tiny: tuple[str, ...], tmp_path: Path, line: str, code: int, message: str
) -> None:
    words = [{"OUT": str(tmp_path / "out")}.get(word, word) for word in line.replace("TINY", "\0".join(tiny)).split()]
    said = call(*(part for word in words for part in word.split("\0")))
    assert (said.code, said.out) == (code, "")
    assert message in said.error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_here_is_named(call: Any, tiny: tuple[str, ...], tmp_path: Path) -> None:
    said = call("run", *tiny, "--out", tmp_path / "r", "--device", "cuda", "finetune")
    assert (said.code, said.error) == (2, "--device cuda: torch sees no CUDA device here; use --device cpu")


# Data


def spoilt_images(images: Path, place: Path, spoil: Callable[[Path], object]) -> Path:
    root = Path(shutil.copytree(images, place))
    spoil(root)
    return root


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train" / "bird").mkdir(), "train/bird holds no image"),
        (lambda root: shutil.rmtree(root / "val"), "no val/, validation/ or test/ with class folders"),
        (lambda root: (root / "val" / "dog").rename(root / "val" / "dgo"), "class 'dgo' is in val/ but not in train/"),
        (
            lambda root: [path.write_bytes(path.read_bytes()[:60]) for path in root.rglob("train/*/*")],
            "cannot be read as an image",
        ),
    ],
    ids=["empty class folder", "no val", "misspelt class", "unreadable images"],
)
def test_bad_data_ends_with_one_line(
    call: Any, tiny: tuple[str, ...], images: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    root = spoilt_images(images, tmp_path / "images", spoil)
    said = call("run", *model_of(tiny), "--data", f"folder:{root}", "--out", tmp_path / "r", *CHAIN)
    assert said.code == 2
    assert f"{root}" in said.error
    assert message in said.error


def test_one_unreadable_image_is_named_and_skipped(
    call: Any, tiny: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    root = spoilt_images(images, tmp_path / "images", lambda root: (root / "train" / "cat" / "3.png").write_text("no"))
    line = ("--data", f"folder:{root}", "--batch-size", "8", "--out", tmp_path / "r", "--quiet")
    said = call("run", *model_of(tiny), *line, "finetune", "--epochs", "1")
    assert said.code == 0
    assert said.err.count("\n") == 1
    assert f"{root}/train/cat/3.png: skipped, it cannot be read as an image" in said.err


def test_a_class_count_that_differs_is_refused_unless_the_first_pass_trains(
    call: Any, tiny: tuple[str, ...], finished: Any, images: Path, tmp_path: Path
) -> None:
    """Weights of ten digits, images of two animals."""
    weights = finished[0] / "steps" / "01-finetune" / "weights.safetensors"
    line = (*model_of(tiny), "--weights", weights, "--data", f"folder:{images}", "--dry-run")
    said = call("run", *line, "low-rank", "--ratio", "0.2", "finetune")
    assert said.code == 2
    assert "class-count mismatch: the data has 2 classes" in said.error
    assert "begin with finetune" in said.error
    assert "2 classes (new head)" in call("run", *line, "finetune", "low-rank", "--ratio", "0.2").out


# Files that are not what they were


def test_weights_that_are_cut_short_or_of_another_network_are_refused(
    call: Any, tiny: tuple[str, ...], finished: Any, tmp_path: Path
) -> None:
    whole = (finished[0] / "steps" / "01-finetune" / "weights.safetensors").read_bytes()
    path = tmp_path / "w.safetensors"
    path.write_bytes(whole[:-10])
    said = call("run", *tiny, "--weights", path, "--out", tmp_path / "r", "finetune")
    assert said.code == 1
    assert said.error.startswith(f"{path}: not a whole safetensors file")
    safetensors.torch.save_file({"other": torch.zeros(1)}, path)
    said = call("run", *tiny, "--weights", path, "--out", tmp_path / "r", "finetune")
    assert said.code == 2
    assert f"--weights {path}: does not fit vit_tiny_patch16_224: " in said.error


def edited(path: Path, change: Callable[[Any], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: (at / "weights.safetensors").write_bytes(b"\0" * 20), "weights.safetensors: not a whole safetens"),
        (lambda at: flip_a_bit(at / "weights.safetensors"), "the weights were changed after saving"),
        (lambda at: edited(at / "slim.json", lambda j: j["history"][1]["plan"]["layers"].popitem()), "was edited aft"),
        (lambda at: edited(at / "slim.json", lambda j: j.update(digest="0")), "slim.json: digest "),
        (lambda at: edited(at / "slim.json", lambda j: j["history"][0].update(name="os.system")), "slim.json: "),
        (lambda at: edited(at / "slim.json", lambda j: j.update(format="slim/9")), "format 'slim/9' is not 'slim/1'"),
        (lambda at: (at / "slim.json").write_text("{"), "not an artifact's slim.json"),
        (lambda at: (at / "slim.json").unlink(), "holds no slim.json"),
        (lambda at: (at / "weights.safetensors").unlink(), "weights.safetensors: no such file"),
    ],
    ids=["truncated", "bit", "plan", "digest", "pass", "format", "cut", "no manifest", "no weights"],
)
def test_an_artifact_that_was_changed_is_refused(
    call: Any, copied: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(copied / "final")
    said = call("show", copied)
    assert said.code in (1, 2)
    assert message in said.error


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("command", "file", "message"),
    [
        ("show", "report.json", "report.json: "),
        ("eval", "bundle/model.onnx", "not a whole ONNX file"),
        ("bench", "bundle/model.onnx", "model.onnx: ort:cpu cannot open it"),
        ("eval", "recipe.yaml", "recipe.yaml: holds str, a recipe is a mapping"),
    ],
)
def test_a_run_with_a_broken_file_says_which(call: Any, copied: Path, command: str, file: str, message: str) -> None:
    (copied / file).write_bytes(b"broken")
    said = call(command, copied)
    assert said.code in (1, 2)
    assert message in said.error


# The folder of the run


def test_a_folder_that_is_taken_is_left_alone(call: Any, tiny: tuple[str, ...], finished: Any, tmp_path: Path) -> None:
    root, _ = finished
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    line = (*tiny, "--target", "ort:cpu", "--out", root)
    said = call("run", *line, *CHAIN)
    assert (said.code, said.error.split("; ")[-1]) == (2, "add --resume to go on, or choose another place")
    said = call("run", *line, "--resume", "--seed", "1", *CHAIN)
    assert (said.code, said.error) == (2, f"--out {root}: its run has seed 0, not 1; choose another place")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    said = call("run", *tiny, "--out", tmp_path / "mine", "--resume", *CHAIN)
    assert (said.code, said.error) == (2, f"--out {tmp_path}/mine: exists and is not a run; choose another place")
    said = call("run", *tiny, "--out", tmp_path / "mine" / "thesis.tex" / "run", *CHAIN)
    assert said.code == 1
    assert "cannot be created: Not a directory" in said.error


# Work that fails


def test_a_loss_that_is_no_number_stops_the_step_and_keeps_those_before(
    call: Any, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    line = (*tiny, "--out", tmp_path / "r", "finetune", "--epochs", "1")
    assert call("run", *line).code == 0
    said = call("run", "--resume", *line, "finetune", "--lr", "1e30", "--clip", "0")
    assert said.code == 1
    assert "finetune" in said.error
    assert "loss is " in said.error
    assert "lower --lr or --clip" in said.error
    assert [folder.name for folder in (tmp_path / "r" / "steps").iterdir() if folder.is_dir()] == ["01-finetune"]
    assert slim.load(tmp_path / "r" / "final").digest == slim.load(tmp_path / "r" / "steps" / "01-finetune").digest
    said = call("run", "--resume", *line, "finetune", "--epochs", "1")
    assert said.code == 0
    assert "1 finetune: found finished in steps/01-finetune" in said.err


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails, as on a full disk; Python ignores the signal and reports the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_with_one_line_and_the_steps_before_are_whole(
    call: Any, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    line = (*tiny, "--out", tmp_path / "r", *CHAIN[:3])
    assert call("run", *line).code == 0
    whole = slim.load(tmp_path / "r" / "final").digest
    with largest_file(50_000):  # the factored network has 100 kB
        said = call("run", "--resume", *line, *CHAIN[3:])
    assert said.code == 1
    assert said.error == f"{tmp_path}/r/steps/02-low-rank: cannot be written: File too large; nothing was replaced"
    assert slim.load(tmp_path / "r" / "final").digest == whole
    assert slim.load(tmp_path / "r" / "steps" / "01-finetune").digest == whole
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]
    assert call("run", "--resume", *line, *CHAIN[3:]).code == 0
    assert len(slim.load(tmp_path / "r" / "final").history) == 2


# Ctrl-C

PHASES = {
    "reading the data": ("slim.job", "open_data", 1),
    "building the network": ("slim.job", "start", 1),
    "training": ("slim.passes.finetune", "label_loss", 2),
    "verifying": ("slim.verify", "outputs_sound", 1),
    "saving a step": ("safetensors.torch", "save", 1),
    "exporting": ("slim.export.onnx", "trace", 1),
    "timing": ("slim.bench.latency", "_Lockstep._session", 3),
    "calibrating": ("slim.passes.calibrate", "rows", 2),
    "planning": ("slim.passes.low_rank.low_rank", "ways_of", 2),
    "factoring": ("slim.passes.low_rank.schemes", "fill", 2),
    "repairing": ("slim.passes.repair", "change_of", 2),
    "recording": ("slim.runs", "Run.put", 2),
    "saving the result": ("safetensors.torch", "save", 1),
    "writing the bundle": ("slim.job", "write_bundle", 1),
    "drawing the report": ("slim.bench.report", "to_html", 1),
}
"""Phase of a run, in order -> where the signal comes: module, function, its how many-th call."""


def test_ctrl_c_in_any_phase_ends_with_130_and_resume_goes_on(
    call: Any, tiny: tuple[str, ...], finished: Any, tmp_path: Path
) -> None:
    """One run, interrupted in phase after phase, each time taken up again; in the end it is as if it never was."""
    root = tmp_path / "r"
    line = ("run", *tiny, "--target", "ort:cpu", "--no-guard", "--resume", "--out", root, *CHAIN, "export")
    for phase, (module, name, number) in PHASES.items():
        with pytest.MonkeyPatch.context() as patch:
            _interrupt_at(patch, module, name, number)
            said = call(*line)
        assert said.code == signal.SIGINT + 128, (phase, said.err)
        assert said.error.startswith("interrupted; what was finished is whole"), phase
        assert not said.out, phase
        assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name], phase
        assert not _children(os.getpid()), phase
        for folder in (*root.glob("steps/[0-9]*"), *root.glob("final")):
            slim.load(folder)
    said = call(*line)
    assert said.code == 0
    assert "2 low-rank: found finished" in said.err
    assert slim.load(root / "final").digest == slim.load(finished[0] / "final").digest
    assert (root / "bundle" / "model.onnx").read_bytes() == (finished[0] / "bundle" / "model.onnx").read_bytes()


def _interrupt_at(patch: pytest.MonkeyPatch, module: str, name: str, number: int) -> None:
    """SIGINT to this process when the function is called for the `number`-th time."""
    owner = sys.modules[module]
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), iter(range(1, 1_000_000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    patch.setattr(owner, last, interrupted)


def _children(pid: int) -> list[int]:
    """Processes that `pid` started and that are still there."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _words_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:  # it has ended since
        return b""


def test_ctrl_c_at_a_terminal_ends_a_run_and_its_workers(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The signal goes to the whole group, as a terminal sends it: first while training, then while workers time."""
    root, err = tmp_path / "r", tmp_path / "stderr"
    line = ["run", *tiny, "--target", "ort:cpu", "--out", str(root), "--resume", "finetune", "--epochs", "300"]

    def interrupted(there: Callable[[int], object]) -> int:
        with err.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "slim", *line], stderr=log, stdout=subprocess.DEVNULL, start_new_session=True
            )
        while not there(process.pid):
            assert process.poll() is None, err.read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        return process.wait()

    assert interrupted(lambda pid: list(root.glob("steps/.*.checkpoint"))) == 130
    assert err.read_text().splitlines()[-1].startswith("Error: interrupted")
    assert "Traceback" not in err.read_text()
    workers: list[int] = []

    def timing(pid: int) -> bool:
        workers[:] = [child for child in _children(pid) if b"export/session.py" in _words_of(child)]
        return bool(workers)

    line[line.index("300")] = "1"
    assert interrupted(timing) == 130
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in err.read_text()
    slim.load(root / "steps" / "01-finetune")
