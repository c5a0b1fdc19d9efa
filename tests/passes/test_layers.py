"""Which layers `skip` names, and which calls of layers one forward pass sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slim.errors import PassError
from slim.passes.layers import calls_of, skipped

NAMES = ("stem", "blocks.0.fc1", "blocks.0.fc2", "blocks.10.fc1")


class Calling(nn.Module):
    """A layer for each way to be called, and one that is only read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.twice, self.named, self.read = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.stem(images))
        tokens = self.twice(maps.flatten(2).mT)
        features = self.named(input=self.twice(tokens.mean(1)))
        return nn.functional.linear(features, self.read.weight)


def test_patterns_match_whole_names_and_together() -> None:
    assert skipped("mask", ("blocks.?.*",), NAMES) == {"blocks.0.fc1", "blocks.0.fc2"}
    assert skipped("mask", ("stem", "*.fc1"), NAMES) == {"stem", "blocks.0.fc1", "blocks.10.fc1"}
    assert skipped("mask", (), NAMES) == frozenset()


def test_names_may_be_read_but_once() -> None:
    assert skipped("mask", ("stem", "*.fc2"), iter(NAMES)) == {"stem", "blocks.0.fc2"}


def test_a_pattern_that_matches_nothing_is_an_error_whatever_the_others_match() -> None:
    with pytest.raises(PassError, match=r"^mask: skip 'fc1' matches no layer; names are such as 'stem'$"):
        skipped("mask", ("stem", "fc1"), NAMES)
    with pytest.raises(PassError, match=r"^prune: skip 'fc1' matches no layer$"):
        skipped("prune", ("fc1",), ())


def test_every_call_is_seen_with_its_shapes_and_in_order() -> None:
    # 4 x 6 pixels are 2 x 3 positions of the stem, so 6 tokens; then their mean.
    assert calls_of(Calling(), ["stem", "twice", "named", "read"], (3, 4, 6)) == {
        "stem": (((1, 3, 4, 6), (1, 4, 2, 3)),),
        "twice": (((1, 6, 4), (1, 6, 4)), ((1, 4), (1, 4))),
        "named": (((1, 4), (1, 5)),),
        "read": (),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(fails: bool) -> None:
    model = Calling().train()
    model.stem.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError, match="channels"):  # torch's
            calls_of(model, ["stem"], (5, 4, 6))
    else:
        calls_of(model, ["stem"], (3, 4, 6))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in (model, model.stem, model.norm)] == [True, False, True]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
