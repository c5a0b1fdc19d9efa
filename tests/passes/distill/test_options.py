"""Presets fill in what is not given, and options that make no sense together say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from slim import recipe
from slim.errors import RecipeError
from slim.passes.distill import Distill
from slim.passes.distill.presets import PRESETS
from slim.recipe import Recipe
from tests.conftest import Call

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_what_is_not_given_and_nothing_else(name: str) -> None:
    found, plain = Distill(preset=name), Distill(method="kd")
    for field in Distill.model_fields:
        expected = {"preset": name, **PRESETS[name]}.get(field, getattr(plain, field))
        assert getattr(found, field) == expected, field
    # A value that happens to be the usual one is one that was given.
    given = {field: Distill.model_fields[field].default for field in PRESETS[name] if field != "method"}
    overruled = Distill(preset=name, method="kd", **given)
    assert all(getattr(overruled, field) == value for field, value in given.items())
    assert overruled.method == ("kd",)


def test_without_a_preset_the_teacher_decides() -> None:
    assert Distill().preset == Distill(teacher="dense").preset == "recover"
    for other in (Distill(teacher="runs/x"), Distill(method="kd"), Distill(teacher=("stage", "runs/x"))):
        assert (other.preset, other.method, other.lr) == (None, ("kd",), Distill.model_fields["lr"].default)
    # An empty list is no teacher and no method.
    assert Distill(teacher=(), method=()).model_dump() == Distill().model_dump()


@pytest.fixture
def emitted(call: Call) -> Callable[..., Recipe]:
    """The recipe that a command line comes to, through the YAML it prints."""

    def emit(*words: str) -> Recipe:
        done = call("run", "--emit-yaml", "--model", "resnet18", *words)
        assert (done.code, done.err) == (0, "")
        return recipe.parse(recipe.plain_yaml(done.out), place="test")

    return emit


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"preset": "ssld", "lr": 1e-3},
        {"method": ["dist=2", "kd"], "teacher": ["a/b", "dense"]},
        {"teacher": ["runs/large"], "label_weight": 0.5, "trainable": "head"},
    ],
)
def test_a_distillation_is_the_same_on_all_three_roads(fields: dict[str, Any], emitted: Callable[..., Recipe]) -> None:
    python = Distill(**fields)
    words = [str(word) for name, value in fields.items() for one in (value if isinstance(value, list) else [value])
             for word in (f"--{name.replace('_', '-')}", one)]  # fmt: skip
    (on_the_line,) = emitted("distill", *words).passes
    (in_a_file,) = recipe.parse({"model": "x", "passes": [{"name": "distill", **fields}]}, place="test").passes
    assert python == on_the_line == in_a_file


def test_a_preset_set_afterwards_is_followed(emitted: Callable[..., Recipe]) -> None:
    (found,) = emitted("--set", "passes.0.preset=ssld", "distill", "--preset", "recover", "--epochs", "3").passes
    assert found == Distill(preset="ssld", epochs=3)
    (found,) = emitted("--set", "passes.0.teacher=runs/x", "distill").passes
    assert found == Distill(teacher="runs/x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "kdd"}, r"method: 'kdd' is unknown; did you mean 'kd'\?"),
        ({"method": "kd=0"}, "method: 'kd=0': the weight of a method is a number above 0"),
        ({"method": ["kd", "kd"]}, "method: 'kd' is given twice"),
        ({"preset": "fst"}, "preset: 'fst' should be "),
        ({"teacher": 5}, "teacher: 5 should be "),
        ({"method": "hidden", "cache": "c"}, "cache: method 'hidden' reads more of the teacher than its logits; drop"),
        ({"cache": "c"}, "cache: method 'recover' reads more of the teacher than its logits"),
        ({"method": "kd", "cache": "c", "teacher": ["a", "b"]}, "cache: it holds one teacher's targets, not 2"),
        ({"method": "kd", "cache": "c", "standardize": True}, "cache: standardize reads all logits, of which"),
        ({"method": "hidden", "trainable": "head"}, "trainable head: method 'hidden' leaves the classifier alone; use"),
        ({"method": "token", "label_weight": 1, "trainable": "head"}, "trainable head: method 'token' needs both"),
        (
            {"method": ["token", "hidden"]},
            "method 'token' teaches the second classifier alone, and the network answers",
        ),
    ],
)
def test_options_that_cannot_be_say_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^distill: {message}"):
        recipe.build_pass(Distill, fields)


def test_a_wrong_option_ends_with_2_and_one_line(call: Call) -> None:
    ended = call("run", "--emit-yaml", "--model", "resnet18", "distill", "--method", "hiden")
    assert (ended.code, ended.error) == (2, "distill: method: 'hiden' is unknown; did you mean 'hidden'?")
