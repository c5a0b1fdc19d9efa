"""The cache of targets: files that are filled, resumed, read, checked and refused."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slim import store
from slim.artifact import Preprocessing
from slim.contract import no_progress
from slim.data import Augment, open_data
from slim.errors import PassError, StoreError
from slim.passes.distill import targets
from slim.passes.distill.records import log_probs, retained, top_k
from slim.passes.distill.targets import Targets, bytes_needed, index_in

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


TWO_PROCESSES = """
import sys
import torch
from slim import distributed
from slim.contract import no_progress
from slim.passes.distill import targets
rank, folder = distributed.rank(), sys.argv[1]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
targets.SHARD = 8
cache = targets.Targets.open(folder + "/cache", {}, images=20, classes=6, temperature=1.0, mass=0.9)
asked = []
def views(epoch, positions):
    asked.append((epoch, *positions))
    yield torch.zeros(len(positions), 1)
cache.fill(1, views, lambda images: images + torch.arange(6) * rank * 50, progress=no_progress, rank=rank, world=2)
distributed.wait()
cache.lookup(0, torch.arange(20))
print(cache.k, len(asked))
"""


def test_of_two_processes_rank_0_chooses_k_for_both(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    # Rank 0: once to choose k, and shards 0 and 2; rank 1: shard 1.
    assert [said for said, _ in ended] == ["6 3\n", "6 1\n"]


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
    assert json.loads((tmp_path / "first" / "index.json").read_text())["reached"] == pytest.approx(
        float(share[cache.k - 1]), rel=1e-9
    )


def test_the_bytes_are_what_was_announced(tmp_path: Path, shards_of_8: None) -> None:
    cache = filled(tmp_path, Source())
    assert cache.k is not None
    size = sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert cache.size_bytes(2) == bytes_needed(20, 2, cache.k, shard=8) == size
    # 1 281 167 images, 300 epochs, 10 classes of 4 bytes, and 20 digests of 32 an epoch.
    assert bytes_needed(1_281_167, 300, 10) == 300 * (1_281_167 * 40 + 20 * 32)
    assert opened(tmp_path / "new").size_bytes(1) == bytes_needed(20, 1, CLASSES, shard=8)


def test_a_shard_is_mapped_once_and_only_so_many_at_a_time(
    tmp_path: Path, shards_of_8: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "OPEN", 3)
    filled(tmp_path, Source())
    cache = opened(tmp_path)
    first = cache.lookup(0, torch.arange(20))
    for path in tmp_path.glob("00000-*.bin"):
        path.unlink()  # what is mapped stays readable
    assert torch.equal(cache.lookup(0, torch.arange(20)), first)
    cache.lookup(1, torch.arange(20))
    with pytest.raises(StoreError, match=r"00000-00000\.bin: no such file"):
        cache.lookup(0, torch.arange(20))


def test_as_many_shards_are_mapped_as_there_are_and_none_holds_a_file_open(tmp_path: Path, shards_of_8: None) -> None:
    cache = filled(tmp_path, Source())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest number that is free
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, limit[1]))
    try:
        everything(cache)  # six shards
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_the_index_of_a_folder_is_read_whatever_its_key(tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache", Source())
    index = index_in(tmp_path / "cache")
    assert index is not None
    assert index.k == cache.k
    assert index_in(tmp_path) is index_in(tmp_path / "new") is None


MIXED = {"augmentation": KEY["augmentation"].replace("0.0}", "0.8}")}
DIFFERENCES: list[tuple[dict[str, str], dict[str, float], str]] = [
    ({"seed": "1"}, {}, "seed 0, not 1"),
    ({"data": "full:" + "a" * 60 + "bbbb"}, {}, "data aaaaaaaaaaaa, not aaaaaaaabbbb"),
    ({"data": "ends:" + "b" * 64}, {}, "data full:" + "a" * 19 + ", not ends:" + "b" * 19),
    (MIXED, {}, 'augmentation xup": 0.0}, not xup": 0.8}'),
    ({"teacher": "ab12"}, {}, "teacher none, not ab12"),
    ({"seed": "1", "teacher": "ab12"}, {"mass": 0.99}, "mass 0.9, not 0.99, seed 0, not 1, teacher none, not ab12"),
    ({}, {"images": 21}, "positions 20, not 21"),
    ({}, {"classes": 7}, "outputs 6, not 7"),
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
    with pytest.raises(StoreError, match=r"thesis\.tex: exists and is not a cache of targets"):
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


UNREAD = "index.json: not an index that this slim reads; use the slim that wrote it, or delete the folder"
INDEX_DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "edited": (lambda text: text.replace('"k": ', '"k": 1'), r"index.json: edited or damaged; restore it .* or delete"),
    "truncated": (lambda text: text[: len(text) // 2], UNREAD),
    "foreign": (lambda text: "[]", UNREAD),
    "newer": (lambda text: edited(text, format="slim-targets/2"), UNREAD),
    "more": (lambda text: edited(text, more=1), UNREAD),
}


@pytest.mark.parametrize(("damage", "said"), INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[str], str], said: str) -> None:
    filled(tmp_path, Source(), epochs=1)
    path = tmp_path / "index.json"
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
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


@pytest.mark.parametrize(("views", "said"), [(19, "19 views for 20 positions"), (21, "21 views for 20 positions")])
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


def test_the_sample_is_drawn_by_its_seed_from_all_views(tmp_path: Path, shards_of_8: None) -> None:
    cache = filled(tmp_path / "cache", Source())
    drawn = []
    for sample, seed in ((9, 0), (9, 0), (9, 1), (1000, 0)):
        source = Source()
        cache.check(sample, seed, 2, source.views, source.teacher)
        drawn.append(source.asked)
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(set(part)) for part in drawn] == [9, 9, 9, 40]
    assert {epoch for epoch, _ in drawn[0]} == {0, 1}
    with pytest.raises(StoreError, match=r"00002-0000[0-2]\.bin: no such file; fill the cache for 3 epochs first"):
        cache.check(1000, 0, 3, source.views, source.teacher)
    with pytest.raises(StoreError, match="holds no targets yet; fill the cache first"):
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
