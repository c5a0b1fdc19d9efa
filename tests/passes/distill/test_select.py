"""Which images of a pool are chosen, which are known from validation, and the list that `--unlabeled` reads."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from slim import store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.data import open_data
from slim.errors import DataError, PassError
from slim.loaders import eval_transform
from slim.passes.distill import duplicates
from slim.passes.distill.duplicates import Prints, hamming, hashes, near, repeated
from slim.passes.distill.select import Judged, Rule, pool_of, select, surest

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Preprocessing(size=(3, 32, 32), crop=1.0)
CLASSES = ("a", "b", "c")


def scene(seed: int) -> Image.Image:
    """48x40 of slow colours: such as a photograph has, and no two alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)


def write(root: Path, **images: Image.Image) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(root / f"{name}.png")
    return root


def artifact(labels: tuple[str, ...] | None = CLASSES, seed: int = 0) -> Artifact:
    backbone = Backbone(name="test_resnet", num_classes=3, input=SMALL)
    model = backbone.build(seed=seed)
    head: Any = model.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        head.weight.normal_(std=10.0, generator=torch.Generator().manual_seed(seed))  # else one class gets all images
        head.bias.zero_()
    return Artifact.of(model, backbone, labels=labels)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/` with 12 validation images, `teacher/`, and `pool/`: 60 of its own, and copies of what there is."""
    place = tmp_path_factory.mktemp("select")
    for number, name in enumerate(CLASSES):
        for split, first in (("train", 1000), ("val", 2000)):
            images = {f"{i}": scene(first + 4 * number + i) for i in range(4)}
            write(place / "data" / split / name, **images)
    pool = write(place / "pool" / "deep", **{f"{i:02d}": scene(i) for i in range(60)})
    scene(2000).save(pool / "jpeg.jpg", quality=50)
    scene(2003).resize((96, 80), Image.Resampling.BICUBIC).save(pool / "large.png")
    scene(2006).resize((24, 20), Image.Resampling.LANCZOS).save(pool / "little.webp", lossless=True)
    ImageOps.mirror(scene(2011)).save(pool / "mirrored.png")
    scene(7).save(pool.parent / "again.bmp")  # of deep/07.png, and before it
    (pool / "broken.jpg").write_bytes(b"none")
    store.save(artifact(), place / "teacher")
    return place


@pytest.fixture(scope="module")
def chosen(place: Path, call: Any) -> tuple[Path, Any]:
    """The list of the pool, and what the command said."""
    out = place / "pool.jsonl"
    said = call(*words(place, out), "--json", "--quiet")
    assert said.code == 0, said.err
    return out, said


def words(place: Path, out: Path, **changed: object) -> list[object]:
    options = {
        "pool": place / "pool",
        "teacher": place / "teacher",
        "data": f"folder:{place / 'data'}",
        "per_class": 15,
        "out": out,
        **changed,
    }
    return ["select-unlabeled", *(w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", value))]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What a near-duplicate is


def test_hamming_is_the_distance_of_imagehash_to_the_nearer_of_image_and_mirror_image() -> None:
    ours, theirs = [scene(i) for i in range(5)], [scene(i) for i in range(3, 9)]
    both = torch.stack([hashes(image) for image in ours]), torch.stack([hashes(image) for image in theirs])
    assert both[0].shape == (5, 2, 8)
    expected = [
        [min(imagehash.phash(seen) - imagehash.phash(b) for seen in (a, ImageOps.mirror(a))) for b in theirs]
        for a in ours
    ]
    assert hamming(*both).tolist() == expected
    assert expected[3][0] == expected[4][1] == 0


def prints(bits: int, cosine: float) -> Prints:
    """One image whose hash has so many bits set, whichever way round, at this cosine to (1, 0)."""
    word = (1 << bits) - 1
    embedding = torch.tensor([[cosine, (1 - cosine**2) ** 0.5]], dtype=torch.float64).float()
    return Prints(torch.tensor(list(word.to_bytes(8, "big")), dtype=torch.uint8).expand(1, 2, 8), embedding)


@pytest.mark.parametrize(
    ("bits", "cosine", "expected"),
    [
        (0, -1.0, True),
        (5, -1.0, True),  # up to half of the bits, the hash decides
        (6, 0.89, False),
        (6, 0.91, True),
        (10, 0.91, True),
        (11, 1.0, False),  # beyond, no embedding helps
        (64, 1.0, False),
    ],
)
def test_hashes_decide_alone_up_to_half_of_the_bits_and_together_with_embeddings_up_to_all(
    bits: int, cosine: float, expected: bool
) -> None:
    assert near(prints(bits, cosine), prints(0, 1.0), max_hamming=10, min_cosine=0.9).tolist() == [expected]


def test_every_known_image_is_compared_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "CHUNK", 2)
    known = [prints(bits, 1.0) for bits in (20, 30, 40, 50, 60)]
    joined = Prints(torch.cat([one.hashes for one in known]), torch.cat([one.embeddings for one in known]))
    for one in known:
        assert near(one, joined, max_hamming=0, min_cosine=1.0).all()
    assert not near(prints(10, 1.0), joined, max_hamming=9, min_cosine=-1.0).any()


def test_of_two_known_images_one_alike_in_hash_and_one_in_embedding_neither_is_a_duplicate() -> None:
    known = Prints(torch.cat([prints(0, 1.0).hashes, prints(40, 1.0).hashes]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert not near(prints(8, 1.0), known, max_hamming=10, min_cosine=0.9).any()


def test_an_image_repeats_any_before_it_that_was_kept() -> None:
    a, b, c = (torch.tensor(one) for one in ([1.0, 0.0], [0.8, 0.6], [0.28, 0.96]))  # cosines a.b = b.c = 0.8
    assert repeated([a, c, a, c], 0.9) == [False, False, True, True]
    assert repeated([a, b, c], 0.75) == [False, True, False]  # like b, which was not kept
    assert repeated([], 0.9) == []


def test_the_surest_of_each_class_come_first_and_of_equals_the_first_by_name() -> None:
    given = [("d", 1, 0.9), ("c", 0, 0.5), ("b", 0, 0.5), ("a", 0, 0.4), ("e", 0, 0.6)]
    judged = [Judged(i, name, number, sure, b"") for i, (name, number, sure) in enumerate(given)]
    assert [one.name for one in surest(judged, 2)] == ["e", "b", "d"]
    assert [one.name for one in surest(judged[::-1], 3)] == ["e", "b", "c", "d"]
    assert [one.name for one in surest(judged, 100)] == ["e", "b", "c", "a", "d"]


# What is chosen


def test_planted_copies_of_validation_images_are_out_and_the_others_are_counted(chosen: tuple[Path, Any]) -> None:
    header, *rows = lines(chosen[0])
    names = {row["path"] for row in rows}
    assert not names & {"deep/jpeg.jpg", "deep/large.png", "deep/little.webp", "deep/mirrored.png"}
    assert not names & {"deep/07.png", "deep/broken.jpg"}
    found = header["counts"]
    assert (found["pool"], found["unreadable"], found["near_duplicates"], found["repeated"]) == (66, 1, 4, 1)
    assert found["kept"] == len(rows)
    assert (header["root"], header["per_class"]) == ("pool", 15)
    assert (header["teacher"], header["data"]) == (
        artifact().digest,
        open_data(f"folder:{chosen[0].parent / 'data'}").id,
    )


def test_classes_and_probabilities_are_what_the_teacher_says_of_the_image_as_it_was_trained(
    chosen: tuple[Path, Any], place: Path
) -> None:
    _, *rows = lines(chosen[0])
    model, transform = artifact().model(), eval_transform(SMALL)
    images = torch.stack([transform(Image.open(place / "pool" / row["path"]).convert("RGB")) for row in rows])
    with torch.no_grad():
        expected, classes = model(images).double().softmax(1).max(1)
    assert [row["class"] for row in rows] == [CLASSES[i] for i in classes.tolist()]
    torch.testing.assert_close(torch.tensor([row["probability"] for row in rows]), expected.float())


def test_at_most_so_many_of_each_class_are_kept_the_surest_first(chosen: tuple[Path, Any], place: Path) -> None:
    _, *rows = lines(chosen[0])
    counts = Counter(row["class"] for row in rows)
    assert max(counts.values()) == 15
    assert rows == sorted(rows, key=lambda row: (row["class"], -row["probability"], row["path"]))
    short = json.loads(chosen[1].out)["short"]
    assert short == [[name, counts[name]] for name in CLASSES if counts[name] < 15]


def test_no_image_is_kept_within_the_radius_of_validation(place: Path, tmp_path: Path) -> None:
    data = open_data(f"folder:{place / 'data'}")
    known = [imagehash.phash(data.split("val").images.open(name)) for name in data.split("val").names]
    radius = 24  # so wide that some of the others fall into it
    rule = Rule(per_class=1000, max_hamming=radius, min_cosine=-1)
    found = select(pool_of(place / "pool", data), artifact(), data, rule, out=tmp_path / "l.jsonl")
    assert 0 < found.header.counts.kept < 60 - 10
    for one in found.chosen:
        image = Image.open(place / "pool" / one.path).convert("RGB")
        for seen in (image, ImageOps.mirror(image)):
            assert min(imagehash.phash(seen) - hash_ for hash_ in known) > radius


def test_the_same_list_is_written_twice(chosen: tuple[Path, Any], place: Path, call: Any) -> None:
    before = chosen[0].read_bytes()
    chosen[0].write_bytes(before[: before.index(b"\n", 1000)])
    said = call(*words(place, chosen[0]))  # what lies there is such a list, if not a whole one
    assert said.code == 0, said.err
    assert chosen[0].read_bytes() == before


def test_the_result_is_said_in_a_few_lines_and_unreadable_images_are_named(
    place: Path, tmp_path: Path, call: Any
) -> None:
    said = call(*words(place, tmp_path / "l.jsonl", per_class=1000))
    assert said.code == 0
    assert said.out.splitlines()[:3] == [
        "pool      66 images, 1 unreadable",
        "removed   4 near-duplicates of validation images, 1 copies",
        "kept      60, at most 1000 of each of 3 classes",
    ]
    assert said.out.splitlines()[3].startswith("short     3 classes have fewer, the fewest ")
    assert said.out.splitlines()[4] == f"list      {tmp_path / 'l.jsonl'}"
    assert f"{place / 'pool' / 'deep' / 'broken.jpg'}: skipped" in said.err
    assert lines(tmp_path / "l.jsonl")[0]["root"] == str(place / "pool")  # it does not lie beside the list


def test_where_the_teacher_knows_no_names_classes_are_numbers(place: Path, tmp_path: Path) -> None:
    data = open_data(f"folder:{place / 'data'}")
    found = select(pool_of(place / "pool", data), artifact(None), data, Rule(2), out=tmp_path / "l.jsonl")
    assert {one.name for one in found.chosen} <= {0, 1, 2}
    assert [name for name, _ in found.kept] == [0, 1, 2]


def test_a_teacher_that_says_no_number_is_refused(place: Path, tmp_path: Path) -> None:
    data, broken = open_data(f"folder:{place / 'data'}"), artifact()
    for value in broken.state.values():
        value.fill_(torch.nan if value.is_floating_point() else 0)
    with pytest.raises(PassError, match=r"^select-unlabeled: what the teacher says of .*val/a/0\.png is no number; "):
        select(pool_of(place / "pool", data), broken, data, Rule(2), out=tmp_path / "l.jsonl")


def test_the_defaults_in_the_help_are_those_of_the_rule(call: Any) -> None:
    said = " ".join(call("select-unlabeled", "--help").out.split())
    rule = Rule(per_class=1)
    assert f"half of them suffice alone. [default: {rule.max_hamming}]" in said
    assert f"bits differ. [default: {rule.min_cosine}]" in said


def test_real_copies_are_found_and_other_images_are_seldom_taken_for_them(data_dir: Path) -> None:
    images = []
    with tarfile.open(data_dir / "cifar10-jpeg.tar.xz") as tar:
        for member in tar:
            if member.isfile() and member.name.startswith("train/"):
                file = tar.extractfile(member)
                assert file
                images.append(Image.open(file).convert("RGB"))
            if len(images) == 300:  # all of one class: harder than any pool
                break
    val, others = images[:100], images[100:]

    def seen(images: list[Image.Image]) -> Prints:
        # Embeddings that know nothing: what is found and spared here does not hang on a network.
        return Prints(torch.stack([hashes(one) for one in images]), F.normalize(torch.ones(len(images), 4)))

    def found(images: list[Image.Image], **rule: Any) -> Tensor:
        return near(seen(images), seen(val), **{"max_hamming": 10, "min_cosine": 0.9, **rule}).float().mean()

    changes: list[Callable[[Image.Image], Image.Image]] = [
        lambda one: one.resize((64, 64), Image.Resampling.BICUBIC),
        lambda one: one.resize((24, 24), Image.Resampling.BICUBIC),
        ImageOps.mirror,
    ]
    for change in changes:
        assert found([change(one) for one in val]) == 1
    assert found([one.crop((1, 1, 31, 31)).resize((32, 32), Image.Resampling.BICUBIC) for one in val]) > 0.8
    assert found(others) < 0.05  # by hash alone, which is the worst an embedding can do
    assert found(others, max_hamming=4) < 0.02


# The list


def test_a_run_opens_the_list(chosen: tuple[Path, Any], place: Path, call: Any, tmp_path: Path) -> None:
    _, *rows = lines(chosen[0])
    split = open_data(f"folder:{place / 'data'}", unlabeled=str(chosen[0])).split("unlabeled")
    assert split.names == tuple(row["path"] for row in rows)
    assert set(split.labels) == {-1}
    assert split.images.open(split.names[0]).size == (48, 40)
    # fmt: off
    line = ("--model", "test_resnet", "--weights", "none", "--input-size", "32", "--data", f"folder:{place / 'data'}")
    # fmt: on
    said = call("run", *line, "--unlabeled", chosen[0], "--dry-run", "finetune", "export")
    assert f"{len(rows)} unlabeled" in said.out, said.err


def test_the_fingerprint_covers_the_images_listed_and_no_others(place: Path, tmp_path: Path) -> None:
    pool = write(tmp_path / "pool", **{f"{i}": scene(i) for i in range(3)})
    listed = write_lines(tmp_path, ["0.png", "1.png"])

    def fingerprint() -> str | None:
        return open_data(f"folder:{place / 'data'}", unlabeled=str(listed)).unlabeled_id

    before = fingerprint()
    write(pool, **{"2": scene(50), "3": scene(51)})
    assert fingerprint() == before
    write(pool, **{"1": scene(52)})
    assert fingerprint() != before


HEADER: dict[str, Any] = {
    "format": "slim-unlabeled/1", "root": "pool", "teacher": "t", "data": "d", "per_class": 9, "max_hamming": 10,
    "min_cosine": 0.9,
    "counts": {"pool": 9, "unreadable": 0, "near_duplicates": 0, "repeated": 0, "kept": 2},
}  # fmt: skip


def write_lines(folder: Path, paths: list[str], **header: object) -> Path:
    counts = {**HEADER["counts"], "kept": len(paths)}
    rows = [{"path": path, "class": "a", "probability": 0.5} for path in paths]
    text = "".join(json.dumps(row) + "\n" for row in ({**HEADER, "counts": counts, **header}, *rows))
    (folder / "l.jsonl").write_text(text)
    return folder / "l.jsonl"


ROW = '{"path": "0.png", "class": "a", "probability": 0.5}'


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is no list of images; give a folder of images ("),
        ("[1, 2]\n", "is no list of images; "),
        ('{"format": "slim-unlabeled/2"}\n', "line 1: format: "),
        (json.dumps({**HEADER, "per_class": 0}) + "\n", "line 1: per_class: "),
        (json.dumps(HEADER)[:-5] + "\n", "line 1: Invalid JSON"),
        (f"{json.dumps(HEADER)}\n{ROW}\n", "lists 1 images, its first line says 2; write it again"),
        (f"{json.dumps(HEADER)}\n{ROW}\n{ROW[:20]}\n", "line 3: Invalid JSON"),
        (f"{json.dumps(HEADER)}\n{ROW}\n\n", "line 3: Invalid JSON"),
        (f"{json.dumps(HEADER)}\n{ROW}\n{ROW}\n", "line 3: '0.png' was listed before; "),
        (f"{json.dumps(HEADER)}\n{ROW.replace('0.5', '1.5')}\n{ROW}\n", "line 2: probability: "),
        (f"{json.dumps(HEADER)}\n{ROW.replace('path', 'place')}\n{ROW}\n", "line 2: path: "),
    ],
)
def test_a_damaged_list_is_an_error_that_names_the_line(tmp_path: Path, text: str, error: str) -> None:
    write(tmp_path / "pool", **{"0": scene(0)})
    (tmp_path / "l.jsonl").write_text(text)
    with pytest.raises(DataError) as raised:
        open_data("digits", unlabeled=str(tmp_path / "l.jsonl"))
    assert str(raised.value).startswith(f"--unlabeled {tmp_path / 'l.jsonl'}: {error}")


def test_a_file_of_another_kind_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\xff\x00" * 1000)
    with pytest.raises(DataError, match=r"a\.tar: is no list of images; give a folder of images \("):
        open_data("digits", unlabeled=str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("../secret.png", "'../secret.png' leaves the pool; "),
        ("deep/../../secret.png", "'deep/../../secret.png' leaves the pool; "),
        ("{}/secret.png", "leaves the pool; paths are relative to it"),
        ("", "'' leaves the pool; "),
        ("link.png", "'link.png' is a link that leaves the pool "),
        ("linked/secret.png", "'linked/secret.png' is a link that leaves the pool "),
        ("gone.png", "pool/gone.png: No such file or directory; put it back, or write it again"),
        ("deep", "pool/deep is no file; "),
    ],
)
def test_no_list_leads_out_of_its_pool(tmp_path: Path, path: str, error: str) -> None:
    write(tmp_path, secret=scene(0))
    write(tmp_path / "out", secret=scene(0))
    pool = write(tmp_path / "pool", **{"0": scene(1)})
    (pool / "deep").mkdir()
    (pool / "link.png").symlink_to(tmp_path / "secret.png")
    (pool / "linked").symlink_to(tmp_path / "out")
    listed = write_lines(tmp_path, ["0.png", path.format(tmp_path)])
    with pytest.raises(DataError) as raised:
        open_data("digits", unlabeled=str(listed))
    assert error in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_links_within_the_pool_are_followed(tmp_path: Path) -> None:
    pool = write(tmp_path / "pool", **{"0": scene(1)})
    (pool / "1.png").symlink_to("0.png")
    listed = write_lines(tmp_path, ["0.png", "1.png"])
    assert len(open_data("digits", unlabeled=str(listed)).split("unlabeled")) == 2


def test_a_list_of_nothing_or_without_its_pool_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"l\.jsonl: no image in it; "):
        open_data("digits", unlabeled=str(write_lines(tmp_path, [])))
    with pytest.raises(DataError, match=r"its pool .*gone is no folder here; put it back, or "):
        open_data("digits", unlabeled=str(write_lines(tmp_path, ["0.png"], root="gone")))


# What cannot work


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"per_class": 0}, "--per-class 0: must be at least 1; raise it"),
        ({"max_hamming": 65}, "--max-hamming 65: a hash has 64 bits; give 0 to 64"),
        ({"min_cosine": 1.5}, "--min-cosine 1.5: a cosine is in [-1, 1]; give one"),
        ({"min_cosine": "nan"}, "--min-cosine nan: a cosine is in [-1, 1]; give one"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1; raise it"),
        ({"teacher": "no/such"}, "--teacher no/such: no such folder; give a run, an artifact or a timm name"),
        ({"teacher": "stage"}, "--teacher stage: there is no stage here; give a run, an artifact or a timm name"),
        ({"pool": "/no/such"}, "--pool /no/such: no such folder; give a folder of plain images"),
        ({"data": "folder:/no/such"}, "data folder:/no/such: there is no '/no/such'; "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_said_in_one_line(
    place: Path, tmp_path: Path, call: Any, changed: dict[str, Any], error: str
) -> None:
    said = call(*words(place, tmp_path / "l.jsonl", **changed))
    assert said.code == 2
    assert said.error.startswith(error)
    assert not list(tmp_path.iterdir())


def test_a_pool_without_an_image_or_of_validation_images_alone_or_that_leads_out_of_itself_is_refused(
    place: Path, tmp_path: Path, call: Any
) -> None:
    empty, linked = tmp_path / "empty", write(tmp_path / "linked", **{"0": scene(0)})
    empty.mkdir()
    (linked / "1.png").symlink_to(place / "pool" / "again.bmp")
    for pool, error in (
        (empty, f"--pool {empty}: no image in it; give a folder of images ("),
        (place / "data" / "val" / "a", f"--pool {place}/data/val/a: holds validation images of folder:"),
        (linked, f"--pool {linked}: '1.png' is a link that leaves the pool"),
    ):
        said = call(*words(place, tmp_path / "l.jsonl", pool=pool))
        assert (said.code, said.error.startswith(error)) == (2, True), said.err


def test_where_nothing_is_left_the_counts_are_said(place: Path, tmp_path: Path, call: Any) -> None:
    pool = write(tmp_path / "pool", copy=scene(2000))
    said = call(*words(place, tmp_path / "l.jsonl", pool=pool))
    assert said.code == 2
    assert "nothing is left of 1 images: 0 unreadable, 1 near-duplicates of validation images; " in said.error
    assert not (tmp_path / "l.jsonl").exists()


def test_nothing_else_is_overwritten(place: Path, tmp_path: Path, call: Any) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"my": "notes"}\n')
    for out, error in (
        (mine, "exists and is no list of images; choose another place"),
        (tmp_path, "exists and is no list of images; choose another place"),
        (tmp_path / "no" / "l.jsonl", f"there is no folder {tmp_path / 'no'}; make it"),
    ):
        said = call(*words(place, out))
        assert (said.code, said.error) == (2, f"--out {out}: {error}")
    assert mine.read_text() == '{"my": "notes"}\n'


@pytest.mark.skipif(os.name != "posix", reason="file names are text here")
def test_a_name_that_no_list_can_hold_is_refused(place: Path, tmp_path: Path, call: Any) -> None:
    pool = write(tmp_path / "pool", **{"0": scene(0)})
    (pool / "0.png").rename(os.fsdecode(os.fsencode(pool) + b"/\xff.png"))
    said = call(*words(place, tmp_path / "l.jsonl", pool=pool))
    assert (said.code, "is not UTF-8" in said.error) == (2, True), said.err
