"""The teacher: where it comes from, and how it is shown what the student sees.

It gets the very tensor that the student gets, normalised and resized in float32 as it was trained, and answers in the
student's classes. It is frozen when it is made and cannot be put into training mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim import store, surgery
from slim.artifact import Artifact, Preprocessing
from slim.contract import Context
from slim.errors import PassError, SlimError
from slim.passes.distill import taps
from slim.passes.distill.method import Outputs
from slim.pretrained import is_folder, start
from slim.sources import imagenet_labels, imagenet_names

OWN = ("stage", "dense")
"""Teachers that are the network itself, before its stage and before any compression."""


def find(spec: str, context: Context) -> Artifact:
    """The teacher called `spec`: `stage`, `dense`, a run or artifact folder, or a timm name with its own weights.

    Raises:
        PassError: there is no such network, and what it may be.
    """
    if spec in OWN:
        found = context.reference if spec == "stage" else context.dense
        assert found is not None  # Pass.__call__ and the pipeline set both
        return found
    trust = context.reference.trust if context.reference is not None else False
    if is_folder(spec):
        folder = store.artifact_folder(Path(spec).expanduser())
        return _loaded(folder, (folder / store.MANIFEST).read_bytes(), trust)
    if "/" in spec and ":" not in spec:
        raise PassError(f"distill: --teacher {spec}: no such folder; give a run, an artifact or a timm name")
    return _pretrained(spec, trust)


@lru_cache(maxsize=2)
def _loaded(folder: Path, manifest: bytes, trust: bool) -> Artifact:
    """Read once: a step asks for its teacher when it is checked, named, and done. `manifest` tells versions apart."""
    return store.load(folder, trust=trust)


@lru_cache(maxsize=2)
def _pretrained(name: str, trust: bool) -> Artifact:
    from slim.recipe import ModelSpec

    try:
        return start(ModelSpec(name=name), None, seed=0, trust=trust).artifact
    except SlimError as error:
        raise PassError(f"distill: --teacher {name}: {error}") from error


def classes_of(teacher: Artifact, labels: Sequence[str] | None, num_classes: int) -> tuple[int, ...] | None:
    """The teacher's output for each of the student's classes; none where they are the same in the same order.

    Raises:
        PassError: some class of the student is none of the teacher's, or nobody knows.
    """
    theirs = teacher.labels
    if labels is not None and theirs is not None:
        if tuple(labels) == theirs:
            return None
        if set(labels) <= set(theirs):
            return tuple(theirs.index(name) for name in labels)
    if teacher.backbone.num_classes == num_classes and (labels is None or theirs is None):
        return None
    names = imagenet_names()
    imagenet = teacher.backbone.num_classes == len(names) and theirs in (None, imagenet_labels())
    if labels is not None and imagenet and set(labels) <= set(names):
        return tuple(names.index(name) for name in labels)
    unknown = next((name for name in labels or () if name not in (theirs or ())), None)
    why = f"it has no class {unknown!r}" if theirs and unknown else "their names do not say which is which"
    raise PassError(
        f"distill: class-count mismatch: teacher {teacher.backbone.name} has {teacher.backbone.num_classes} outputs,"
        f" the network {num_classes}, and {why}; give a teacher of these classes, or --method cosine"
    )


class Teacher(nn.Module):
    """A frozen network behind the student's eyes: same view in, the student's classes out."""

    def __init__(
        self,
        artifact: Artifact,
        student: Preprocessing,
        *,
        classes: Sequence[int] | None = None,
        device: torch.device,
        precision: str,
    ) -> None:
        """`student` is how the images it will be given were normalised; `precision` is `bf16` or `fp32`."""
        super().__init__()
        self.input = artifact.backbone.input
        if self.input.size[0] != student.size[0]:
            raise PassError(
                f"distill: teacher {artifact.backbone.name} sees {self.input.size[0]} channels, the network"
                f" {student.size[0]}; give a teacher of as many"
            )
        model = artifact.model().eval().requires_grad_(False)
        # Before it is cast: running statistics lose more in bf16 than merged weights do, and it is a tenth faster.
        surgery.fold_batch_norms(model, taps.probe(model, self.input.size))
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = model.to(device, self.dtype).to(memory_format=torch.channels_last)
        self.resize = self.input.size[1:] if self.input.size != student.size else None
        scale, shift = _renormalisation(student, self.input)
        self.register_buffer("scale", scale.to(device), persistent=False)
        self.register_buffer("shift", shift.to(device), persistent=False)
        index = torch.tensor(classes, device=device) if classes is not None else None
        self.register_buffer("classes", index, persistent=False)
        self.scale: Tensor
        self.shift: Tensor
        self.classes: Tensor | None
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: dropout, drop path and batch statistics would make it another teacher at each step."""
        super().train(False)
        return self

    def view(self, images: Tensor) -> Tensor:
        """The same view as the teacher was trained on it: (B, 3, H, W) of the student -> (B, 3, H', W') float32."""
        # In float32 whatever the loop computes in: a round trip through bf16 errs by 0.014.
        with torch.autocast(images.device.type, enabled=False):
            view = images.float() * self.scale + self.shift
            if self.resize is not None:
                view = F.interpolate(view, size=self.resize, mode="bicubic", antialias=True, align_corners=False)
        return view

    @torch.no_grad()
    def forward(
        self, images: Tensor, *, indices: tuple[int, ...] = (), embedding: bool = False, final: bool = False
    ) -> Outputs:
        """What it says of the student's `images` (B, 3, H, W); see `Outputs`."""
        # no_grad and not inference_mode: what a student's loss saves for its backward pass may not come from there.
        view = self.view(images).to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            found = taps.outputs(self.model, view, indices=indices, embedding=embedding, final=final)
        if self.classes is None or found.logits is None:
            return found
        return replace(found, logits=found.logits[:, self.classes])

    def logits(self, images: Tensor) -> Tensor:
        """(B, classes) float32, before softmax, in the student's classes."""
        logits = self(images).logits
        assert isinstance(logits, Tensor)
        return logits


def _renormalisation(student: Preprocessing, teacher: Preprocessing) -> tuple[Tensor, Tensor]:
    """Scale and shift (1, C, 1, 1) with `x * scale + shift` = the teacher's normalisation of the student's `x`."""
    ours, theirs = (
        torch.tensor([spec.mean, spec.std], dtype=torch.float64).view(2, 1, -1, 1, 1) for spec in (student, teacher)
    )
    return (ours[1] / theirs[1]).float(), ((ours[0] - theirs[0]) / theirs[1]).float()
