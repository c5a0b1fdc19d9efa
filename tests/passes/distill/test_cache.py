"""Training from cached targets is training from the teacher; and what a distillation says it will cost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slim import contract
from slim.artifact import Artifact, Preprocessing
from slim.data import Data, open_data
from slim.errors import StoreError
from slim.passes.distill.records import tolerance
from slim.passes.distill.targets import bytes_needed
from slim.passes.distill.teacher import Teacher
from slim.pipeline import Pipeline
from tests.conftest import Call
from tests.passes.distill.classroom import (
    FACTOR,
    INPUT,
    STILL,
    VIT,
    Spy,
    after,
    artifact,
    context,
    kd,
    said,
    saved,
)

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")


# The cache


def test_a_cache_gives_the_losses_of_its_teacher(able: tuple[Artifact, Data], digits: Data, tmp_path: Path) -> None:
    """The student stands still, so that nothing but the targets differs."""
    given, student = able[0], artifact("vit", seed=3)
    still = {**STILL, "epochs": 2}
    live = said(after(kd(**still), student, given, digits))
    spread = 0.0
    with torch.no_grad():
        for epoch in (0, 1):
            shown = digits.views(INPUT, kd(), range(64), seed=0, epoch=epoch, batch_size=64, num_classes=10)
            logits = student.model()(next(shown).images)
            spread = max(spread, float((logits.amax(1) - logits.amin(1)).max()))
    for mass in (0.9, 0.999):
        place = tmp_path / str(mass)
        cached = said(after(kd(**still, cache=str(place), cache_mass=mass, cache_check=128), student, given, digits))
        index = json.loads((place / "index.json").read_text())
        allowed = tolerance(cached["cache"]["mass"], classes=10, k=index["k"], spread=spread)
        for expected, found in zip(live["loss"], cached["loss"], strict=True):
            assert abs(found - expected) <= allowed
        assert allowed < live["loss"][0] / 2, "nothing is told apart"
        assert cached["cache"]["records"] == 128
        assert cached["cache"]["mass"] >= mass - 0.05  # k was chosen by the first epoch alone


def test_with_every_class_stored_a_training_is_that_of_the_teacher(digits: Data, teacher: str, tmp_path: Path) -> None:
    options = {"teacher": teacher, "epochs": 3, "optimizer": "sgd", "lr": 0.05, "temperature": 2.0}
    live = kd(**options)(artifact("vit"), context(digits))
    cached = kd(**options, cache=str(tmp_path / "cache"), cache_mass=1.0)(artifact("vit"), context(digits))
    assert said(live)["loss"][-1] < said(live)["loss"][0] * 0.9, "nothing was learned, so nothing is compared"
    # float16 moves a probability by 2^-11 of itself, so a loss of n nat by about so much of n and its logarithm.
    assert said(cached)["loss"] == pytest.approx(said(live)["loss"], rel=5e-3)


def test_a_cached_teacher_is_not_asked_in_training_and_the_next_time_for_the_check_alone(
    digits: Data, teacher: str, tmp_path: Path, spy: Spy
) -> None:
    def asked(**fields: Any) -> Counter[str]:
        spy.taught.clear()
        kd(teacher=teacher, epochs=2, cache=str(tmp_path / "cache"), **fields)(artifact("vit"), context(digits))
        return Counter(spy.taught)

    filling = asked()
    assert filling == {"before": 64 + 128 + 64}  # to choose k, every view, and the check
    assert asked() == {"before": 64}
    assert asked(cache_check=10, lr=1e-4, label_weight=1.0) == {"before": 10}
    assert asked(cache_check=0) == {}
    spy.taught.clear()
    kd(teacher=teacher, epochs=2)(artifact("vit"), context(digits))
    assert Counter(spy.taught) == {"in training": 128}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"flip": 0.5}, "augmentation"),
        ({"mixup": 0.2}, "augmentation"),
        ({"temperature": 2.0}, "temperature 1.0, not 2.0"),
        ({"precision": "bf16"}, "precision torch.float32, not torch.bfloat16"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"teacher": artifact("wide", seed=2)}, "teacher "),
        ({"images": 63}, "images"),
        ({"input": Preprocessing(size=(3, 32, 32), mean=(0.0, 0.0, 0.0), crop=1.0)}, "input "),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_cache_of_other_targets_is_refused_before_any_work(
    change: dict[str, Any], named: str, digits: Data, teacher: str, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"teacher": teacher, "cache": str(tmp_path / "cache")}
    kd(**fields)(artifact("vit"), context(digits))
    student, data, seed = artifact("vit"), digits, change.get("seed", 0)
    if "teacher" in change:
        saved(change["teacher"], Path(teacher))
    elif "images" in change:
        data = open_data("digits", limit_train=change["images"])
    elif "input" in change:
        student = replace(student, backbone=student.backbone.model_copy(update=change))
    elif "seed" not in change:
        fields |= change
    here = context(data, seed=seed)
    with pytest.raises(StoreError, match=rf"cache: its targets have .*{named}.*; give another folder"):
        Pipeline((kd(**fields),)).forecast(student, here)
    with pytest.raises(StoreError, match=named):
        kd(**fields)(student, here)


def test_smoothed_labels_and_another_batch_size_need_no_other_targets(
    digits: Data, teacher: str, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"teacher": teacher, "cache": str(tmp_path / "cache"), "label_weight": 1.0}
    kd(**fields)(artifact("vit"), context(digits))
    kd(**fields, smoothing=0.1)(artifact("vit"), replace(context(digits), loading=contract.Loading(batch_size=32)))


def test_targets_that_the_teacher_no_longer_gives_are_found_out(
    digits: Data, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = kd(teacher=teacher, cache=str(tmp_path / "cache"))
    options(artifact("vit"), context(digits))
    logits = Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda this, images: logits(this, images).flip(1))
    with pytest.raises(StoreError, match=r"stored is class .* beyond rounding; fill another folder"):
        options(artifact("vit"), context(digits))


# What is said before any work


def test_a_forecast_says_what_a_distillation_will_cost(digits: Data, teacher: str, tmp_path: Path) -> None:
    student, here = artifact("vit"), context(digits)
    cache = tmp_path / "cache"
    (found,) = Pipeline((kd(teacher=teacher, epochs=5, cache=str(cache)),)).forecast(student, here)
    # By hand, tokens = 17: patches, four products of each block, attention, and the classifier.
    assert found == {
        "teacher": "vit_tiny_patch16_224",
        "teacher_macs": vit_macs(48),
        "student_macs": vit_macs(32),
        "auxiliary_params": 0,
        "steps": 5 * 4,
        "cache_bytes": 5 * (64 * 10 * 4 + 32),
    }
    assert not cache.exists()
    kd(teacher=teacher, epochs=5, cache=str(cache))(student, here)
    stored = sum(file.stat().st_size for file in cache.glob("*.bin"))
    (again,) = Pipeline((kd(teacher=teacher, epochs=5, cache=str(cache)),)).forecast(student, here)
    assert again["cache_bytes"] == stored
    (two,) = Pipeline((kd(teacher=(teacher, teacher), method=("kd", "cosine")),)).forecast(student, here)
    assert (two["teacher"], two["teacher_macs"]) == ("vit_tiny_patch16_224, vit_tiny_patch16_224", 2 * vit_macs(48))
    assert two["auxiliary_params"] == 2 * (32 * 48 + 48)
    assert "cache_bytes" not in two


def vit_macs(width: int, depth: int = VIT["depth"]) -> int:
    tokens, patches, patch = 17, 16, 3 * 8 * 8
    block = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    return patches * patch * width + depth * block + width * 10


def test_before_its_stage_is_known_a_cache_is_estimated(digits: Data, tmp_path: Path) -> None:
    chain = Pipeline((FACTOR, kd(cache=str(tmp_path), epochs=2)))
    assert chain.forecast(artifact("vit"), context(digits))[1]["cache_bytes"] == bytes_needed(64, 2, 10)


def test_a_dry_run_prints_the_forecast(call: Call, tiny: tuple[str, ...], teacher: str) -> None:
    chain = (
        "--batch-size",
        "50",
        "--dry-run",
        "distill",
        "--teacher",
        teacher,
        "--epochs",
        "3",
        "--method",
        "cosine",
        "--method",
        "kd",
    )
    ended = call("run", *tiny, *chain)
    assert ended.code == 0, ended.err
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    at = next(number for number, line in enumerate(lines) if line.startswith("stage 1 1 distill (repair)"))
    assert lines[at + 1 : at + 6] == [
        "teacher vit_tiny_patch16_224",
        f"teacher macs {vit_macs(48) / 1e6:.2f} M",
        f"student macs {vit_macs(64, depth=1) / 1e6:.2f} M",
        f"auxiliary params {(64 * 48 + 48) / 1e3:.2f} k",
        "steps 12",
    ]
    as_json = json.loads(call("run", *tiny, "--json", *chain).out)["forecasts"]
    assert as_json[0]["steps"] == 3 * 200 // 50
