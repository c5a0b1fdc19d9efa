"""The network before compression, with the values it had: found among what a run keeps."""

from __future__ import annotations

from collections.abc import Iterator

from slim import recipe, store
from slim.artifact import Artifact
from slim.errors import SlimError
from slim.pretrained import start
from slim.runs import Run


def before_compression(artifact: Artifact, leading: int, run: Run | None) -> Artifact | None:
    """The network after the first `leading` steps of the history of `artifact`; none where its values are not at hand.

    What is found is the one that the next step was given, bit for bit: their digests are compared.

    Raises:
        StoreError: an artifact in the run is damaged.
    """
    if leading == len(artifact.history):
        return artifact
    digest = artifact.history[leading].digests.get("input")
    return next((one for one in _kept_by(run, leading) if one.digest == digest), None) if run else None


def _kept_by(run: Run, leading: int) -> Iterator[Artifact]:
    """The run's artifacts with so many steps, then what it began with, opened again."""
    for record in run.records():
        if record.folder and (run.root / record.folder / store.MANIFEST).is_file():
            artifact = store.load(run.root / record.folder, trust=run.trust)
            if len(artifact.history) == leading:
                yield artifact
    try:
        begun = recipe.parse(recipe.read(run.recipe_path), place=str(run.recipe_path))
        yield start(begun.model, None, seed=begun.seed, trust=run.trust).artifact
    except SlimError:  # its weights were moved away, or timm's hub cannot be reached
        return
