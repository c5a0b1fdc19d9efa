"""A cache of targets for one run: what they depend on, how missing ones are computed, and that they are still right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from slim import distributed
from slim.artifact import Artifact
from slim.contract import Context
from slim.data import Augment
from slim.passes.distill.targets import Targets
from slim.passes.distill.teacher import Teacher

if TYPE_CHECKING:
    from slim.passes.distill.distill import Distill


def opened(options: Distill, found: Artifact, teacher: Teacher, context: Context) -> Targets:
    """The cache in its folder, begun or not.

    Raises:
        StoreError: the folder holds other targets, and what differs, or something else.
    """
    assert options.cache is not None  # whoever calls asked
    assert context.data is not None  # Pipeline.check saw to it
    assert context.backbone is not None  # Pass.__call__ and the pipeline set it
    return Targets.open(
        Path(options.cache).expanduser(),
        key_of(options, found, teacher, context),
        images=len(context.data.pool(options.splits)),
        classes=context.backbone.num_classes,
        temperature=options.temperature,
        mass=options.cache_mass,
    )


def filled(options: Distill, found: Artifact, teacher: Teacher, context: Context) -> tuple[Targets, dict[str, float]]:
    """The targets of every view that training will show, and what a check of a sample of them found.

    Raises:
        StoreError: as `opened`; or what is stored is not what the teacher says.
    """
    targets = opened(options, found, teacher, context)
    assert context.data is not None  # as in `opened`
    assert context.backbone is not None
    data, backbone = context.data, context.backbone

    def views(epoch: int, positions: Sequence[int]) -> Iterator[Tensor]:
        batches = data.views(
            backbone.input,
            options,
            positions,
            seed=context.seed,
            epoch=epoch,
            batch_size=context.loading.batch_size,
            num_classes=backbone.num_classes,
            workers=context.loading.workers,
            splits=options.splits,
        )
        return (batch.images.to(context.device) for batch in batches)

    targets.fill(
        options.epochs,
        views,
        teacher.logits,
        progress=context.progress,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    distributed.wait()  # until the others have filled theirs
    said = distributed.on_main(
        lambda: (
            targets.check(options.cache_check, context.seed, options.epochs, views, teacher.logits)
            if options.cache_check
            else {}
        )
    )
    return targets, said


def key_of(options: Distill, found: Artifact, teacher: Teacher, context: Context) -> dict[str, str]:
    """Everything a target depends on, by name."""
    assert context.data is not None
    assert context.backbone is not None
    data = context.data
    fields = set(Augment.model_fields) - {"smoothing"}  # it changes labels, not images
    return {
        "data": " ".join(
            part for part in (data.id, data.unlabeled_id if "unlabeled" in options.splits else "") if part
        ),
        "images": data.membership(*options.splits),
        "augmentation": json.dumps(options.model_dump(mode="json", include=fields), sort_keys=True),
        "input": context.backbone.input.model_dump_json(),
        "seed": str(context.seed),
        "teacher": found.digest,
        "classes": str(teacher.classes.tolist() if teacher.classes is not None else "same"),
        "precision": str(teacher.dtype),
    }
