"""`slim explain`: what it says of layers and passes, its picture, and the command on a run and on an artifact."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from slim import console, store
from slim.artifact import Artifact, Step
from slim.bench import layers_chart
from slim.bench.decisions import SENTENCES, Decision, decisions
from slim.bench.explain import LayerRow, layers
from slim.contract import Fed
from slim.passes import PASSES
from slim.passes.low_rank import LowRank
from tests.contract import zoo

pytestmark = pytest.mark.usefixtures("one_thread")
HOSTILE = "<script>alert(1)</script>\"'& {{ 7 * 7 }}\x00\x1b"


@pytest.fixture(scope="module")
def low_rank() -> tuple[Artifact, Artifact]:
    """A network before and after."""
    before = zoo.artifact("resnet")
    return before, LowRank(**zoo.BLIND, min_width=zoo.WIDE, ratio=0.5, skip=("layer1.*",))(before)


def fed(artifact: Artifact) -> Fed:
    return Fed(artifact.model(), artifact.backbone.input)


def step(name: str, plan: dict[str, Any]) -> Step:
    return Step(name=name, version=1, config={}, plan=plan, seed=0)


def told(name: str, plan: dict[str, Any], layer: str) -> tuple[str, bool] | None:
    found = [*decisions([step(name, plan)], layer)]
    assert all(one.name == name for one in found)
    return (found[0].text, found[0].changes) if found else None


def group(makes: list[str], reads: list[str], width: int, kept: int, **more: Any) -> dict[str, Any]:
    given = {"kind": "channels", "unit": 1, "units": f"0-{kept - 1}", "lost": 0.0123, "internal": True, **more}
    return {"width": width, "kept": kept, "layers": {"makes": makes, "reads": reads}, **given}


# Sentences


def test_every_sentence_belongs_to_a_pass() -> None:
    assert SENTENCES.keys() <= PASSES.keys()


def test_elastic_tells_what_there_is_to_choose_from_and_what_it_left() -> None:
    layers = {"makes": ["fc1"], "reads": ["fc2"]}
    dims = {
        "fc1": {"kind": "channels", "unit": 2, "choices": [32, 16], "layers": layers},
        "attn.qkv:heads": {"kind": "heads", "unit": 16, "choices": [3, 2], "layers": {"makes": ["attn.qkv"]}},
    }
    ranks = {name: {"choices": [0, 16, 8]} for name in ("fc1", "fc3")}
    plan: dict[str, Any] = {"dims": dims, "left": {"stem": "classifier"}, "ranks": {}}
    assert told("elastic", plan, "fc1") == ("64, 32 outputs to choose from", False)
    assert told("elastic", plan, "attn.qkv") == ("3, 2 heads to choose from", False)
    assert told("elastic", plan, "stem") == ("left, classifier", False)
    assert told("elastic", plan, "fc2") is None
    plan |= {"ranks": ranks}
    assert told("elastic", plan, "fc1") == ("64, 32 outputs; whole or rank 16, 8 to choose from", False)
    assert told("elastic", plan, "fc3") == ("whole or rank 16, 8 to choose from", False)


def test_subnet_tells_widths_and_blocks_that_are_left_out() -> None:
    given = group(["a"], ["b"], 64, 32)
    del given["lost"]
    plan = {"groups": {"a": given}, "skipped": ["layer1.1"], "ranks": {"b": 8, "c": 16}}
    assert told("subnet", plan, "a") == ("64 -> 32 outputs", True)
    assert told("subnet", plan, "b") == ("64 -> 32 inputs, two layers of rank 8", True)
    assert told("subnet", plan, "c") == ("two layers of rank 16", True)
    assert told("subnet", plan, "layer1.1.conv2") == ("its block is left out", True)
    assert told("subnet", plan, "layer1.10.conv2") is None


def test_prune_tells_outputs_and_inputs_heads_and_what_it_left() -> None:
    plan = {
        "groups": {
            "a": group(["a", "bn"], ["b"], 64, 32),
            "b": group(["b"], ["c"], 128, 96),
            "c": group(["c"], ["d"], 16, 16),
            "at.qkv:heads": group(["at.qkv"], ["at.proj"], 192, 128, kind="heads", unit=64),
            "bt.qkv:dims": group(["bt.qkv"], ["bt.proj"], 192, 96, kind="dims", unit=3),
        },
        "left": {"e": "classifier", "ct.qkv:heads": "its queries, keys and values differ in width"},
    }
    assert told("prune", plan, "a") == ("64 -> 32 outputs (1.2 % lost)", True)
    assert told("prune", plan, "b") == ("128 -> 96 outputs (1.2 % lost), 64 -> 32 inputs", True)
    assert told("prune", plan, "c") == ("128 -> 96 inputs", True)
    assert told("prune", plan, "d") == ("all 16 inputs stay", False)
    assert told("prune", plan, "at.qkv") == ("3 -> 2 heads (1.2 % lost)", True)
    assert told("prune", plan, "bt.proj") == ("64 -> 32 dims of a head", True)
    assert told("prune", plan, "e") == ("left, classifier", False)
    assert told("prune", plan, "ct.qkv") == ("left, its queries, keys and values differ in width", False)
    assert told("prune", plan, "f") is None


def test_sparsify_tells_what_it_trains_towards_and_changes_nothing() -> None:
    plan = {"groups": {"a": group(["a"], ["b"], 64, 32), "b": group(["b"], [], 8, 8)}, "target": "0.5x-macs"}
    assert told("sparsify", plan, "a") == ("trained towards 64 -> 32 outputs (1.2 % lost)", False)
    assert told("sparsify", {**plan, "groups": {"b": plan["groups"]["b"]}}, "b") is None  # type: ignore[index]


def test_low_rank_tells_rank_loss_and_time_and_why_a_layer_is_left() -> None:
    chosen = {"scheme": "channel", "rank": 16, "full": 64, "break_even": 32.0, "loss": 0.0312}
    timed = {**chosen, "scheme": "spatial", "dense_ms": 0.3141, "ms": 0.2}
    first = {"scheme": "channel", "rank": 8, "full": 64, "break_even": 32.0}  # of version 1
    plan = {"layers": {"a": chosen, "b": timed, "c": first}, "dense": {"d": "classifier"}}
    assert told("low-rank", plan, "a") == ("rank 16 of 64, 3.1 % lost", True)
    assert told("low-rank", plan, "b") == ("rank 16 of 64, spatial, 3.1 % lost, 0.314 -> 0.200 ms", True)
    assert told("low-rank", plan, "c") == ("rank 8 of 64", True)
    assert told("low-rank", plan, "d") == ("left, classifier", False)
    assert told("low-rank", plan, "e") is None


def test_merge_tells_norms_scales_and_pairs_also_of_what_low_rank_made() -> None:
    plan = {
        "reparameterized": False,
        "norms": {"a": "bn", "p.1": "bn2"},
        "scales": {"a": "ls"},
        "pairs": {"b": "c", "q.0": "q.1"},
        "left": {"bn3": "what it reads is not what one layer put out"},
    }
    assert told("merge", plan, "a") == ("norm bn folded in, scale ls folded in", False)
    assert told("merge", plan, "p") == ("norm bn2 folded in", False)
    assert told("merge", plan, "b") == ("one layer with c", True)
    assert told("merge", plan, "c") == ("one layer with b", True)
    assert told("merge", plan, "q") == ("one layer again", True)
    assert told("merge", plan, "bn3") is None


def test_mask_tells_its_pattern_and_what_it_left() -> None:
    plan = {"layers": {"a": {"pattern": "2:4", "kept": 0.5}}, "left": {"b": "depthwise"}, "sparse": ["a.weight"]}
    assert told("mask", plan, "a") == ("2:4 zeros, 50 % stay", True)
    assert told("mask", plan, "b") == ("left, depthwise", False)


def test_passes_that_decide_nothing_by_layer_add_no_sentence() -> None:
    assert told("finetune", {}, "a") is None


def row(**given: Any) -> LayerRow:
    values: dict[str, Any] = {"name": "a", "type": "Linear", "before": (8, 8), "after": ((8, 4),), "macs": 64}
    return LayerRow(**(values | {"weights_before": 64, "weights_after": 32} | given))


def test_a_layer_is_of_the_last_kind_that_changed_it_and_reasons_to_leave_it_are_told_only_where_none_did() -> None:
    left = Decision(name="low-rank", text="left, in skip", changes=False)
    cut, zeros = Decision(name="prune", text="cut", changes=True), Decision(name="mask", text="zeros", changes=True)
    assert row(decisions=(left, cut, zeros)).kind == "mask"
    assert row(decisions=(left, cut, zeros)).why == "prune: cut; mask: zeros"
    assert (row(decisions=(left, left)).kind, row(decisions=(left, left)).why) == (
        "untouched",
        "low-rank: left, in skip",
    )
    assert (row().kind, row().why, row().kept) == ("untouched", "", 0.5)


# Rows


def test_rows_have_the_layers_before_and_what_is_left_of_them(low_rank: tuple[Artifact, Artifact]) -> None:
    before, after = low_rank
    rows = {one.name: one for one in layers(after, fed(before), valued=True)}
    state = after.state
    plan: Any = after.history[0].plan
    assert plan["layers"]
    for name, one in rows.items():
        assert one.before == tuple(before.state[f"{name}.weight"].shape)
        if name in plan["layers"]:
            assert one.after == tuple(tuple(state[f"{name}.{part}.weight"].shape) for part in (0, 1))
            assert one.kind == "low-rank"
            assert one.kept < 1
        else:
            assert one.after == (one.before,)
            assert (one.kind, one.kept) == ("untouched", 1)
        assert one.why.startswith("low-rank: ")
    assert rows["layer1.0.conv2"].why == "low-rank: left, in skip"
    assert list(rows) == [key.removesuffix(".weight") for key, value in before.state.items() if value.ndim > 1]


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit"])
def test_macs_of_the_layers_are_those_that_are_counted(name: str) -> None:
    artifact = zoo.artifact(name)
    found = sum(one.macs for one in layers(artifact, fed(artifact), valued=True))
    # Attention multiplies queries with keys and weights with values, for which no layer is there: 2 blocks of
    # 3 heads, 17 tokens, 16 dims, twice.
    attention = 2 * 2 * 3 * 17 * 17 * 16 if name == "vit" else 0
    assert found + attention == artifact.costs["macs"]


def test_macs_are_those_of_the_size_that_the_network_before_compression_was_fed() -> None:
    before = zoo.artifact("resnet")
    smaller = before.backbone.input.model_copy(update={"size": (3, 16, 16)})
    after = replace(before, backbone=before.backbone.model_copy(update={"input": smaller}))
    assert (
        sum(one.macs for one in layers(after, fed(before), valued=True)) == before.costs["macs"] > after.costs["macs"]
    )


def test_kernels_are_measured_as_they_were_or_as_they_are(low_rank: tuple[Artifact, Artifact]) -> None:
    before, after = low_rank
    factored: Any = after.history[0].plan["layers"]
    known = {one.name: one for one in layers(after, fed(before), valued=True)}
    assert all(one.sparsity is not None and one.orthogonality is not None for one in known.values())
    for one in known.values():
        assert (one.entropy is not None) == (one.before[2:] in ((3, 3), (7, 7)))
        assert (one.entropy_ratio is not None) == (one.before[2:] == (3, 3) and one.before[0] * one.before[1] >= 64)
    # Fresh values, as those of the zoo are, have the variety of random ones: the fit is off by 2 %, sd 1 %.
    ratios = [one.entropy_ratio for one in known.values() if one.entropy_ratio is not None]
    assert len(ratios) > 3
    assert all(0.95 < ratio < 1.05 for ratio in ratios)
    fresh = Fed(before.backbone.build(), before.backbone.input)
    unknown = {one.name: one for one in layers(after, fresh, valued=False)}
    for name, one in unknown.items():
        assert (one.sparsity is None) == (name in factored)
    # Layers that were left have their values still, so both ways say the same.
    assert unknown["fc"] == known["fc"]


def test_a_layer_that_became_part_of_another_has_nothing_in_its_place() -> None:
    artifact = zoo.artifact("resnet")
    dense = artifact.model()
    dense.add_module("more", torch.nn.Linear(4, 4))
    found = {one.name: one for one in layers(artifact, Fed(dense, artifact.backbone.input), valued=True)}["more"]
    assert (found.after, found.kept, found.macs) == ((), 0, 0)


# The picture


def drawn(rows: list[LayerRow], title: str = "net", note: str = "kernels") -> ElementTree.Element:
    return ElementTree.fromstring(layers_chart.to_svg(rows, title, note))


def test_texts_from_files_stay_texts() -> None:
    decision = Decision(name="low-rank", text=HOSTILE, changes=False)
    tree = drawn([row(name=HOSTILE, decisions=(decision,))], HOSTILE, HOSTILE)
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert tags == {"svg", "title", "style", "rect", "text", "path", "g"}
    assert HOSTILE[:-2] in "".join(tree.itertext())


@pytest.mark.parametrize("count", [1, 5, 150])
def test_every_layer_has_a_row_of_its_own_within_the_picture(count: int) -> None:
    rows = [
        row(
            name=f"stages.{number // 9}.blocks.{number // 3}.fc{number}",
            weights_before=100 * number + 100,
            weights_after=50 * number,
            sparsity=number / count,
            entropy_ratio=2 * number / count,
        )
        for number in range(count)
    ]
    found = layers_chart.picture(rows, "net", "kernels")
    middles = [bar.y for bar in found.bars]
    assert [bar.name for bar in found.bars] == [one.name for one in rows]
    assert all(after - before >= layers_chart.ROW for before, after in pairwise(middles))
    assert middles[0] > layers_chart.TOP
    assert middles[-1] < found.height
    scales = layers_chart.TRACK
    for one, bar in zip(rows, found.bars, strict=True):
        assert bar.kept / bar.whole == pytest.approx(one.kept)
        assert bar.whole <= layers_chart.BAR
        assert found.bars_at + bar.whole < min(found.dots_at.values())
        assert all(dot.left <= dot.at <= dot.left + scales for dot in bar.dots)
        assert [dot.beyond for dot in bar.dots] == [False, (one.entropy_ratio or 0) >= 1]
    assert max(found.dots_at.values()) + scales < found.why_at < found.width


def test_what_is_not_known_is_not_drawn() -> None:
    (bar,) = layers_chart.picture([row()], "net", "kernels").bars
    assert bar.dots == []


def test_a_long_name_keeps_its_end_and_a_long_decision_its_beginning() -> None:
    decision = Decision(name="prune", text="x" * 200, changes=True)
    (bar,) = layers_chart.picture([row(name="a." * 40 + "fc1", decisions=(decision,))], "net", "kernels").bars
    assert (len(bar.name), bar.name[-3:]) == (layers_chart.LONGEST, "fc1")
    assert (len(bar.why), bar.why[:9]) == (layers_chart.WORDS, "prune: xx")
    assert "x" * 200 in bar.title


# The command


def test_an_artifact_alone_is_explained_with_the_kernels_it_has(
    call: Any, low_rank: tuple[Artifact, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.stdout, "width", 200)  # no sentence is wrapped
    folder = store.save(low_rank[1], tmp_path / "artifact")
    said = call("explain", folder, "--trust")
    assert (said.code, said.err) == (0, "")
    assert "layer1.0.conv2" in said.out
    assert "low-rank: left, in skip" in said.out
    *_, kernels, picture = said.out.splitlines()
    assert kernels == "kernels   as they are now: those before are not at hand"
    assert picture == f"picture   {folder / 'layers.svg'}"
    assert ElementTree.parse(folder / "layers.svg").getroot().tag.endswith("svg")
    assert call("show", folder, "--trust").code == 0  # the picture does not disturb the artifact


def test_a_run_is_explained_with_the_kernels_before_compression(call: Any, finished: Any, tmp_path: Path) -> None:
    root, _ = finished
    out = tmp_path / "picture.svg"
    found = json.loads(call("explain", "--json", root, "--out", out).out)
    assert (found["kernels"], found["picture"]) == ("as before compression", str(out))
    rows = [
        LayerRow.model_validate({k: v for k, v in one.items() if k not in ("kept", "kind")}) for one in found["layers"]
    ]
    trained = store.load(root / "steps" / "01-finetune")
    assert rows == layers(store.load(root / "final"), fed(trained), valued=True)
    assert [one["kind"] for one in found["layers"]] == [one.kind for one in rows]
    assert "low-rank" in {one.kind for one in rows}
    # A step that was not the last one is explained as well, and a run without compression has nothing before it.
    again = call("explain", "--json", root / "steps" / "02-low-rank", "--out", out)
    assert json.loads(again.out)["layers"] == found["layers"]
    first = json.loads(call("explain", "--json", root / "steps" / "01-finetune", "--out", out).out)
    assert {one["kind"] for one in first["layers"]} == {"untouched"}
    assert [one["sparsity"] for one in first["layers"]] == [one["sparsity"] for one in found["layers"]]


def test_what_a_run_began_with_is_opened_again(call: Any, finished: Any, tiny: tuple[str, ...], tmp_path: Path) -> None:
    root, _ = finished
    out, weights = tmp_path / "run", root / "steps" / "01-finetune" / store.WEIGHTS
    line = [*tiny[: tiny.index("--weights")], "--weights", weights, *tiny[tiny.index("--data") :], "--no-guard"]
    moved = Path(shutil.copy(weights, tmp_path))
    line[line.index(weights)] = moved
    assert call("run", "--quiet", *line, "--out", out, "low-rank", "--ratio", "0.2", "--repair", "none").code == 0
    found = json.loads(call("explain", "--json", out).out)
    assert found["kernels"] == "as before compression"
    assert all(one["sparsity"] is not None for one in found["layers"])
    assert (out / "layers.svg").is_file()
    moved.unlink()
    assert json.loads(call("explain", "--json", out).out)["kernels"].startswith("as they are now")


def test_what_cannot_be_explained_is_one_line(call: Any, finished: Any, tmp_path: Path) -> None:
    root, _ = finished
    said = call("explain", tmp_path / "no")
    assert (said.code, said.error) == (2, f"{tmp_path / 'no'}: no such folder; give a run or an artifact")
    assert call("explain", tmp_path).code == 1
    said = call("explain", root, "--out", tmp_path / "picture.png")
    assert (said.code, said.error) == (2, f"--out {tmp_path / 'picture.png'}: the picture is an .svg file; name it so")
    said = call("explain", root, "--out", tmp_path / "none" / "picture.svg")
    assert said.code == 1
    assert "cannot be written" in said.error
