"""The cache of targets: the maths on plain tensors, then files that are filled, resumed, read, checked and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slim import store
from slim.artifact import Preprocessing
from slim.contract import no_progress
from slim.data import Augment, open_data
from slim.errors import PassError, StoreError
from slim.passes.distill import targets
from slim.passes.distill.targets import (
    NOISE,
    Targets,
    agrees,
    bytes_needed,
    least_k,
    log_probs,
    retained,
    tolerance,
    top_k,
)

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = {"data": "full:" + "a" * 64, "augmentation": '{"flip": 0.5, "scale_low": 0.5, "mixup": 0.0}', "seed": "0"}
IMAGES, CLASSES, TEMPERATURE = 20, 6, 2.0


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Source:
    """Views that depend on epoch and position, and a teacher of them; both count what they are asked for."""

    def __init__(self, *, seed: int = 0, scale: float = 3.0, batch: int = 3, shift: float = 0.0) -> None:
        self.weight = (random(12, CLASSES, seed=seed) * scale).requires_grad_()
        self.batch, self.shift = batch, shift
        self.asked: list[tuple[int, int]] = []
        self.taught = 0

    def views(self, epoch: int, positions: Sequence[int]) -> Iterator[Tensor]:
        for at in range(0, len(positions), self.batch):
            part = torch.tensor(positions[at : at + self.batch])
            assert torch.is_grad_enabled()
            self.asked += [(epoch, int(position)) for position in part]
            phase = (epoch * 31 + part + 1)[:, None] * torch.arange(1, 13) * 0.37 + self.shift
            yield phase.sin().view(-1, 3, 2, 2)

    def teacher(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.taught += len(images)
        return images.flatten(1) @ self.weight

    def logits(self, epoch: int, positions: Sequence[int]) -> Tensor:
        return torch.cat([images.flatten(1) @ self.weight.detach() for images in self.views(epoch, positions)])


def opened(folder: Path, key: dict[str, str] = KEY, **changed: Any) -> Targets:
    given = {"images": IMAGES, "classes": CLASSES, "temperature": TEMPERATURE, "mass": 0.9, **changed}
    return Targets.open(folder, key, **given)


def filled(folder: Path, source: Source, epochs: int = 2, key: dict[str, str] = KEY, **changed: Any) -> Targets:
    cache = opened(folder, key, **changed)
    cache.fill(epochs, source.views, source.teacher, progress=no_progress)
    return cache


@pytest.fixture
def shards_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shards an epoch: 8, 8 and 4 positions."""
    monkeypatch.setattr(targets, "SHARD", 8)


def everything(cache: Targets) -> Tensor:
    return torch.stack([cache.lookup(epoch, torch.arange(IMAGES)) for epoch in range(2)])


@pytest.mark.parametrize(("mass", "k"), [(0.1, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.9, 3), (1.0, 4)])
def test_least_k_by_hand(mass: float, k: int) -> None:
    assert least_k(torch.tensor([0.5, 0.75, 0.9375, 1.0], dtype=torch.float64), mass) == k
    # Rounding may leave all the mass a little under 1.
    assert least_k(torch.tensor([0.5, 0.75, 0.9375, 1 - 1e-9], dtype=torch.float64), mass) == k


def test_retained_mass_by_hand() -> None:
    found = retained(torch.tensor([[0.2, 0.5, 0.3]]).log() * 4, 4.0)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.8, 1.0]], dtype=torch.float64))


def test_what_the_top_k_leave_is_spread_evenly() -> None:
    found = log_probs(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]]), 6).exp()
    torch.testing.assert_close(found, torch.tensor([[0.0625, 0.25, 0.0625, 0.5, 0.0625, 0.0625]]))


TEACHERS = {"one-hot": 1000.0, "peaked": 8.0, "soft": 2.0, "flat": 0.01}


@pytest.mark.parametrize("scale", TEACHERS.values(), ids=TEACHERS)
@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("k", [1, 2, 10, 1000])
def test_lookups_are_finite_and_sum_to_one(scale: float, classes: int, k: int) -> None:
    found = log_probs(*top_k(random(64, classes) * scale, 1.0, min(k, classes)), classes)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    # A float32 logarithm of at most 18 is off by 2^-20 at most, and so are the probabilities, relatively.
    torch.testing.assert_close(found.double().exp().sum(1), torch.ones(64, dtype=torch.float64), rtol=0, atol=2**-20)


