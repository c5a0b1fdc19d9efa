"""Is a bundle whole, and does it compute here what it did where it was written?

Files are compared with the manifest first. Only one whose hash is right is opened, and no engine ever is: what a plan
was built for is read from its sidecar.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from slim.artifact import Preprocessing
from slim.errors import SlimError, StoreError
from slim.export import engine, golden
from slim.export.bundle_files import (
    BENCH,
    ENGINES,
    MANIFEST,
    MODEL,
    Manifest,
    engine_name,
    fault_of,
    files_of,
    read_manifest,
)
from slim.export.lint import lint_file
from slim.export.parity import GATES, difference
from slim.export.runtime import runtimes
from slim.export.target import Target
from slim.store import content_digest


@dataclass(frozen=True)
class Check:
    """One thing that was asked of a bundle."""

    name: str
    """`files`, `golden`, `lint` or `engines`."""
    said: str
    """What was looked at, in a few words."""
    faults: tuple[str, ...] = ()
    """One line each."""


def verify(folder: Path) -> tuple[Check, ...]:
    """Everything that can be asked of the bundle in `folder` on this machine. Writes nothing.

    Raises:
        StoreError: no bundle, or its manifest is broken or of another format.
        MissingExtra: ONNX Runtime is not installed.
    """
    manifest = read_manifest(folder)
    wrong = {name: fault for name, entry in manifest.files.items() if (fault := fault_of(folder, name, entry))}
    return (
        _files(folder, manifest, wrong),
        _golden(folder, manifest, wrong),
        _lint(folder, manifest, wrong),
        _engines(folder, manifest, wrong),
    )


def _files(folder: Path, manifest: Manifest, wrong: Mapping[str, str]) -> Check:
    faults = [*wrong.values()]
    for name in (MODEL, *manifest.models, *manifest.served.values(), golden.GOLDEN, "preprocess.json"):
        if name not in manifest.files and (fault := f"{name} is not in {MANIFEST}") not in faults:
            faults.append(fault)
    measured = 0
    for name in files_of(folder):
        if name == MANIFEST or name in manifest.files:
            continue
        path = folder / name
        if not BENCH.fullmatch(name) or path.is_symlink() or not path.is_file():
            faults.append(f"{name} is not in {MANIFEST}")
        elif not _sealed(path):
            faults.append(f"{name} does not have its recorded digest, so it was changed")
        else:
            measured += 1
    return Check("files", f"{len(manifest.files)} in {MANIFEST}, {measured} of measurements", tuple(faults))


def _golden(folder: Path, manifest: Manifest, wrong: Mapping[str, str]) -> Check:
    """Each file against what it gave where it was written; those in 32 bits against the network as well."""
    name, faults = golden.GOLDEN, []
    if unfit := _unfit(manifest, wrong, name, "preprocess.json"):
        return Check("golden", f"not computed, for {unfit} is not as it should be")
    try:
        held = golden.read_golden(folder / name)
        known = json.loads((folder / "preprocess.json").read_bytes())
        fed = Preprocessing.model_validate({field: known[field] for field in Preprocessing.model_fields})
    except (StoreError, ValueError, KeyError, TypeError) as error:
        return Check("golden", "not computed", (f"{error}",))
    largest, asked = 0.0, 0
    for name, entry in manifest.models.items():
        if _unfit(manifest, wrong, name):
            continue
        against = (name, golden.NETWORK) if entry.precision == "fp32" else (name,)
        if missing := [one for one in against if one not in held.logits]:
            faults.append(f"{golden.GOLDEN} holds no outputs of {missing[0]}")
            continue
        try:
            with golden.on_one_thread():
                found = golden.asked(folder / name, held.images, fed)
            for one in against:
                words = "torch" if one == golden.NETWORK else f"its recorded outputs in {golden.GOLDEN}"
                apart = difference(held.logits[one], found, place=name, against=words, gate=GATES[entry.precision])
                largest = max(largest, apart.value)
            asked += 1
        except SlimError as error:
            faults.append(str(error))
    images = f"{len(held.images)} inputs ({manifest.golden.inputs})"
    return Check("golden", f"{asked} models on {images}, largest difference {largest:.3g}", tuple(faults))


def _lint(folder: Path, manifest: Manifest, wrong: Mapping[str, str]) -> Check:
    """The file that the bundle's target is served, by the rules of its runtime as they are here."""
    try:
        target = Target.parse(manifest.target or golden.ORACLE)
    except SlimError as error:
        return Check("lint", f"not done, for the target is unknown here: {error}")
    name = manifest.served.get(target.name, MODEL)
    if unfit := _unfit(manifest, wrong, name):
        return Check("lint", f"not done, for {unfit} is not as it should be")
    try:
        findings = lint_file(folder / name, runtimes()[target.name].rules())
    except StoreError as error:
        return Check("lint", "not done", (str(error),))
    errors = tuple(f"{name}: {finding}" for finding in findings if finding.severity == "error")
    return Check("lint", f"{name} for {target.name}, {len(findings) - len(errors)} warnings", errors)


def _engines(folder: Path, manifest: Manifest, wrong: Mapping[str, str]) -> Check:
    """Engines that fit their sidecar and a file of the bundle. One for another device is no fault of the bundle."""
    hashes = {manifest.files[name].sha256 for name in manifest.models if name in manifest.files}
    places = sorted({"/".join(name.split("/")[:2]) for name in manifest.files if name.startswith(f"{ENGINES}/")})
    said, faults = [], []
    for place in places:
        if _unfit(manifest, wrong, f"{place}/{engine.PLAN}", f"{place}/{engine.SIDECAR}"):
            continue
        try:
            known = engine.read_sidecar(folder / place)
            wanted = known.model_dump(include={"api", "version", "gpu", "compute_capability", "os", "arch", "options"})
            # Asked for as just what it says it is: what is left to compare is the plan and its header.
            engine.read_engine(folder / place, onnx_sha256=known.onnx_sha256, **wanted)
        except SlimError as error:
            faults.append(str(error))
            continue
        if known.onnx_sha256 not in hashes:
            faults.append(f"{place}: built from the file {known.onnx_sha256[:12]}, which is none of the bundle's")
        elif engine_name(known) != place:
            faults.append(f"{place}: its sidecar is of {engine_name(known)}; add the engine again")
        else:
            said.append(f"{place} {_where(known)}")
    return Check("engines", "; ".join(said) or "none", tuple(faults))


def _where(known: engine.Sidecar) -> str:
    here = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    fits = (known.os, known.arch) == (engine.OS, engine.ARCH) and (known.gpu is None or known.gpu in here)
    device = f"{known.gpu or 'a processor'}, {known.os} {known.arch}"
    return f"for this device, {known.api} {known.version}" if fits else f"for another device ({device})"


def _unfit(manifest: Manifest, wrong: Mapping[str, str], *names: str) -> str | None:
    """The first of these files that must not be opened."""
    return next((name for name in names if name in wrong or name not in manifest.files), None)


def _sealed(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
        return bool(content_digest(content) == content["digest"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def as_json(checks: tuple[Check, ...]) -> list[dict[str, object]]:
    """Plain JSON, in order."""
    return [dataclasses.asdict(check) for check in checks]
