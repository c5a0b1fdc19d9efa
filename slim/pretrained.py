"""The artifact a chain starts from: timm's network with its weights, its preprocessing, and a head that fits the data.

A class count that differs from the weights' means a new head: it belongs to the backbone, is seeded, and the first pass
has to train it. Weights come from timm's hub, a .safetensors file, or the seed; nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slim import store, surgery
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.data import Data
from slim.errors import BackboneError, DataError, did_you_mean

if TYPE_CHECKING:
    from slim.recipe import InputSpec, ModelSpec

FRESH = ("none", "pretrained")


@dataclass(frozen=True)
class Start:
    """Where a chain starts."""

    artifact: Artifact
    data: Data | None
    """The data with labels in the order of the network's outputs."""
    fresh_head: str
    """Why the classifier has never been trained; empty where it has."""


def start(spec: ModelSpec, data: Data | None, *, seed: int, trust: bool = False) -> Start:
    """The network of `spec`, with a head for `data`; or the artifact in a folder, history and all.

    Raises:
        BackboneError: unknown network, weights that do not fit it, or an input it does not take.
        DataError: how many classes there are is not known, or an artifact's are not those of the data.
        StoreError: a truncated weights file, or a folder that holds no whole artifact.
    """
    if is_folder(spec.name):
        return _continued(spec, data, trust=trust)
    weights = _read(spec.weights)
    probe = Backbone(name=spec.name, kwargs=spec.args, num_classes=1)
    default = _default_classes(probe)
    known = _classes_of(weights, spec.name) if weights is not None else None
    known = known or (default if spec.weights != "none" else None)
    classes = known if known and (data is None or data.fits(known)) else _wanted(data, default)
    backbone = probe.model_copy(update={"num_classes": classes})
    model = backbone.build(seed=seed, trust=trust)
    backbone = backbone.model_copy(update={"input": _preprocessing(model, spec.input)})
    _try(model, backbone)
    if weights is None and spec.weights == "pretrained":
        weights = _download(spec)
    if weights is None:
        fresh_head = "the network is fresh (--weights none)"
    elif _fill(model, weights, spec, new_head=known != classes):
        fresh_head = (
            f"class-count mismatch: the data has {classes} classes, the weights {known or 'others'}; a new head"
        )
    else:
        fresh_head = ""
    mapped = data.for_classes(classes) if data is not None else None
    labels = data.labels(classes) if data is not None else None
    return Start(Artifact.of(model, backbone, labels=labels, trust=trust), mapped, fresh_head)


def is_folder(name: str) -> bool:
    """Whether a network's name is the folder of a run or artifact; a name that timm knows never is."""
    import timm

    return Path(name).expanduser().is_dir() and not timm.is_model(name)


def _continued(spec: ModelSpec, data: Data | None, *, trust: bool) -> Start:
    """Where another chain ended: its network as it is, at another input if one is given."""
    folder = store.artifact_folder(Path(spec.name).expanduser())
    if spec.args or spec.weights != "pretrained":
        given = "--model-arg" if spec.args else f"--weights {spec.weights}"
        raise BackboneError(f"model {spec.name}: an artifact has its own arguments and weights; drop {given}")
    artifact = store.load(folder, trust=trust)
    model, known = artifact.model(), artifact.backbone.input.model_dump()
    found = _input_of(known | spec.input.model_dump(exclude_none=True))
    backbone = artifact.backbone.model_copy(update={"input": found})
    _try(model, backbone)
    mapped = data.for_classes(backbone.num_classes) if data is not None else None
    return Start(replace(artifact, backbone=backbone), mapped, "")


def _read(weights: str) -> dict[str, Tensor] | None:
    if weights in FRESH:
        return None
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise BackboneError(
            f"--weights {weights}: is not `pretrained`, `none` or a .safetensors file; slim unpickles nothing, "
            "convert other formats with safetensors.torch.save_file"
        )
    if not path.is_file():
        raise BackboneError(f"--weights {weights}: no such file")
    return store.read_tensors(path)


def _default_classes(probe: Backbone) -> int | None:
    config = _pretrained_cfg(probe.name)
    if config is None and ":" not in probe.name:
        probe.build()  # not a timm model: says so, with the nearest name
    return int(config.num_classes) if config else None


