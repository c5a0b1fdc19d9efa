"""The table of methods: the words of `--method`, and how each is made for a pair of networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from slim.errors import PassError, did_you_mean
from slim.passes.distill import taps
from slim.passes.distill.embedding import EmbeddingTarget
from slim.passes.distill.hidden import Hidden
from slim.passes.distill.method import Method
from slim.passes.distill.perturbation import Perturbation
from slim.passes.distill.scalekd import ScaleKD
from slim.passes.distill.soft_targets import Decoupled, Relational, SoftTargets, Token
from slim.surgery import in_eval

if TYPE_CHECKING:
    from slim.passes.distill.distill import Distill

WEIGHTS: dict[str, float] = {
    "kd": 1.0,
    "reverse-kl": 1.0,
    "jeffreys": 1.0,
    "js": 1.0,
    "dkd": 1.0,
    "dist": 2.0,
    "token": 1.0,
    "token-soft": 1.0,
    "hidden": 1.0,
    "perturb": 1.0,
    "perturb-max": 1.0,
    "cosine": 1.0,
    "infonce": 1.0,
    "scalekd": 1.0,
}
"""Method -> its weight where none is given."""
BEYOND_LOGITS = frozenset({"hidden", "perturb", "perturb-max", "cosine", "infonce", "scalekd"})
"""Methods that read features or weights, and leave the classifier alone."""
TOKENS = frozenset({"token", "token-soft"})
"""Methods that train the classifier of a distillation token, and not the one beside it."""
RECOVER = "recover"
"""Stands for kd, hidden and perturb; the latter two then may find no map and no pair to compare."""


@dataclass(frozen=True)
class Pair:
    """The networks a method is made for."""

    student: nn.Module
    student_size: tuple[int, int, int]
    teacher: nn.Module
    teacher_size: tuple[int, int, int]
    weights: Mapping[str, Tensor]
    """The teacher's values by name as they were saved; `teacher` may have merged its batch norms, and be in bf16."""


def parse(given: Sequence[str]) -> list[tuple[str, float]]:
    """`("kd", "dist=2")` as names and weights. Raises ValueError naming what is wrong."""
    found: list[tuple[str, float]] = []
    for entry in given:
        name, equals, text = entry.partition("=")
        if name not in (*WEIGHTS, RECOVER):
            raise ValueError(f"{name!r} is unknown{did_you_mean(name, [*WEIGHTS, RECOVER])}")
        try:
            weight = float(text) if equals else WEIGHTS.get(name, 1.0)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(f"{entry!r}: the weight of a method is a number above 0, such as {name}=0.5")
        if name in (other for other, _ in found):
            raise ValueError(f"{name!r} is given twice; once is enough, with a weight")
        found.append((name, weight))
    return found


def reads_logits(given: Sequence[str]) -> bool:
    """Whether any method trains the classifier."""
    return any(name not in BEYOND_LOGITS for name, _ in parse(given))


def build(options: Distill, pair: Pair, *, seed: int, dry: bool = False) -> list[tuple[Method, float]]:
    """The methods of `options`, made for `pair`, each with its weight; `dry` ones without the values they train along.

    Raises:
        PassError: a method cannot be placed on this pair, and why.
    """
    made: list[tuple[Method, float]] = []
    # What a method trains along starts from the seed, and nobody else's draws are disturbed.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not the devices', whose state is not put back
        for name, weight in parse(options.method):
            if name == RECOVER:
                made += [
                    (_make("kd", options, pair, seed, dry), weight),
                    (Hidden.place(*_ends(pair), may_be_none=True), weight),
                    (Perturbation.place(pair.student, pair.weights, may_be_none=True), weight),
                ]
            else:
                made.append((_make(name, options, pair, seed, dry), weight))
    return made


def _make(name: str, options: Distill, pair: Pair, seed: int, dry: bool) -> Method:
    temperature, standardize = options.temperature, options.standardize
    match name:
        case "kd":
            return SoftTargets("forward", temperature=temperature, standardize=standardize)
        case "reverse-kl":
            return SoftTargets("reverse", temperature=temperature, standardize=standardize)
        case "jeffreys":
            return SoftTargets("jeffreys", temperature=temperature, standardize=standardize)
        case "js":
            return SoftTargets("js", temperature=temperature, standardize=standardize)
        case "dkd":
            return Decoupled(alpha=1.0, beta=options.dkd_beta, temperature=temperature)
        case "dist":
            return Relational(temperature=temperature, standardize=standardize)
        case "token" | "token-soft":
            if not _has_two_heads(pair.student, pair.student_size):
                raise PassError(
                    f"distill: method {name!r} needs a distillation token, which {type(pair.student).__name__} has"
                    " not; take deit_*_distilled, levit, ..., or --method kd"
                )
            return Token(hard=name == "token", temperature=temperature)
        case "hidden":
            return Hidden.place(*_ends(pair))
        case "perturb" | "perturb-max":
            # Before any work starts there may be no pair yet: low-rank, earlier in the chain, makes them.
            return Perturbation.place(pair.student, pair.weights, name, may_be_none=dry)
        case "cosine" | "infonce":
            ours, theirs = (_width(pair.student, pair.student_size), _width(pair.teacher, pair.teacher_size))
            return EmbeddingTarget(ours, theirs, kind=name)
        case "scalekd":
            return ScaleKD.place(
                pair.student,
                pair.student_size,
                pair.teacher,
                pair.teacher_size,
                views=("ori", "alt") if options.scalekd_alt else ("ori",),
                perception=options.scalekd_perception,
                tail_blocks=options.scalekd_tail,
                stem=options.scalekd_stem,
                paper_scale=options.scalekd_paper_scale,
                seed=seed,
                dry=dry,
            )
    raise AssertionError(name)  # `parse` knows the same names; a test holds them together


def _ends(pair: Pair) -> tuple[nn.Module, tuple[int, int, int], nn.Module, tuple[int, int, int]]:
    return pair.student, pair.student_size, pair.teacher, pair.teacher_size


def _has_two_heads(model: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether it can be told to give two logits in training; some networks take the word and have one head."""
    if not hasattr(model, "set_distilled_training"):
        return False
    copied = copy.deepcopy(model).train()  # statistics of its norms are moved, so not on the network itself
    cast(Any, copied).set_distilled_training(True)
    with torch.no_grad():
        return isinstance(copied(taps.probe(copied, size)), tuple)


def _width(model: nn.Module, size: tuple[int, int, int]) -> int:
    with in_eval(model):
        pooled = taps.outputs(model, taps.probe(model, size), embedding=True).embedding
    assert pooled is not None  # asked for
    return pooled.shape[1]
