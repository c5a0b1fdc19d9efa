from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from slim.artifact import Preprocessing
from slim.errors import ParityError, SlimError, StoreError, UsageError
from slim.export.onnx import export_onnx
from slim.export.parity import GATES, TOLERANCE, cosine, logits, open_session, parity
from slim.export.target import Target

TARGET = Target.parse("ort:cpu")
SMALL = Preprocessing(size=(3, 8, 8))


def network(seed: int = 0, *, bias: Sequence[float] | None = None) -> nn.Sequential:
    """A small convolutional network; with `bias` its logits are that, whatever the image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    if bias is not None:
        with torch.no_grad():
            model[-1].weight.zero_()
            model[-1].bias.copy_(torch.tensor(bias))
    return model


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module], Path]:
    folder = tmp_path_factory.mktemp("parity")

    def save_(model: nn.Module) -> Path:
        return export_onnx(model, folder / f"{len(list(folder.iterdir()))}.onnx", SMALL).path

    return save_


@pytest.fixture(scope="module")
def true_file(save: Callable[[nn.Module], Path]) -> Path:
    return save(network())


def test_a_true_export_differs_by_rounding_only(true_file: Path) -> None:
    found = parity(network(), true_file, images(70), target=TARGET)  # more images than one call takes
    assert (found.metric, found.n, found.target) == ("parity_max_abs", 70, str(TARGET))
    assert found.details["top1_agreement"] == 100
    assert found.details["gate"] == {"relative": TOLERANCE, "cosine": 0.9999, "agreement": 100.0}
    assert found.details["cosine"] == pytest.approx(1, abs=1e-9)
    assert 0 <= found.details["mean_abs"] <= found.value
    # The logits are of order 0.1 to 1 after three layers: rounding stays well below a hundredth of the tolerance.
    assert 0 <= found.details["relative"] < TOLERANCE / 100
    assert found.value < 1e-6


def test_the_figure_is_the_largest_difference(save: Callable[[nn.Module], Path]) -> None:
    file = save(network(bias=[1.0, 0.5, 0.25]))
    found = parity(network(bias=[1.0, 0.5, 0.25 + 2**-15]), file, images(3), target=TARGET)
    assert found.value == 2**-15  # every number here is exact in float32
    assert found.details["relative"] == 2**-15


def test_the_file_of_another_network_is_caught(true_file: Path) -> None:
    with pytest.raises(
        ParityError,
        match=r"differs from torch by .* at most on 8 images \(largest difference as a share of the largest logit",
    ) as caught:
        parity(network(seed=1), true_file, images(8), target=TARGET)
    assert caught.value.exit_code == 6
    assert str(true_file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_wrong_weight_is_caught(true_file: Path) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 0.01
    with pytest.raises(ParityError, match="computes something else"):
        parity(model, true_file, images(8), target=TARGET)


def test_another_winner_among_two_all_but_equal_classes_is_rounding(save: Callable[[nn.Module], Path]) -> None:
    file = save(network(bias=[1.0, 1.0 + 1e-6, 0.0]))
    found = parity(network(bias=[1.0 + 1e-6, 1.0, 0.0]), file, images(4), target=TARGET)
    assert found.details["top1_agreement"] == 0


def test_another_winner_of_a_clear_decision_is_caught_below_the_tolerance(save: Callable[[nn.Module], Path]) -> None:
    # Both logits move by 0.8e-4, within the tolerance of 1e-4, yet they swap places across a margin of 1.4e-4.
    file = save(network(bias=[1.00006, 1.00008, 0.0]))
    with pytest.raises(ParityError, match=r"on 4 images \(agreement in top-1 in percent 0, at least 100\)"):
        parity(network(bias=[1.00014, 1.0, 0.0]), file, images(4), target=TARGET)


def test_a_network_that_is_not_finite_is_named_as_the_broken_side(true_file: Path) -> None:
    with pytest.raises(ParityError, match="Sequential itself gives 6 of 6 logits that are not finite"):
        parity(network(bias=[float("nan")] * 3), true_file, images(2), target=TARGET)


def test_a_file_that_is_not_finite_is_named_as_the_broken_side(save: Callable[[nn.Module], Path]) -> None:
    file = save(network(bias=[float("inf"), 0.0, 0.0]))
    with pytest.raises(ParityError, match=r"\.onnx: the runtime gives 2 of 6 logits that are not finite"):
        parity(network(), file, images(2), target=TARGET)


def test_the_network_is_left_in_training(true_file: Path) -> None:
    model = network().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    parity(model, true_file, images(2), target=TARGET)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 8, 9), (2, 1, 8, 8), (3, 8, 8)])
def test_images_that_do_not_fit_are_a_usage_error(true_file: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"input 'image' is float32 \(batch, 3, 8, 8\), the images are"):
        parity(network(), true_file, torch.zeros(shape), target=TARGET)


def test_a_fixed_batch_is_filled_up(true_file: Path, tmp_path: Path) -> None:
    proto = onnx.load(true_file)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    fixed = tmp_path / "fixed.onnx"
    onnx.save(proto, fixed)
    free, four = (logits(open_session(path, TARGET), images(6), place="here") for path in (true_file, fixed))
    assert free.shape == four.shape == (6, 3)
    torch.testing.assert_close(four, free, atol=1e-6, rtol=0)


def test_a_file_that_is_missing_or_broken_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file; give an exported"):
        open_session(tmp_path / "none.onnx", TARGET)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(StoreError, match=r"broken\.onnx: ort:cpu cannot load it: .*; export it again") as caught:
        open_session(broken, TARGET)
    assert "\n" not in str(caught.value)


def test_a_file_that_fails_while_running_is_one_line(true_file: Path, tmp_path: Path) -> None:
    proto = onnx.load(true_file)
    reshape = next(node for node in proto.graph.node if node.op_type == "Reshape")
    shape = next(value for value in proto.graph.initializer if value.name == reshape.input[1])
    shape.CopyFrom(onnx.numpy_helper.from_array(torch.tensor([7, 8]).numpy(), shape.name))
    broken = tmp_path / "reshape.onnx"
    onnx.save(proto, broken)
    with pytest.raises(SlimError, match=r"here: the runtime cannot run it: .*Reshape") as caught:
        logits(open_session(broken, TARGET), images(2), place="here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_fewer_bits_may_move_logits_but_not_turn_them(true_file: Path, precision: str) -> None:
    near = network()
    with torch.no_grad():
        near[-1].weight.mul_(1.01)
        near[-1].bias.mul_(1.01)
    found = parity(near, true_file, images(8), target=TARGET, precision=precision)
    assert found.details["relative"] > TOLERANCE
    assert found.details["cosine"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ParityError, match=rf"\(cosine -?0\.\d+, at least {GATES[precision].cosine}"):
        parity(network(seed=1), true_file, images(8), target=TARGET, precision=precision)


def test_cosine_does_not_see_what_changes_no_probability() -> None:
    logits_ = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]])
    assert cosine(logits_, logits_ + torch.tensor([[5.0], [-7.0]])) == pytest.approx(1, abs=1e-12)
    assert cosine(logits_, -logits_) == pytest.approx(-1, abs=1e-12)