def test_the_top_class_stays_the_top_class_and_no_class_gets_more_than_a_stored_one() -> None:
    index, prob = top_k(random(256, 100), 1.0, 4)
    found = log_probs(index, prob, 100)
    assert torch.equal(found.argmax(1), index[:, 0])
    assert (found.scatter(1, index, -torch.inf).amax(1) < found.gather(1, index).amin(1)).all()


def test_every_class_stored_is_a_round_trip_within_float16() -> None:
    logits = random(64, 50) * 4
    exact, found = targets.softened(logits, 1.0).double(), log_probs(*top_k(logits, 1.0, 50), 50).double().exp()
    # Stored to 2^-11 of itself, or 2^-25 where that is more; the sum they are scaled by is off by no more than they.
    bound = exact * 2**-11 + 2**-25
    assert ((found - exact).abs() <= bound + exact * bound.sum(1, keepdim=True)).all()


def kl(p: Tensor, log_p: Tensor, log_s: Tensor) -> Tensor:
    return torch.where(p > 0, p * (log_p - log_s), 0.0).sum(1)


@pytest.mark.parametrize("scale", TEACHERS.values(), ids=TEACHERS)
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (2, 2), (5, 4), (1000, 1), (1000, 10), (1000, 50), (1000, 1000)])
@pytest.mark.parametrize("student", [0.1, 3.0])
def test_cached_and_live_kl_differ_by_no_more_than_the_tolerance(
    scale: float, classes: int, k: int, student: float
) -> None:
    logits = random(128, classes) * scale
    log_s, log_p = torch.log_softmax(random(128, classes, seed=1).double() * student, 1), logits.double().log_softmax(1)
    log_c = log_probs(*top_k(logits, 1.0, k), classes).double()
    gap = kl(log_p.exp(), log_p, log_s) - kl(log_c.exp(), log_c, log_s)
    mass, spread = retained(logits, 1.0)[:, k - 1], log_s.amax(1) - log_s.amin(1)
    limits = [
        tolerance(min(float(m), 1.0), classes=classes, k=k, spread=float(s)) for m, s in zip(mass, spread, strict=True)
    ]
    assert (gap.abs() <= torch.tensor(limits)).all()
    whole = tolerance(min(float(mass.mean()), 1.0), classes=classes, k=k, spread=float(spread.max()))
    assert abs(float(gap.mean())) <= whole


def test_the_tolerance_is_nearly_reached_so_it_is_not_idle() -> None:
    # All that is cut lies on one class, to which the student gives e^-10 of what it gives the others.
    teacher, ours = torch.full((1, 1000), -torch.inf).double(), torch.zeros(1, 1000).double()
    teacher[0, :2], ours[0, 1] = torch.tensor([0.75, 0.25]).log(), -10.0
    log_s, log_c = torch.log_softmax(ours, 1), log_probs(torch.tensor([[0]]), torch.tensor([[0.75]]), 1000).double()
    gap = kl(teacher.exp(), teacher, log_s) - kl(log_c.exp(), log_c, log_s)
    limit = tolerance(0.75, classes=1000, k=1, spread=10.0)
    assert 0.99 * limit < float(gap) <= limit


def test_the_tolerance_covers_the_kl_that_soft_teachers_lose() -> None:
    # Of 1000 classes: k = 10 keeps 96 % and loses 0.13 nat, k = 50 keeps 99.8 % and loses 0.006.
    assert tolerance(0.96, classes=1000, k=10, spread=0.0) > 0.13
    assert tolerance(0.998, classes=1000, k=50, spread=0.0) > 0.006


def test_any_logits_within_the_noise_agree_and_others_do_not() -> None:
    logits = random(500, 40) * 6
    index, prob = top_k(logits, 2.0, 10)
    most = logits.abs().amax(1, keepdim=True)
    # The bound is on the logits of today, whose largest may be NOISE smaller than that of the record.
    moved = logits + most * (NOISE / (1 + NOISE)) * random(500, 40, seed=1).sign()
    assert agrees(index, prob, logits, 2.0).all()
    assert agrees(index, prob, moved, 2.0).all()
    assert not agrees(index, prob, random(500, 40, seed=2) * 6, 2.0).any()
    assert not agrees(index, prob, logits, 1.0).all()


