"""Artifacts on disk: whatever was changed, cut or forged after saving is found, and nothing good is ever lost."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from slim import store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.errors import BackboneError, StoreError
from slim.passes.low_rank import LowRank
from tests.contract.zoo import BLIND, CLASSES, SIZE, WIDE, artifact, backbone

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def made() -> Artifact:
    return replace(
        LowRank(ratio=0.5, align=2, min_width=WIDE, **BLIND)(artifact("convnext")), labels=tuple("abcdefghij")
    )


@pytest.fixture
def folder(made: Artifact, tmp_path: Path) -> Path:
    return store.save(made, tmp_path / "saved")


def edit(folder: Path, change: Edit, *, forge: bool = False) -> None:
    """Change slim.json; `forge` writes the digest anew, as a newer slim or a careful hand would."""
    path = folder / store.MANIFEST
    content = json.loads(path.read_text())
    change(content)
    if forge:
        content["digest"] = store.content_digest(content)
    path.write_text(json.dumps(content))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(StoreError, match=match) as caught:
        store.load(folder, trust=True)
    assert "\n" not in str(caught.value)


def test_it_comes_back_whole(made: Artifact, folder: Path) -> None:
    loaded = store.load(folder)
    assert (loaded.digest, loaded.weights) == (made.digest, made.weights)
    assert (loaded.backbone, loaded.history, loaded.labels) == (made.backbone, made.history, made.labels)
    assert sorted(path.name for path in folder.iterdir()) == ["slim.json", "weights.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


EDITS: dict[str, Edit] = {
    "plan": lambda m: m["history"][0]["plan"]["layers"]["stages.0.blocks.0.mlp.fc1"].update(rank=4),
    "config": lambda m: m["history"][0]["config"].update(ratio=0.6),
    "seed": lambda m: m["history"][0].update(seed=1),
    "metrics": lambda m: m["history"][0]["metrics"].update(loss=0.1),
    "guard": lambda m: m["history"][0].update(guard=False),
    "label": lambda m: m["labels"].reverse(),
    "preprocessing": lambda m: m["backbone"]["input"].update(crop=0.9),
    "step removed": lambda m: m["history"].clear(),
    "unknown key": lambda m: m.update(more=1),
    "digest removed": lambda m: m.pop("digest"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_found(name: str, folder: Path) -> None:
    edit(folder, EDITS[name])
    refused(folder, r"slim.json: digest \w{12} is not the recorded \w+; the file was edited after saving, restore it")


FORGED: dict[str, tuple[Edit, str]] = {
    "unknown key": (lambda m: m.update(more=1), "slim.json: more: Extra inputs are not permitted; use the slim that"),
    "unknown key of a step": (lambda m: m["history"][0].update(more=1), "slim.json: history.0.more: Extra inputs are"),
    "missing key": (lambda m: m.pop("history"), "slim.json: history: Field required"),
    "other format": (
        lambda m: m.update(format="slim/2"),
        "slim.json: format 'slim/2' is not 'slim/1'; use the slim that",
    ),
    "unknown pass": (
        lambda m: m["history"][0].update(name="low-rnk"),
        "slim.json: pass 'low-rnk' is unknown; did you mean 'low-rank'?",
    ),
    "import path as a pass": (lambda m: m["history"][0].update(name="os:system"), "pass 'os:system' is unknown"),
    "setting out of range": (
        lambda m: m["history"][0]["config"].update(energy=1.5),
        "convnext_atto: step 1 'low-rank' cannot be applied again .*energy.*; use the versions that it names",
    ),
    "layer that is not there": (
        lambda m: m["history"][0]["plan"]["layers"].update({"stages.9": {"rank": 4}}),
        "convnext_atto: step 1 'low-rank' cannot be applied again .*; use the versions that it names",
    ),
    "other rank": (
        lambda m: m["history"][0]["plan"]["layers"]["stages.0.blocks.0.mlp.fc1"].update(rank=4),
        "the history does not rebuild the network .*mlp.fc1.0.weight.*; use the versions that it names",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_manifest_that_cannot_be_is_refused_even_with_a_right_digest(name: str, folder: Path) -> None:
    change, match = FORGED[name]
    edit(folder, change, forge=True)
    refused(folder, match)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '"slim/1"', "{}", "\xff"], ids=repr)
def test_a_manifest_that_is_no_manifest(text: str, folder: Path) -> None:
    (folder / "slim.json").write_bytes(text.encode("latin-1"))
    refused(folder, "slim.json: not an artifact's slim.json .*; restore the file from a copy")


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "nothing: holds no slim.json; an artifact is a folder with slim.json and weights")
    (folder / "weights.safetensors").rename(tmp_path / "elsewhere")
    refused(folder, "weights.safetensors: no such file")
    (folder / "slim.json").unlink()
    refused(folder, "saved: holds no slim.json")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_weights(kept: int, folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, r"weights.safetensors: not a whole safetensors file \(.*\); copy it again")


@pytest.mark.parametrize("place", [-1, -1000])
def test_one_flipped_bit_of_the_weights(place: int, folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    refused(folder, r"weights.safetensors: digest \w{12} is not \w{12} of slim.json; the weights were changed after")


def test_weights_of_another_artifact(folder: Path) -> None:
    other = artifact("convnext")
    safetensors.torch.save_file(dict(other.state), folder / "weights.safetensors")
    refused(folder, "the weights were changed after saving, restore both files from one copy")


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "was run"
    pickle.loads(pickle.dumps(Payload(proof))).close()
    assert proof.exists()  # so it would show
    proof.unlink()
    torch.save({"head.weight": torch.zeros(1), "payload": Payload(proof)}, folder / "weights.safetensors")
    refused(folder, "weights.safetensors: not a whole safetensors file")
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Payload(proof)))
    refused(folder, "weights.safetensors: not a whole safetensors file")
    assert not proof.exists()


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained", "cache_dir"])
def test_a_backbone_cannot_have_other_files_read(argument: str, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({}, other)
    edit(folder, lambda m: m["backbone"]["kwargs"].update({argument: str(other)}), forge=True)
    with pytest.raises(BackboneError, match=f"argument '{argument}' is no part of a network; use --weights"):
        store.load(folder)


def test_nothing_outside_the_folder_is_read(folder: Path) -> None:
    store.load(folder)  # so that whatever timm and the passes import is there
    opened, watching = [], True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            opened.append(Path(os.fsdecode(arguments[0])))

    sys.addaudithook(watch)
    try:
        store.load(folder)
    finally:
        watching = False
    # The weights are opened by safetensors itself, which Python does not see.
    assert opened == [folder / "slim.json"]


def test_a_factory_is_run_only_with_trust(tmp_path: Path) -> None:
    folder = store.save(artifact("mixer"), tmp_path / "saved")
    with pytest.raises(BackboneError, match=r"mlp_mixer:MlpMixer' runs code of yours .*add --trust if you"):
        store.load(folder)
    assert store.load(folder, trust=True).model()(torch.zeros(1, *SIZE)).shape == (1, CLASSES)


def test_a_factory_without_trust_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rascal.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackboneError, match="add --trust"):
        Backbone(name="rascal:net", num_classes=2).build()
    assert not (tmp_path / "was run").exists()
    with pytest.raises(BackboneError, match=r"'rascal:net' cannot be imported: .*no attribute 'net'; check --model"):
        Backbone(name="rascal:net", num_classes=2).build(trust=True)
    assert (tmp_path / "was run").exists()


def test_tied_values_stay_tied(tmp_path: Path) -> None:
    chosen = Backbone(name="tests.contract.zoo:tied", num_classes=CLASSES, input=Preprocessing(size=SIZE))
    made = Artifact.of(chosen.build(trust=True), chosen, trust=True)
    loaded = store.load(store.save(made, tmp_path / "saved"), trust=True)
    assert loaded.digest == made.digest
    model: Any = loaded.model()
    assert model.first.weight is model.second.weight
    assert torch.equal(model.first.weight, made.state["second.weight"])


def test_values_of_any_layout_and_type_survive(tmp_path: Path) -> None:
    chosen = backbone("convnext")
    model = chosen.build()
    model.to(memory_format=torch.channels_last)
    head = model.get_parameter("head.fc.weight")
    head.data = torch.randn(head.shape[1], head.shape[0]).t()  # not contiguous
    made = Artifact.of(model, chosen)
    loaded = store.load(store.save(made, tmp_path / "saved"))
    assert loaded.digest == made.digest
    assert torch.equal(loaded.state["head.fc.weight"], head)

    counted = backbone("resnet")  # its batch norms count in int64, in tensors without a dimension
    made = Artifact.of(counted.build(), counted)
    loaded = store.load(store.save(made, tmp_path / "counted"))
    assert loaded.weights == made.weights
    assert loaded.state["bn1.num_batches_tracked"].dtype == torch.int64


def test_an_older_artifact_is_replaced_and_anything_else_is_not(folder: Path, tmp_path: Path) -> None:
    other = artifact("vit")
    store.save(other, folder)
    assert store.load(folder).digest == other.digest
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    photos = tmp_path / "photos"
    photos.mkdir()
    store.save(other, photos)
    for path in photos.iterdir():
        path.unlink()
    (photos / "only.jpg").write_text("precious")
    with pytest.raises(StoreError, match=r"photos: exists and is not an artifact \(no slim.json\); choose another"):
        store.save(other, photos)
    with pytest.raises(StoreError, match=r"only\.jpg: exists and is not an artifact"):
        store.save(other, photos / "only.jpg")
    assert (photos / "only.jpg").read_text() == "precious"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["error", "Ctrl-C"]
)
@pytest.mark.parametrize("failing", [1, 2], ids=["first rename", "second rename"])
def test_a_rename_that_fails_leaves_the_old_folder(
    failing: int, error: BaseException, made: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = Path.rename, 0

    def broken(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    expected = StoreError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        store.save(artifact("vit"), folder)
    if expected is StoreError:
        assert str(raised.value) == f"{folder}: cannot be written: No space left on device; nothing was replaced"
    assert store.load(folder).digest == made.digest
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from slim import store
from slim.errors import StoreError

root = Path(sys.argv[1])
small, large = store.load(root / "small"), store.load(root / "large")
# Larger than slim.json and the small weights, smaller than the large ones; Python ignores the signal and sees EFBIG.
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for place in ("old", "new"):
    try:
        store.save(large, root / place)
    except StoreError as error:
        print(error)
try:
    store.write_bytes(root / "file", bytes(400_000))
except StoreError as error:
    print(error)
store.save(small, root / "new")
print(sorted(str(path.relative_to(root)) for path in root.rglob("*")))
print(store.load(root / "old").digest == small.digest, (root / "file").read_text())
"""


def test_a_full_disk_leaves_what_was_there(made: Artifact, tmp_path: Path) -> None:
    for place in ("small", "old"):
        store.save(made, tmp_path / place)
    store.save(artifact("mobilenet"), tmp_path / "large")
    (tmp_path / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *errors, tree, state = done.stdout.splitlines()
    assert errors == [
        f"{tmp_path / name}: cannot be written: File too large; nothing was replaced" for name in ("old", "new", "file")
    ]
    folders = ("large", "new", "old", "small")
    names = [f"{place}{file}" for place in folders for file in ("", "/slim.json", "/weights.safetensors")]
    assert tree == str(["file", *names])
    assert state == "True old"
