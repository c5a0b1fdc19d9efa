"""Real digits, networks too small to wait for, a spy on trainings, and the objective outside of its pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from slim import contract, store
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.contract import Context, Loading
from slim.data import Batch, Data
from slim.passes.distill import Distill, methods, objective, taps
from slim.passes.distill.method import Method
from slim.passes.distill.methods import Pair
from slim.passes.distill.objective import Distillation, Lesson, live
from slim.passes.distill.teacher import Teacher
from slim.passes.low_rank import LowRank

CPU = torch.device("cpu")
LABELS = tuple("0123456789")
INPUT = Preprocessing(size=(3, 32, 32), crop=1.0)
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "wide": ("vit_tiny_patch16_224", {**VIT, "embed_dim": 48, "num_heads": 3}),
    "dropout": ("vit_tiny_patch16_224", {**VIT, "drop_rate": 0.2, "drop_path_rate": 0.3}),
    "resnet": ("resnet50", RESNET),  # with batch norm, which a teacher has merged into its convolutions
    "densenet": ("densenet121", {"growth_rate": 4, "block_config": [1, 1]}),  # with batch norm, which stays
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
}
FAST: dict[str, Any] = {"epochs": 1, "flip": 0.0, "scale_low": 0.8, "precision": "fp32"}
"""Options of a pass that shows each image once."""


def artifact(name: str, *, seed: int = 1, **fields: Any) -> Artifact:
    """A network whose values hide nothing; `fields` are those of its backbone, or `labels`."""
    model_name, kwargs = NETWORKS[name]
    labels = fields.pop("labels", LABELS)
    chosen = Backbone(**{"name": model_name, "kwargs": kwargs, "num_classes": 10, "input": INPUT, **fields})
    model = chosen.build(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
    return Artifact.of(model, chosen, labels=labels)


def saved(given: Artifact, folder: Path) -> str:
    """The word of `--teacher` for an artifact that now lies there."""
    store.save(given, folder)
    return str(folder)


def context(data: Data | None = None, *, teacher: Artifact | None = None, **fields: Any) -> Context:
    """What the pass may use, with `teacher` as the network before the stage."""
    return Context(data=data, loading=Loading(batch_size=16), reference=teacher, dense=teacher, **fields)


def batches(data: Data, options: Distill, splits: tuple[str, ...] = ("train",)) -> Iterator[Batch]:
    return data.train_batches(INPUT, options, seed=0, epoch=0, batch_size=16, num_classes=10, splits=splits)


def taught(student: Artifact, *teachers: Artifact, **options: Any) -> tuple[nn.Module, Distillation, list[Teacher]]:
    """A student, the objective of the pass with these options, and the teachers; from the parts the pass has."""
    wanted, model = Distill(**{"method": "kd", **options}), student.model()
    lessons, found = [], []
    for given in teachers:
        precision = "fp32" if wanted.precision == "auto" else wanted.precision
        teacher = Teacher(given, student.backbone.input, device=CPU, precision=precision)
        pair = Pair(model, student.backbone.input.size, teacher.model, given.backbone.input.size, given.state)
        made = methods.build(wanted, pair, seed=0)
        lessons.append(Lesson(live(teacher, [method for method, _ in made]), made))
        found.append(teacher)
    return model, Distillation(lessons, label_weight=wanted.label_weight), found


def named(objective: Distillation, kind: type[Method]) -> Any:
    return next(method for method in objective.methods if isinstance(method, kind))


def noise(count: int = 4, size: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def written(data: Data, split: str, folder: Path, *, by_class: bool = False) -> Path:
    """The images of a split as files, in the order of the split."""
    part = data.split(split)
    for position, (name, label) in enumerate(zip(part.names, part.labels, strict=True)):
        place = folder / str(label) if by_class else folder
        place.mkdir(parents=True, exist_ok=True)
        image: Image.Image = part.images.open(name)
        image.save(place / f"{position:06d}.png")
    return folder


FACTOR = LowRank(ratio=0.3, objective="plain", repair="none", min_width=16, align=1)
STILL: dict[str, Any] = {"optimizer": "sgd", "lr": 1e-12, "weight_decay": 0.0}
"""Training that changes nothing, so that its loss is that of the start."""


def kd(**fields: Any) -> Distill:
    """Soft targets alone, on each image once, from whatever the context has for the stage's reference."""
    return Distill(**{**FAST, "method": "kd", **fields})


def after(options: Distill, student: Artifact, teacher: Artifact, data: Data, **fields: Any) -> Artifact:
    return options(student, context(data, teacher=teacher, **fields))


def said(result: Artifact) -> Any:
    return result.history[-1].metrics


class Spy:
    """What a training was given, seen on its way there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.optimised: list[Tensor] = []
        self.teachers: list[Teacher] = []
        self.shown: list[tuple[nn.Module, Tensor]] = []
        self.taught: list[str] = []
        self.learning = False
        make, begin, look, train = (
            training_optimiser(),
            Teacher.__init__,
            taps.outputs,
            contract.Context.train,
        )
        ask = Teacher.forward

        def optimiser(model: nn.Module, **fields: Any) -> Any:
            made = make(model, **fields)
            self.optimised += [value for group in made.param_groups for value in group["params"]]
            return made

        def teacher(this: Teacher, *args: Any, **fields: Any) -> None:
            begin(this, *args, **fields)
            self.teachers.append(this)

        def outputs(model: nn.Module, images: Tensor, **fields: Any) -> Any:
            if self.learning:
                self.shown.append((model, images))
            return look(model, images, **fields)

        def answer(this: Teacher, images: Tensor, **fields: Any) -> Any:
            self.taught += ["in training" if self.learning else "before"] * len(images)
            return ask(this, images, **fields)

        def learn(*args: Any) -> Any:
            self.learning = True
            try:
                return train(*args)
            finally:
                self.learning = False

        monkeypatch.setattr("timm.optim.create_optimizer_v2", optimiser)
        monkeypatch.setattr(Teacher, "__init__", teacher)
        monkeypatch.setattr(Teacher, "forward", answer)
        monkeypatch.setattr(objective.taps, "outputs", outputs)
        monkeypatch.setattr(contract.Context, "train", learn)


def training_optimiser() -> Callable[..., torch.optim.Optimizer]:
    from timm.optim import create_optimizer_v2

    made: Callable[..., torch.optim.Optimizer] = create_optimizer_v2
    return made
