from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from timm.models.byobnet import RepVggBlock
from timm.models.levit import Levit
from torch import Tensor, nn

from slim.artifact import Preprocessing, state_digest
from slim.errors import ParityError, SlimError, StoreError, UsageError
from slim.export import onnx as exporter
from slim.export.ladder import SCRIPT_OPSET, copied
from slim.export.onnx import OPSET, OnnxFile, Port, export_onnx
from slim.export.parity import parity
from slim.export.target import Target

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Preprocessing(size=(3, 16, 24))
UNFUSED = "dynamo, attention not fused"
is_tracing: Callable[[], bool] = cast(Any, torch.jit).is_tracing


class Plain(nn.Module):
    """Lists and sequences of modules in one another, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        stage = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.stem = nn.Conv2d(3, 8, 3)
        self.stages = nn.ModuleList([nn.Sequential(stage, nn.GELU()), nn.Sequential(nn.Conv2d(8, 8, 1))])
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        features = self.act(self.stem(image))
        for stage in self.stages:
            features = self.act(stage(features))
        return self.head(features.mean((2, 3)))  # type: ignore[no-any-return]


class Guarded(Plain):
    """Looks at its images, which torch.export cannot do; and keeps what it made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forward(self, image: Tensor) -> Tensor:
        if torch.isnan(image).any():
            raise ValueError("not an image")
        self.cache["mean"] = image.mean()
        return super().forward(image)


