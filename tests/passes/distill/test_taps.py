"""One forward pass gives what was asked for, and the logits stay those of the network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.distill.taps import check, last_two, maps_of, outputs
from slim.surgery import in_eval
from tests.contract.zoo import Tied
from tests.passes.distill.pairs import CLASSES, LARGE, SMALL, STUDENTS, TEACHERS, VIT, images, network, student, teacher

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = {
    **{name: (model, arguments, SMALL) for name, (model, arguments) in TEACHERS.items()},
    **STUDENTS,
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, SMALL),
    "levit": ("levit_128s", {"img_size": 64}, LARGE),
    "repvit": ("repvit_m0_9", {}, LARGE),
    "mobilenetv4": ("mobilenetv4_conv_small_050", {}, LARGE),
    "eva": ("vit_small_patch16_rope_224", VIT, SMALL),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_network_whatever_is_read_along(name: str) -> None:
    chosen, arguments, size = NETWORKS[name]
    model = network(chosen, **arguments)
    check(model, size)
    shapes = maps_of(model, size)
    early, late = last_two(shapes)
    batch = images(size)
    with torch.no_grad():
        expected = model(batch)
        plain = outputs(model, batch)
        full = outputs(model, batch, indices=(late, early), embedding=True, final=True)
    assert torch.equal(plain.logits, expected)
    assert (plain.embedding, plain.final, dict(plain.maps)) == (None, None, {})
    assert torch.equal(full.logits, expected)
    assert {index: tuple(values.shape[1:]) for index, values in full.maps.items()} == {
        early: shapes[early],
        late: shapes[late],
    }
    assert full.embedding is not None
    assert full.embedding.shape[0] == 2
    assert full.embedding.ndim == 2
    with torch.no_grad():
        assert torch.equal(full.final, model.forward_features(batch))
        assert torch.equal(outputs(model, batch, final=True).final, full.final)


def test_prefix_tokens_come_with_their_map() -> None:
    model = network("deit_tiny_distilled_patch16_224", **VIT)
    batch = images(SMALL)
    with torch.no_grad():
        given = outputs(model, batch, indices=(0, 2))
        tokens = model.blocks[0](model._pos_embed(model.patch_embed(batch)))
        final = model.forward_features(batch)
    assert torch.equal(given.prefix[0], tokens[:, :2])
    assert torch.equal(given.maps[0].flatten(2).transpose(1, 2), tokens[:, 2:])
    assert torch.equal(given.prefix[2], final[:, :2])  # the last ones as the network ends: normed
    assert torch.equal(given.maps[2].flatten(2).transpose(1, 2), final[:, 2:])


def test_the_last_map_is_normed_and_no_other() -> None:
    model = teacher("swin")
    batch = images(SMALL)
    with torch.no_grad():
        given = outputs(model, batch, indices=(1, 2), final=True)
        raw = model.forward_intermediates(batch, norm=False, intermediates_only=True)
        assert torch.equal(outputs(model, batch, indices=(1,)).maps[1], raw[1])
    assert torch.equal(given.maps[1], raw[1])
    assert torch.equal(given.maps[2], given.final.permute(0, 3, 1, 2))
    assert not torch.allclose(given.maps[2], raw[2], atol=0.1)


def test_a_head_convolution_is_not_part_of_the_last_map() -> None:
    model, size = student("mobilenet")
    given = outputs(model, images(size), indices=(4,), final=True)
    assert given.maps[4].shape[1] == 112
    assert given.final.shape[1] == 1280


def test_a_student_in_distilled_training_gives_both_logits() -> None:
    model = network("deit_tiny_distilled_patch16_224", **VIT).train()
    model.set_distilled_training(True)
    batch = images(SMALL)
    for given in (outputs(model, batch), outputs(model, batch, indices=(0,), embedding=True)):
        logits, token = model(batch)
        assert torch.equal(given.logits, logits)
        assert torch.equal(given.token_logits, token)
    check(model, SMALL)
    assert model.training
    assert outputs(model.eval(), batch).token_logits is None


def test_dropout_is_drawn_as_the_network_alone_would() -> None:
    model = network("vit_tiny_patch16_224", **VIT, drop_rate=0.3, drop_path_rate=0.5).train()
    batch = images(SMALL, 8)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        expected = model(batch)
        torch.default_generator.manual_seed(5)
        given = outputs(model, batch, indices=(1,), embedding=True)
    assert torch.equal(given.logits, expected)


@pytest.mark.parametrize("name", ["mobilenetv4", "resnet"])
def test_batch_statistics_are_counted_once(name: str) -> None:
    chosen, arguments, size = NETWORKS[name]
    model = network(chosen, **arguments).train()
    alone = copy.deepcopy(model)
    batch = images(size)
    expected = alone(batch)
    given = outputs(model, batch, indices=(3,), embedding=True, final=True)
    assert torch.equal(given.logits, expected)
    for (key, value), other in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert all(module.track_running_stats for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_there_is_one_forward_pass_and_gradients_flow_from_everything() -> None:
    model, size = student("resnet")
    calls: list[None] = []
    model.conv1.register_forward_hook(lambda *_: calls.append(None))
    given = outputs(model, images(size), indices=(3, 4), embedding=True, final=True)
    assert len(calls) == 1
    for value in (given.logits, given.embedding, given.final, given.maps[3], given.maps[4]):
        (gradient,) = torch.autograd.grad(value.sum(), model.conv1.weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_maps_are_measured_without_a_trace() -> None:
    model, size = student("resnet")
    model.train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert maps_of(model, size) == [(64, 32, 32), (32, 16, 16), (64, 8, 8), (96, 4, 4), (128, 2, 2)]
    check(model, size)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    seen: list[bool] = []

    def stop() -> None:
        with in_eval(model):
            seen.extend(module.training for module in model.modules())
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert seen == [False, False, False]
    assert [module.training for module in model.modules()] == [True, True, False]


def test_the_last_two_maps() -> None:
    stages = [(8, 16, 16), (16, 8, 8), (24, 4, 4), (32, 2, 2)]
    assert last_two(stages) == (2, 3)
    assert last_two([*stages, (64, 2, 2)]) == (2, 4)  # of two maps on one grid the later
    assert last_two([*stages[:3], (24, 4, 4), (32, 2, 2)]) == (3, 4)
    assert last_two([(192, 14, 14)] * 12) == (8, 11)
    assert last_two([(192, 14, 14)] * 24) == (17, 23)
    assert last_two([(192, 14, 14)] * 2) == (0, 1)
    with pytest.raises(PassError, match="the network has 1 map, two are read; take a deeper one, or --method kd"):
        last_two([(192, 14, 14)])


def test_a_network_without_maps_still_gives_logits() -> None:
    model = Tied(CLASSES, 16)
    batch = images(SMALL)
    assert torch.equal(outputs(model, batch).logits, model(batch))
    reason = "Tied has no forward_intermediates, by which features are read; take a timm network that has it, or --m"
    with pytest.raises(PassError, match=reason):
        maps_of(model, SMALL)
    with pytest.raises(PassError, match="Tied has no forward_features"):
        outputs(model, batch, embedding=True)


def test_features_that_do_not_lead_to_the_logits_are_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = student("resnet")

        def forward_intermediates(self, *given: Tensor, **arguments: object) -> object:
            return self.inner.forward_intermediates(*given, **arguments)

        def forward_head(self, final: Tensor) -> Tensor:
            return self.inner.forward_head(final)

        def forward(self, batch: Tensor) -> Tensor:
            return self.inner(batch) * 1.01

    with pytest.raises(PassError, match=r"features of Scaled give other logits than the network, off by 0\.0099"):
        check(Scaled(), LARGE)


def test_patches_that_are_dropped_leave_no_map() -> None:
    model = network("vit_tiny_patch16_224", **VIT, patch_drop_rate=0.5)
    with pytest.raises(PassError, match="'patch_drop' of VisionTransformer drops patches, so it has no maps"):
        check(model, SMALL)


def test_a_network_that_does_not_pool_gives_no_logits() -> None:
    model = network("vit_tiny_patch16_224", **VIT, global_pool="")
    with pytest.raises(PassError, match=r"VisionTransformer gives no logits \(images, classes\); take a classifier"):
        outputs(model, images(SMALL), embedding=True)