def test_a_class_that_was_not_stored_may_not_lead() -> None:
    # Class 0 has the probability that is stored for it; class 1 did not exist for the record.
    logits = torch.tensor([[0.3, 0.6, 0.05, 0.05]]).log()
    index, prob = torch.tensor([[0]]), torch.tensor([[0.3]])
    assert not agrees(index, prob, logits, 1.0)
    assert agrees(index, prob, torch.tensor([[0.3, 0.28, 0.21, 0.21]]).log(), 1.0)


def test_replayed_is_what_was_stored_and_that_is_what_the_teacher_says(tmp_path: Path, shards_of_8: None) -> None:
    source = Source()
    cache, again = filled(tmp_path, source), opened(tmp_path)
    assert cache.k is not None
    for epoch in range(2):
        logits = torch.cat([source.logits(epoch, part) for part in (range(0, 8), range(8, 16), range(16, 20))])
        expected = log_probs(*top_k(logits, TEMPERATURE, cache.k), CLASSES)
        for positions in (torch.arange(20), torch.tensor([19, 0, 7, 8, 8, 3]), torch.tensor([], dtype=torch.int64)):
            assert torch.equal(cache.lookup(epoch, positions), expected[positions])
            assert torch.equal(again.lookup(epoch, positions), expected[positions])
    assert not torch.equal(cache.lookup(0, torch.arange(20)), cache.lookup(1, torch.arange(20)))


def test_a_killed_fill_goes_on_where_it_was(tmp_path: Path, shards_of_8: None) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".index.json.0.partial").write_bytes(b"half")
    source = Source()

    def killed(epoch: int, positions: Sequence[int]) -> Iterator[Tensor]:
        for images in source.views(epoch, positions):
            yield images
            if positions[0] == 8:
                raise KeyboardInterrupt

    cache = opened(folder)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(2, killed, source.teacher, progress=no_progress)
    assert cache.missing(2) == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    first = (folder / "00000-00000.bin").read_bytes()
    (folder / ".00000-00001.bin.123.partial").write_bytes(b"half")

    source.taught, source.asked, seen = 0, [], []

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
        assert total == 40 - 8
        yield lambda steps, note="": seen.append(steps)

    again = opened(folder)
    again.fill(2, source.views, source.teacher, progress=progress)
    assert source.taught == sum(seen) == 40 - 8
    assert (0, 0) not in source.asked
    assert (folder / "00000-00000.bin").read_bytes() == first
    assert torch.equal(everything(again), everything(filled(tmp_path / "whole", Source())))


def test_a_cache_of_more_epochs_serves_fewer_without_a_teacher(tmp_path: Path) -> None:
    filled(tmp_path, Source(), epochs=3)
    source = Source()
    cache = filled(tmp_path, source, epochs=1)
    assert source.taught == 0
    assert cache.missing(3) == []
    assert cache.missing(4) == [(3, 0)]


@pytest.mark.parametrize("first", [0, 1])
def test_two_ranks_fill_disjoint_shards_and_together_the_whole(tmp_path: Path, shards_of_8: None, first: int) -> None:
    folder = tmp_path / "cache"
    done = []
    for rank in (first, 1 - first):
        source, cache = Source(), opened(folder)
        before = set(cache.missing(2))
        cache.fill(2, source.views, source.teacher, progress=no_progress, rank=rank, world=2)
        done.append(before - set(cache.missing(2)))
    assert not done[0] & done[1]
    assert [len(part) for part in done] == [3, 3]
    assert torch.equal(everything(opened(folder)), everything(filled(tmp_path / "alone", Source())))