class Windowed(nn.Module):
    """Attention in windows: queries of five dimensions, which torch.onnx does not translate while it is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)
        self.fused_attn = True

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.stem(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(1, (2, -1)).unflatten(-1, (3, 2, 4)).permute(3, 0, 4, 1, 2, 5)
        if self.fused_attn:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q / q.shape[-1] ** 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(mixed.mean((2, 3)).flatten(1))  # type: ignore[no-any-return]


class Lying(nn.Module):
    """Computes something else whenever one of `when` is true."""

    def __init__(self, *when: Callable[[], bool]) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 24, 5)
        self.when = when
        self.fused_attn = True

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(image.flatten(1))
        return logits * 2 if any(is_true() for is_true in self.when) else logits


ROUTES: dict[str, type[nn.Module]] = {"dynamo": Plain, UNFUSED: Windowed, "torchscript": Guarded}


def seeded(make: Callable[..., nn.Module], *given: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*given).eval()


def images(n: int = 5, size: tuple[int, ...] = SMALL.size) -> Tensor:
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(n))


def written(route: str, folder: Path) -> OnnxFile:
    return export_onnx(seeded(ROUTES[route]), folder / f"{ROUTES[route].__name__}.onnx", SMALL, images=images())


@dataclass(frozen=True)
class Both:
    model: nn.Module
    file: OnnxFile


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """A network for each route, and its file."""
    return {
        route: Both(seeded(make), written(route, tmp_path_factory.mktemp("route"))) for route, make in ROUTES.items()
    }


@pytest.fixture(params=ROUTES)
def taken(request: pytest.FixtureRequest, each: dict[str, Both]) -> Both:
    return each[request.param]


def test_each_route_is_taken_where_those_before_fail(each: dict[str, Both]) -> None:
    assert {route: both.file.route for route, both in each.items()} == {route: route for route in ROUTES}


def test_each_route_gives_the_same_kind_of_file(taken: Both) -> None:
    file, proto = taken.file, onnx.load(taken.file.path)
    onnx.checker.check_model(proto, full_check=True)
    asked = SCRIPT_OPSET if file.route == "torchscript" else OPSET
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", file.opset)] == [("", asked)]
    assert file.inputs == (Port("image", "float32", ("batch", 3, 16, 24)),)
    assert file.outputs == (Port("logits", "float32", ("batch", 5)),)
    assert os.listdir(file.path.parent) == [file.path.name]
    for trace in (
        sys.prefix,
        str(Path.cwd()),
        "site-packages",
        ".py",
        "stack_trace",
        __name__,
        type(taken.model).__name__,
    ):
        assert trace.encode() not in file.path.read_bytes(), trace
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_each_route_computes_what_the_network_computes_at_any_batch(taken: Both, batch: int) -> None:
    found = parity(taken.model, taken.file.path, images(batch), target=Target.parse("ort:cpu"))
    assert found.n == batch
    assert taken.file.parity is not None
    assert taken.file.parity.n == 5


def test_nodes_of_each_route_are_traced_back_to_modules(taken: Both) -> None:
    ops = {node.name: node.op_type for node in onnx.load(taken.file.path).graph.node}
    assert taken.file.scopes.keys() == ops.keys()
    assert set(taken.file.scopes.values()) <= set(dict(taken.model.named_modules()))

    def scopes(op: str) -> list[str]:
        return [taken.file.scopes[name] for name in ops if ops[name] == op]

    if isinstance(taken.model, Windowed):
        assert (scopes("Conv"), scopes("Gemm"), scopes("Softmax")) == (["stem"], ["head"], [""])
    else:  # the batch norm was folded into the convolution before it
        assert scopes("Conv") == ["stem", "stages.0.0.0", "stages.1.0"]
        assert scopes("Relu") == ["act"] * 3
        assert scopes("Gemm") == ["head"]
        assert set(scopes("Erf") + scopes("Gelu")) == {"stages.0.1"}


def test_each_route_gives_the_same_bytes_in_another_process(each: dict[str, Both], tmp_path: Path) -> None:
    # Not as the module it is here: names of classes and modules must not get into the file either.
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['write_each'](sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0, done.stderr
    for both in each.values():
        assert (tmp_path / both.file.path.name).read_bytes() == both.file.path.read_bytes()


def write_each(folder: str) -> None:
    torch.set_num_threads(1)
    for route in ROUTES:
        written(route, Path(folder))


def test_each_route_gives_the_same_bytes_again_and_leaves_the_network_as_it_was(
    each: dict[str, Both], tmp_path: Path
) -> None:
    for route, make in ROUTES.items():
        model = cast(Any, seeded(make)).train()
        before, gradients = state_digest(model.state_dict()), [value.requires_grad for value in model.parameters()]
        file = export_onnx(model, tmp_path / "model.onnx", SMALL, images=images())
        assert file.path.read_bytes() == each[route].file.path.read_bytes()
        assert all(module.training for module in model.modules())
        assert [value.requires_grad for value in model.parameters()] == gradients
        assert state_digest(model.state_dict()) == before
        assert getattr(model, "fused_attn", True) is True
        assert getattr(model, "cache", {}) == {}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_images_there_is_no_parity(tmp_path: Path) -> None:
    file = export_onnx(seeded(Lying, torch.compiler.is_exporting), tmp_path / "model.onnx", SMALL)
    assert (file.route, file.parity) == ("dynamo", None)


def test_a_file_that_computes_something_else_is_a_reason_to_go_on(tmp_path: Path) -> None:
    model = seeded(Lying, torch.compiler.is_exporting)
    file = export_onnx(model, tmp_path / "model.onnx", SMALL, images=images())
    assert file.route == "torchscript"
    assert parity(model, file.path, images(), target=Target.parse("ort:cpu")).n == 5


def test_where_all_files_compute_something_else_the_old_one_stays_and_each_is_told_of(tmp_path: Path) -> None:
    model, path = cast(Any, seeded(Lying, torch.compiler.is_exporting, is_tracing)), tmp_path / "model.onnx"
    path.write_bytes(b"the file of yesterday")
    wrong = re.escape(f"parity: {path} differs from torch by ") + "[^:]*"
    each = "; ".join(f"{route}: {wrong}" for route in ROUTES)
    with pytest.raises(ParityError, match=f"^export: Lying cannot be written as ONNX: {each}; make") as caught:
        export_onnx(model, path, SMALL, images=images())
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"the file of yesterday"
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert model.fused_attn is True


def test_only_a_last_failure_of_parity_is_one_of_parity(tmp_path: Path) -> None:
    class Refusing(Lying):
        def forward(self, image: Tensor) -> Tensor:
            if is_tracing():
                raise ValueError("not while tracing")
            return super().forward(image)

    with pytest.raises(
        SlimError, match=r"dynamo: parity: .*; torchscript: ValueError: not while tracing; make"
    ) as caught:
        export_onnx(seeded(Refusing, torch.compiler.is_exporting), tmp_path / "model.onnx", SMALL, images=images())
    assert type(caught.value) is SlimError


def test_a_network_that_is_broken_itself_is_not_traced_another_way(tmp_path: Path) -> None:
    model = seeded(Plain)
    with torch.no_grad():
        cast(Any, model).head.bias.fill_(float("nan"))
    with pytest.raises(ParityError, match=r"not finite") as caught:
        export_onnx(model, tmp_path / "model.onnx", SMALL, images=images())
    assert "torchscript" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_images_of_another_size_are_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match=re.escape(f"{path}: input 'image' is ")):
        export_onnx(seeded(Plain), path, SMALL, images=images(size=(3, 16, 16)))
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_replaced_is_named_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.mkdir()
    with pytest.raises(StoreError, match=rf"^{re.escape(str(path))}: cannot be written: Is a directory"):
        export_onnx(seeded(Plain), path, SMALL, images=images())
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_trace_that_hangs_on_the_values_or_the_batch_is_not_taken(tmp_path: Path) -> None:
    class Branching(Guarded):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image if image.sum() > 0 else -image)

    class Counting(Guarded):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) * len(image.tolist())

    for make in (Branching, Counting):
        with pytest.raises(SlimError, match="torchscript: another batch of other images leaves another trace"):
            export_onnx(seeded(make), tmp_path / "model.onnx", SMALL)
    assert os.listdir(tmp_path) == []


def test_another_opset_than_torchscript_was_asked_for_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "SCRIPT_OPSET", 19)
    with pytest.raises(SlimError, match=f"Guarded came out with opset {SCRIPT_OPSET}, asked was 19; this torch"):
        export_onnx(seeded(Guarded), tmp_path / "model.onnx", SMALL, images=images())
    assert os.listdir(tmp_path) == []


def test_branches_are_merged_before_tracing(tmp_path: Path) -> None:
    def make() -> nn.Module:
        blocks = (RepVggBlock(3, 8, stride=2), RepVggBlock(8, 8))
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    model = seeded(make).train()
    model(images())  # statistics, so that there is something to merge
    before, keys = state_digest(model.state_dict()), list(model.state_dict())
    random = torch.get_rng_state()
    file = export_onnx(model, tmp_path / "model.onnx", SMALL, images=images())
    assert (file.route, file.branches) == ("dynamo", "merged")
    # Of two blocks with a 3x3, a 1x1 and, the second, an identity: one convolution each.
    ops = [node.op_type for node in onnx.load(file.path).graph.node]
    assert (ops.count("Conv"), ops.count("BatchNormalization"), ops.count("Add")) == (2, 0, 0)
    assert {"0.reparam_conv", "1.reparam_conv"} <= set(file.scopes.values())
    assert (state_digest(model.state_dict()), list(model.state_dict())) == (before, keys)
    assert all(value.requires_grad for value in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)

    # What timm did not make, as after a low-rank pass, is left and told; the rest is merged.
    cast(Any, model)[0].conv_1x1.conv = nn.Sequential(nn.Conv2d(3, 2, 1, stride=2, bias=False), nn.Conv2d(2, 8, 1))
    file = export_onnx(model, tmp_path / "model.onnx", SMALL, images=images())
    assert file.branches.startswith("merged, but for 1: 0: AttributeError: 'Sequential' object has no attribute")
    assert {"0.conv_kxk.conv", "0.conv_1x1.conv.1", "1.reparam_conv"} <= set(file.scopes.values())
    assert file.parity is not None


def test_branches_that_timm_merges_wrongly_are_left(tmp_path: Path) -> None:
    class Wrong(nn.ReLU):
        def fuse(self) -> nn.Module:
            return nn.Conv2d(8, 8, 1)

    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 8), Wrong(), nn.Flatten(), nn.LazyLinear(5)))
    model(images())
    file = export_onnx(model, tmp_path / "model.onnx", SMALL)
    assert file.branches == "merged by timm the network computes something else"
    assert isinstance(cast(Any, model)[1], Wrong)
    assert parity(model, file.path, images(), target=Target.parse("ort:cpu")).n == 5


def test_a_network_that_cannot_be_copied_since_it_ran_is_merged_too(tmp_path: Path) -> None:
    """LeViT keeps the biases of its attention while it runs: with gradients these are tensors that autograd made."""
    small = {"embed_dim": (16, 32), "key_dim": 8, "depth": (1, 1), "num_heads": (1, 2)}
    levit = seeded(lambda: Levit(64, num_classes=5, **small))
    given = images(3, (3, 64, 64))
    expected = levit(given)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(levit)

    def cached() -> list[Tensor]:
        caches = [getattr(module, "attention_bias_cache", {}) for module in levit.modules()]
        return [value for cache in caches for value in cache.values()]

    kept = cached()
    assert all(value.grad_fn is not None for value in kept)
    assert torch.equal(copied(levit)(given), expected)
    file = export_onnx(levit, tmp_path / "model.onnx", Preprocessing(size=(3, 64, 64)), images=given)
    assert (file.route, file.branches) == ("dynamo", "merged")
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(file.path).graph.node)
    assert kept
    assert [*map(id, cached())] == [*map(id, kept)]
    assert torch.equal(levit(given), expected)
