"""A run on disk: `recipe.yaml dense.onnx steps/NN-name/ final/ bundle/ steps.jsonl report.json report.html`.

A finished step is found again by everything its result depends on, so resuming neither repeats nor confuses work. Step
folders are never overwritten: a step redone with other settings gets a folder of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from slim import environment, store
from slim.artifact import Artifact, Preprocessing
from slim.contract import Context, Pass, Role
from slim.errors import StoreError, UsageError
from slim.measurement import Measurement

if TYPE_CHECKING:
    from slim.bench.report import Report

Figures = Mapping[str, Measurement]
FREE_TO_CHANGE = frozenset({"passes", "guard", "export", "format", "data.workers"})
"""Recipe keys that `--resume` may find changed: finished steps are matched one by one, and workers change no value."""


class Record(BaseModel):
    """What became of one pass: a line of steps.jsonl and a row of the report."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    position: int
    """Place in the chain, from 1."""
    name: str
    """Pass name."""
    role: Role
    """`structure`, `prepare` or `repair`."""
    stage: int
    """Stage the pass belongs to, from 1."""
    config: dict[str, Any]
    """Every field of the pass."""
    outcome: Literal["kept", "rolled back", "not run", "pending"]
    """`pending` until the stage is judged."""
    reason: str = ""
    """Why it was kept or rolled back, in one line."""
    seconds: dict[str, float] = {}
    """`pass` and `measure`, wall time."""
    plan: dict[str, Any] = {}
    """What the pass decided."""
    figures: Figures = {}
    """By metric name; ratios and drops are against the artifact before the stage."""
    folder: str | None = None
    """Where the artifact lies, relative to the run."""
    key: dict[str, str] = {}
    """Everything the artifact depends on."""
    measured: dict[str, str] = {}
    """Everything the figures depend on besides."""


def step_key(step: Pass, given: Artifact, reference: Artifact, context: Context) -> dict[str, str]:
    """Everything the artifact of `step` depends on, by name; equal keys mean equal work."""
    key = {
        "pass": f"{step.name} version {step.version}",
        "config": json.dumps(step.model_dump(mode="json"), sort_keys=True),
        "input": given.digest,
        "reference": reference.digest,
        "preprocessing": given.backbone.input.model_dump_json(),
        "seed": str(context.seed),
        "guard": str(context.guard),
        "libraries": json.dumps(environment.versions(), sort_keys=True),
        **step.sources(context),
    }
    if step.reads and context.data is not None:
        key["data"] = context.data.id
        key["split"] = context.data.membership(*sorted(step.reads))
        key["batch"] = str(context.loading.batch_size)
        if "unlabeled" in step.reads:
            key["unlabeled"] = str(context.data.unlabeled_id)
    if step.measures and context.meter is not None:  # what was planned holds for this machine
        key["target"] = context.meter.target
        key["device"] = environment.fingerprint()
    return key


@dataclass(frozen=True)
class Run:
    """The folder of one run."""

    root: Path
    trust: bool = False
    """Whether a `package.module:factory` backbone may be imported."""

    @classmethod
    def open(cls, root: Path, recipe: dict[str, Any], *, resume: bool, trust: bool = False) -> Run:
        """The folder for a run of `recipe`: a new one, or with `resume` one begun with the same inputs. Rank 0's alone.

        Raises:
            UsageError: it holds another run, or something else.
            StoreError: it cannot be written, or its recipe is damaged.
        """
        run = cls(root, trust)
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            if not run.recipe_path.is_file():
                raise UsageError(f"--out {root}: exists and is not a run; choose another place")
            if not resume:
                raise UsageError(f"--out {root}: holds a run already; add --resume to go on, or choose another place")
            for key, old, new in _differences(_recipe_in(run.recipe_path), recipe):
                raise UsageError(f"--out {root}: its run has {key} {old}, not {new}; choose another place")
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"--out {root}: cannot be created: {error.strerror}") from error
        store.write_text(run.recipe_path, yaml.safe_dump(recipe, sort_keys=False))
        return run

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def final(self) -> Path:
        """The last good artifact."""
        return self.root / "final"

    @property
    def dense(self) -> Path:
        """The exported network everything is compared with."""
        return self.root / "dense.onnx"

    @property
    def bundle(self) -> Path:
        """What is shipped; there after `export`."""
        return self.root / "bundle"

    @cached_property
    def artifact(self) -> Artifact:
        """The last good artifact, loaded."""
        return store.load(self.final, trust=self.trust)

    @cached_property
    def report(self) -> Report:
        """report.json, loaded."""
        from slim.bench import report

        return report.load(self.root)

    @property
    def dense_input(self) -> Preprocessing:
        """What `dense` is fed, which may be other than what ships."""
        known = self.report.dense_input if (self.root / "report.json").is_file() else None
        return known or self.artifact.backbone.input  # before there were reports of it, no pass changed it

    def records(self) -> list[Record]:
        """Every line of steps.jsonl, oldest first. Raises StoreError where one is damaged."""
        path = self.root / "steps.jsonl"
        if not path.exists():
            return []
        records = []
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                records.append(Record.model_validate_json(line))
            except ValidationError as error:
                raise StoreError(
                    f"{path}: line {number} is not a step record; delete the line to redo the step"
                ) from error
        return records

    def put(self, record: Record) -> None:
        """Write down `record` in steps.jsonl, instead of what it said of the same work at the same place."""
        others = [one for one in self.records() if (one.position, one.key) != (record.position, record.key)]
        # Rewritten beside and renamed: an append cut short by a full disk would leave half a line.
        lines = "".join(one.model_dump_json() + "\n" for one in (*others, record))
        store.write_text(self.root / "steps.jsonl", lines)

    def find(self, key: dict[str, str]) -> Record | None:
        """The newest record of a finished step with this key, whose artifact is still there."""
        for record in reversed(self.records()):
            if record.key == key and record.folder and (self.root / record.folder / store.MANIFEST).is_file():
                return record
        return None

    def differs(self, position: int, key: dict[str, str]) -> str | None:
        """What keeps the finished step at `position` from being taken: the elements of its key that differ."""
        there = [record for record in self.records() if record.position == position and record.folder]
        if not there:
            return None
        other = there[-1].key
        return ", ".join(name for name in sorted(key.keys() | other.keys()) if key.get(name) != other.get(name))

    def step_folder(self, position: int, name: str, key: dict[str, str]) -> str:
        """Where the artifact of a step goes, relative to the run; a folder taken by another key is left alone."""
        folder = f"steps/{position:02d}-{name}"
        taken = any(record.folder == folder and record.key != key for record in self.records())
        return f"{folder}-{_short(key)}" if taken else folder

    def checkpoint(self, position: int, name: str, key: dict[str, str]) -> Path:
        """Where training of a step keeps its checkpoint; named by key, so that no other step takes it up."""
        return self.root / "steps" / f".{position:02d}-{name}-{_short(key)}.checkpoint"


def open_run(root: Path, *, trust: bool = False) -> Run:
    """A finished or begun run. Raises UsageError when the folder holds none."""
    run = Run(root, trust)
    if not run.recipe_path.is_file():
        raise UsageError(f"{root}: holds no run; give the --out of a `slim run`")
    return run


def _short(key: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]


def _recipe_in(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise StoreError(f"{path}: is damaged and cannot be read; choose another --out") from error
    if not isinstance(recipe, dict):
        raise StoreError(f"{path}: is damaged, it holds no recipe; choose another --out")
    return recipe


def _differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of everything that differs and is not free to change."""
    if place in FREE_TO_CHANGE or old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    else:
        yield place, old, new