def test_of_two_processes_that_choose_k_the_first_decides(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    late, soft = opened(folder), Source(scale=0.01)

    def slow(images: Tensor) -> Tensor:
        # While this one is choosing, the other is through.
        if late.k is None and not (folder / "index.json").exists():
            with torch.enable_grad():
                filled(folder, Source(scale=500.0))
        return soft.teacher(images)

    late.fill(3, soft.views, slow, progress=no_progress, rank=2, world=3)
    assert late.k == opened(folder).k == 1
    assert filled(tmp_path / "alone", soft).k == CLASSES


def test_k_is_the_least_that_retains_the_mass_of_the_first_1024_views(tmp_path: Path) -> None:
    assert filled(tmp_path / "peaked", Source(scale=500.0), mass=0.999).k == 1
    assert filled(tmp_path / "whole", Source(), mass=1.0).k == CLASSES
    source = Source(batch=256)
    cache = filled(tmp_path / "first", source, epochs=1, images=1500, mass=0.8)
    assert len(source.asked) == 1024 + 1500
    assert source.asked[:1024] == [(0, position) for position in range(1024)]
    share = retained(source.logits(0, range(1024)), TEMPERATURE).mean(0)
    assert cache.k is not None
    assert cache.k > 1
    assert share[cache.k - 2] < 0.8 <= share[cache.k - 1]
    assert cache.reached == pytest.approx(float(share[cache.k - 1]), rel=1e-9)


def test_the_bytes_are_what_was_announced(tmp_path: Path, shards_of_8: None) -> None:
    cache = filled(tmp_path, Source())
    assert cache.k is not None
    size = sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert cache.size_bytes(2) == bytes_needed(20, 2, cache.k, shard=8) == size
    # 1 281 167 images, 300 epochs, 10 classes of 4 bytes, and 20 digests of 32 an epoch.
    assert bytes_needed(1_281_167, 300, 10) == 300 * (1_281_167 * 40 + 20 * 32)
    assert opened(tmp_path / "new").size_bytes(1) == bytes_needed(20, 1, CLASSES, shard=8)


def test_reading_maps_files_and_of_one_epoch_only(tmp_path: Path, shards_of_8: None) -> None:
    cache = filled(tmp_path, Source())
    cache.lookup(0, torch.arange(20))
    before = cache._mapped[0, 0]
    cache.lookup(0, torch.arange(8))
    assert cache._mapped[0, 0] is before
    assert isinstance(before, np.memmap)
    assert (before.dtype, len(before)) == (targets.record_dtype(cache.k or 0), 8)
    cache.lookup(1, torch.arange(8))
    assert set(cache._mapped) == {(1, 0)}


MIXED = {"augmentation": KEY["augmentation"].replace("0.0}", "0.8}")}
DIFFERENCES: list[tuple[dict[str, str], dict[str, float], str]] = [
    ({"seed": "1"}, {}, "seed 0, not 1"),
    ({"data": "full:" + "a" * 60 + "bbbb"}, {}, "data ...aaaaaaaaaaaa, not ...aaaaaaaabbbb"),
    ({"data": "ends:" + "b" * 64}, {}, "data full:" + "a" * 27 + "..., not ends:" + "b" * 27 + "..."),
    (MIXED, {}, 'augmentation ...xup": 0.0}, not ...xup": 0.8}'),
    ({"teacher": "ab12"}, {}, "teacher none, not ab12"),
    ({"seed": "1", "teacher": "ab12"}, {"mass": 0.99}, "seed 0, not 1, teacher none, not ab12, mass 0.9, not 0.99"),
    ({}, {"images": 21}, "images 20, not 21"),
    ({}, {"classes": 7}, "classes 6, not 7"),
    ({}, {"temperature": 4}, "temperature 2.0, not 4.0"),
]


@pytest.mark.parametrize(("key", "sizes", "said"), DIFFERENCES)
def test_a_cache_of_something_else_says_what_differs(
    tmp_path: Path, key: dict[str, str], sizes: dict[str, Any], said: str
) -> None:
    filled(tmp_path, Source(), epochs=1)
    with pytest.raises(StoreError) as refused:
        opened(tmp_path, {**KEY, **key}, **sizes)
    assert str(refused.value) == f"{tmp_path}: its targets have {said}; give another folder"


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"not a cache of targets \(no index.json\); give another folder"):
        opened(tmp_path)
    with pytest.raises(StoreError, match="cannot be read as a folder"):
        opened(tmp_path / "thesis.tex")
    assert opened(tmp_path / "new").k is None  # and nothing is written yet
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_more_classes_than_a_uint16_numbers_are_refused(tmp_path: Path) -> None:
    opened(tmp_path, classes=65_536)
    with pytest.raises(StoreError, match="65537 classes, a record numbers at most 65536; train with the live teacher"):
        opened(tmp_path, classes=65_537)


