"""The artifact a chain starts from: timm's network with its weights, its preprocessing, and a head that fits the data.

A class count that differs from the weights' means a new head: it belongs to the backbone, is seeded, and the first pass
has to train it. Weights come from timm's hub, a .safetensors file, or the seed; nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slim import store, surgery
from slim.artifact import Artifact, Backbone, Preprocessing
from slim.data import Data
from slim.errors import BackboneError, DataError

if TYPE_CHECKING:
    from slim.recipe import InputSpec, ModelSpec

FRESH = ("none", "pretrained")


@dataclass(frozen=True)
class Start:
    """Where a chain starts."""

    artifact: Artifact
    data: Data | None
    """The data with labels in the order of the network's outputs."""
    fresh_head: bool
    """Whether the classifier has never been trained."""


def start(spec: ModelSpec, data: Data | None, *, seed: int, trust: bool = False) -> Start:
    """The network of `spec`, with a head for `data`.

    Raises:
        BackboneError: unknown network, or weights that do not fit it.
        StoreError: a truncated weights file.
    """
    weights = _read(spec.weights)
    probe = Backbone(name=spec.name, kwargs=spec.args, num_classes=1)
    default = None if ":" in spec.name else _default_classes(spec.name)
    known = _classes_of(weights, spec.name) if weights is not None else None
    known = known or (default if spec.weights != "none" else None)
    classes = known if known and (data is None or data.fits(known)) else _wanted(data, default)
    backbone = probe.model_copy(update={"num_classes": classes})
    model = backbone.build(seed=seed, trust=trust)
    backbone = backbone.model_copy(update={"input": _preprocessing(model, spec.input)})
    fresh_head = known != classes
    if weights is None and spec.weights == "pretrained":
        weights = _download(spec)
    if weights is not None:
        _fill(model, weights, spec, keep_head=not fresh_head)
    mapped = data.for_classes(classes) if data is not None else None
    labels = data.labels(classes) if data is not None else None
    return Start(Artifact.of(model, backbone, labels=labels, trust=trust), mapped, fresh_head)


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


def _default_classes(name: str) -> int | None:
    import timm

    if not timm.is_model(name.split(".")[0]):
        return None  # Backbone.build reports it, with the nearest name
    config = timm.get_pretrained_cfg(name)
    return int(config.num_classes) if config else None


def _classes_of(weights: dict[str, Tensor], name: str) -> int | None:
    """Rows of the classifier in the file; none where the network does not say which layer that is."""
    import timm

    config = None if ":" in name else timm.get_pretrained_cfg(name)
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
    return Preprocessing.model_validate(values | spec.model_dump(exclude_none=True))


def _download(spec: ModelSpec) -> dict[str, Tensor]:
    import timm

    try:
        model = timm.create_model(spec.name, pretrained=True, **spec.args)
    except (OSError, RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())[:160]
        raise BackboneError(
            f"--weights pretrained: {spec.name} cannot be had from timm's hub ({detail}); "
            "give --weights PATH.safetensors, or --weights none to start fresh"
        ) from error
    state: dict[str, Tensor] = model.state_dict()
    return state


def _fill(model: nn.Module, weights: dict[str, Tensor], spec: ModelSpec, *, keep_head: bool) -> None:
    """Load strictly; the head alone may be left as it was seeded."""
    target = model.state_dict()
    heads = () if keep_head else tuple(f"{name}." for name in surgery.classifiers(model))
    wrong = [
        f"{key!r} is {_shape(weights.get(key))} in the file, {_shape(target.get(key))} in the network"
        for key in sorted(target.keys() | weights.keys())
        if not key.startswith(heads or "\0") and _shape(weights.get(key)) != _shape(target.get(key))
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise BackboneError(f"--weights {spec.weights}: does not fit {spec.name}: {wrong[0]}{more}; check --model-arg")
    kept = {key: value for key, value in weights.items() if not key.startswith(heads or "\0")}
    model.load_state_dict({**target, **kept}, strict=True)


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else str(tuple(value.shape))