def _pretrained_cfg(name: str) -> Any:
    """What timm knows of the weights of `name`; none for a factory, or a name it does not know."""
    import timm

    if ":" in name:
        return None
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
        raise BackboneError(f"model {name!r}: timm has no weights {tag!r} of it{did_you_mean(tag, tags)}") from error


def _classes_of(weights: dict[str, Tensor], name: str) -> int | None:
    """Rows of the classifier in the file; none where the network does not say which layer that is."""
    config = _pretrained_cfg(name)
    classifier = config.classifier if config else None
    first = classifier[0] if isinstance(classifier, tuple | list) else classifier
    weight = weights.get(f"{first}.weight")
    return weight.shape[0] if weight is not None else None


def _wanted(data: Data | None, default: int | None) -> int:
    if data is not None:
        return len(data.classes)
    if default is None:
        raise DataError("the number of classes is unknown: give --data, or a timm model that has a default")
    return default


def _preprocessing(model: nn.Module, spec: InputSpec) -> Preprocessing:
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model) if hasattr(model, "pretrained_cfg") else {}
    names = {"size": "input_size", "mean": "mean", "std": "std", "interpolation": "interpolation", "crop": "crop_pct"}
    values = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    return _input_of(values | spec.model_dump(exclude_none=True))


def _input_of(values: dict[str, Any]) -> Preprocessing:
    try:
        found = Preprocessing.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place, rule = ".".join(map(str, first["loc"])), first["msg"]
        raise BackboneError(f"input: {place} {first['input']!r}: {rule}; give another, it overrides timm's") from error
    for name, given in (("mean", found.mean), ("std", found.std)):
        if len(given) != found.size[0]:
            raise BackboneError(
                f"--{name} {','.join(map(str, given))}: {len(given)} values for {found.size[0]} channels; give one each"
            )
    return found


def _try(model: nn.Module, backbone: Backbone) -> None:
    """One image of the input's size has to come out as logits, else nothing later can work."""
    size = backbone.input.size
    try:
        with torch.inference_mode():
            outputs = model(torch.zeros(1, *size))
    except Exception as error:  # a network checks its input in as many ways as there are networks
        detail = " ".join(str(error).split())[:160] or type(error).__name__
        raise BackboneError(
            f"model {backbone.name!r} does not take an input of {size} ({detail}); "
            "check --input-size, or the --model-arg that sets the network's (img_size)"
        ) from error
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape != (1, backbone.num_classes):
        raise BackboneError(
            f"model {backbone.name!r} gives {shape} for one image, not {(1, backbone.num_classes)}; "
            "slim compresses classifiers, which return logits"
        )


def _download(spec: ModelSpec) -> dict[str, Tensor]:
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(spec.name, pretrained=True, **spec.args)
    except (OSError, RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())[:160]
        raise BackboneError(
            f"--weights pretrained: {spec.name} cannot be had from timm's hub ({detail}); "
            "give --weights PATH.safetensors, or --weights none to start fresh"
        ) from error
    state: dict[str, Tensor] = model.state_dict()
    return state


def _fill(model: nn.Module, weights: dict[str, Tensor], spec: ModelSpec, *, new_head: bool) -> bool:
    """Load strictly. With `new_head`, a head that does not fit is left as it was seeded; returns whether it was."""
    target = model.state_dict()
    wrong = [
        key for key in sorted(target.keys() | weights.keys()) if _shape(weights.get(key)) != _shape(target.get(key))
    ]
    heads = tuple(f"{name}." for name in surgery.classifiers(model))
    left = new_head and any(key.startswith(heads) for key in wrong)
    if left:
        wrong = [key for key in wrong if not key.startswith(heads)]
        weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    if wrong:
        first, more = wrong[0], f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise BackboneError(
            f"--weights {spec.weights}: does not fit {spec.name}: {first!r} is {_shape(weights.get(first))} in the "
            f"file, {_shape(target.get(first))} in the network{more}; check --model-arg"
        )
    model.load_state_dict({**target, **weights}, strict=True)
    return left


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else str(tuple(value.shape))