def edited(text: str, **changed: Any) -> str:
    content = {**json.loads(text), **changed}
    return json.dumps({**content, "digest": store.content_digest(content)})


INDEX_DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "edited": (lambda text: text.replace('"k": ', '"k": 1'), r"index.json: edited or damaged; restore it .* or delete"),
    "truncated": (lambda text: text[: len(text) // 2], "not an index of targets .*; delete the folder to begin again"),
    "foreign": (lambda text: "[]", "not an index of targets .*; delete the folder"),
    "newer": (lambda text: edited(text, format="slim-targets/2"), "'slim-targets/2' is not 'slim-targets/1'; use the"),
    "more": (lambda text: edited(text, more=1), "use the slim that wrote it"),
}


@pytest.mark.parametrize(("damage", "said"), INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[str], str], said: str) -> None:
    filled(tmp_path, Source(), epochs=1)
    path = tmp_path / "index.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(StoreError, match=said):
        opened(tmp_path)


SHARD_DAMAGE: dict[str, Callable[[Path], bytes]] = {
    "cut": lambda path: path.read_bytes()[:-4],
    "empty": lambda path: b"",
    "one bit": lambda path: path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]),
    "of another epoch": lambda path: path.with_name("00001-00001.bin").read_bytes(),
    "of another cache": lambda path: (path.parents[1] / "other" / path.name).read_bytes(),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE.values(), ids=SHARD_DAMAGE)
def test_a_damaged_shard_is_named_and_can_be_computed_again(
    tmp_path: Path, shards_of_8: None, damage: Callable[[Path], bytes]
) -> None:
    folder, source = tmp_path / "cache", Source()
    path = folder / "00000-00001.bin"
    expected = everything(filled(folder, source))
    filled(tmp_path / "other", source, key={**KEY, "seed": "1"})
    path.write_bytes(damage(path))
    cache = opened(folder)
    cache.lookup(0, torch.arange(8))  # another shard
    said = rf"^{path}: truncated, edited or of another cache; delete it, the next fill computes it again$"
    with pytest.raises(StoreError, match=said):
        cache.lookup(0, torch.tensor([9]))
    with pytest.raises(StoreError, match=said):
        filled(folder, source)
    path.unlink()
    assert torch.equal(everything(filled(folder, source)), expected)


def test_what_is_not_there_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no targets yet; fill the cache first"):
        opened(tmp_path).lookup(0, torch.arange(3))
    with pytest.raises(StoreError, match=r"00002-00000.bin: no such file; fill the cache for 3 epochs first"):
        filled(tmp_path, Source()).lookup(2, torch.arange(3))


@pytest.mark.parametrize(("views", "said"), [(19, "19 views for 20 positions"), (21, "more views than the 20 positi")])
def test_there_are_as_many_views_as_positions(tmp_path: Path, views: int, said: str) -> None:
    source, cache = Source(), opened(tmp_path)
    with pytest.raises(StoreError, match=f"epoch 0, positions 0 to 19: {said}"):
        cache.fill(1, lambda epoch, _: source.views(epoch, range(views)), source.teacher, progress=no_progress)
    assert list(tmp_path.glob("*.bin")) == []


def test_a_teacher_of_other_classes_or_without_finite_output_is_refused(tmp_path: Path) -> None:
    source, cache = Source(), opened(tmp_path)
    with pytest.raises(PassError, match=r"the teacher gave \(3, 5\), not \(3, 6\); give a teacher with the student's"):
        cache.fill(1, source.views, lambda images: torch.zeros(len(images), 5), progress=no_progress)
    with pytest.raises(PassError, match="the teacher's output is not finite; run it in fp32"):
        cache.fill(1, source.views, lambda images: source.teacher(images) / 0, progress=no_progress)
    assert cache.k is None


def test_a_good_cache_passes_the_check_whatever_the_batch(tmp_path: Path, shards_of_8: None) -> None:
    cache, other = filled(tmp_path, Source()), Source(batch=7)
    said = cache.check(1000, 0, 2, other.views, other.teacher)
    assert said["records"] == 40
    assert sorted(other.asked) == [(epoch, position) for epoch in range(2) for position in range(20)]
    assert said["index_mismatch"] == 0
    assert 0 < said["max_abs_error"] <= 2**-12  # half the distance of float16 numbers just below 1
    exact = [retained(other.logits(epoch, range(20)), TEMPERATURE)[:, (cache.k or 0) - 1] for epoch in range(2)]
    assert said["mass"] == pytest.approx(float(torch.cat(exact).mean()), abs=2**-11)


def test_the_sample_is_drawn_by_its_seed_from_what_is_stored(tmp_path: Path, shards_of_8: None) -> None:
    cache = filled(tmp_path, Source())
    (tmp_path / "00000-00001.bin").unlink()
    drawn = []
    for sample, seed in ((9, 0), (9, 0), (9, 1), (1000, 0)):
        source = Source()
        cache.check(sample, seed, 2, source.views, source.teacher)
        drawn.append(source.asked)
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(set(part)) for part in drawn] == [9, 9, 9, 32]
    assert not {(0, position) for position in range(8, 16)} & set(drawn[3])
    with pytest.raises(StoreError, match="no targets of 1 epochs to check; fill the cache first"):
        opened(tmp_path / "new").check(9, 0, 1, source.views, source.teacher)


def test_one_shard_of_another_teacher_is_found_and_so_are_other_views(tmp_path: Path, shards_of_8: None) -> None:
    source, other = Source(), Source(seed=5)
    filled(tmp_path, source)
    (tmp_path / "00001-00001.bin").unlink()
    cache = filled(tmp_path, other)
    assert cache.check(1000, 0, 1, source.views, source.teacher)["records"] == 20
    said = r"epoch 1, position (8|9|1\d): stored is class \d with .*, beyond rounding; fill another folder"
    with pytest.raises(StoreError, match=said):
        cache.check(1000, 0, 2, source.views, source.teacher)
    with pytest.raises(StoreError, match="beyond rounding"):
        cache.check(1000, 0, 1, Source(shift=0.5).views, source.teacher)


def test_a_teacher_in_bf16_passes_the_check(tmp_path: Path) -> None:
    cache, source = filled(tmp_path, Source()), Source()
    weight = source.weight.bfloat16()
    said = cache.check(1000, 0, 2, source.views, lambda images: images.flatten(1).bfloat16() @ weight)
    assert said["max_abs_error"] > 2**-11  # there was something to tolerate


def test_the_views_of_real_training_batches_are_found_by_their_positions(tmp_path: Path) -> None:
    data = open_data("digits", limit_train=100)
    preprocessing = Preprocessing(size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0, interpolation="bilinear")
    augment, weight = Augment(mixup=0.5, erase=0.5), random(3 * 32 * 32, 10) / math.sqrt(1000)

    def teacher(images: Tensor) -> Tensor:
        return images.flatten(1) @ weight

    def views(epoch: int, positions: Sequence[int]) -> Iterator[Tensor]:
        batches = data.views(preprocessing, augment, positions, seed=3, epoch=epoch, batch_size=32, num_classes=10)
        return (batch.images for batch in batches)

    cache = Targets.open(tmp_path, KEY, images=100, classes=10, temperature=1.0, mass=1.0)
    cache.fill(2, views, teacher, progress=no_progress)
    for epoch in range(2):
        for batch in data.train_batches(preprocessing, augment, seed=3, epoch=epoch, batch_size=40, num_classes=10):
            live = torch.softmax(teacher(batch.images), 1)
            # float16 twice, as above; 2^-20 is above what ten FLOORs add.
            torch.testing.assert_close(cache.lookup(batch.epoch, batch.positions).exp(), live, rtol=2**-10, atol=2**-20)
    assert cache.check(64, 0, 2, views, teacher)["records"] == 64
