"""Backbone, Step, Artifact: a network, what was done to it, and its values.

An artifact is frozen. It never holds a module: `model()` builds the backbone, replays every step's `rewrite` and loads
the values, so a network that cannot be rebuilt cannot exist as an artifact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import Tensor, nn

from slim import costs
from slim.errors import BackboneError, did_you_mean

FRESH = frozenset({"dense", "float"})
"""Traits of an untouched network: full-rank unpruned layers, floating-point values."""
NOT_STRUCTURE = frozenset(
    {"cache_dir", "checkpoint_path", "device", "dtype", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
)
"""Arguments of timm that say where values come from or lie. Refused: an artifact's file must not have others read."""


class Preprocessing(BaseModel):
    """How an image becomes the network's input; timm's data config under its own names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: tuple[int, int, int] = (3, 224, 224)
    """Channels, height, width in pixels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, for values in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel, for values in [0, 1]."""
    interpolation: str = "bicubic"
    """`nearest`, `bilinear` or `bicubic`."""
    crop: float = Field(default=0.875, gt=0, le=1)
    """Share of the resized image that the centre crop keeps, in (0, 1]."""


class Backbone(BaseModel):
    """How to build the untouched network."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """A timm model name, or `package.module:factory`."""
    kwargs: dict[str, JsonValue] = {}
    """Arguments of the timm model or the factory."""
    num_classes: int = Field(ge=1)
    """Outputs of the classifier."""
    input: Preprocessing = Preprocessing()
    """What the network is fed."""

    def build(self, *, seed: int = 0, trust: bool = False) -> nn.Module:
        """The untouched network with fresh values drawn from `seed`, on the CPU, in eval mode.

        Raises:
            BackboneError: unknown name, arguments the model does not take, or a factory without `trust`.
        """
        # Built on the CPU, not on `meta`: non-persistent buffers (Swin 17, MaxViT 44) exist only in a real build.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._create(trust).eval()

    def _create(self, trust: bool) -> nn.Module:
        if ":" in self.name:
            return self._from_factory(trust)
        import timm

        if not timm.is_model(self.name):
            near = did_you_mean(self.name.split(".")[0], timm.list_models())
            raise BackboneError(f"model {self.name!r} is not a timm model{near}")
        if refused := sorted(NOT_STRUCTURE & self.kwargs.keys()):
            raise BackboneError(f"model {self.name!r}: argument {refused[0]!r} is no part of a network; use --weights")
        try:
            model: nn.Module = timm.create_model(
                self.name, pretrained=False, num_classes=self.num_classes, **self.kwargs
            )
        except Exception as error:  # timm's constructors fail in as many ways as there are arguments
            detail = " ".join(str(error).split())[:200] or type(error).__name__
            raise BackboneError(f"model {self.name!r} cannot be built with {self.kwargs}: {detail}") from error
        return model

    def _from_factory(self, trust: bool) -> nn.Module:
        if not trust:
            raise BackboneError(
                f"model {self.name!r} runs code of yours to build the network; add --trust if you wrote it"
            )
        import importlib

        module, _, factory = self.name.partition(":")
        try:
            build = getattr(importlib.import_module(module), factory)
        except (ImportError, AttributeError, ValueError) as error:
            raise BackboneError(f"model {self.name!r} cannot be imported: {error}; check --model") from error
        try:
            model = build(num_classes=self.num_classes, **self.kwargs)
        except TypeError as error:
            raise BackboneError(f"model {self.name!r} does not take {self.kwargs}: {error}") from error
        if not isinstance(model, nn.Module):
            raise BackboneError(f"model {self.name!r} returned {type(model).__name__}, not a torch module")
        return model


class Step(BaseModel):
    """One entry of the history: what a pass was, decided and left behind."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Pass name, looked up in the literal table of slim/passes/__init__.py."""
    version: int
    """Version of the pass that wrote the plan."""
    config: dict[str, JsonValue]
    """Every field of the pass."""
    plan: dict[str, JsonValue]
    """What `plan` decided; `rewrite` needs nothing else."""
    seed: int
    """Seed of the run."""
    data_id: str | None = None
    """Fingerprint of the dataset, none where the pass had none."""
    digests: dict[str, str] = {}
    """`input`, `output` and `reference` (before the stage): digests of artifacts; and what else the pass names."""
    metrics: dict[str, JsonValue] = {}
    """What `fit` recorded, such as the loss of each epoch; what was measured stands in the run's steps.jsonl."""
    environment: dict[str, JsonValue] = {}
    """Library versions and device."""
    guard: bool = True
    """False when the run was told to keep every step whatever it cost."""


@dataclass(frozen=True)
class Artifact:
    """A model and its history; frozen."""

    backbone: Backbone
    state: Mapping[str, Tensor]
    """Parameters and persistent buffers by state-dict key, on the CPU. Read only."""
    history: tuple[Step, ...] = ()
    labels: tuple[str, ...] | None = None
    """Class names in output order, none where unknown."""
    trust: bool = field(default=False, compare=False)
    """Whether a `package.module:factory` backbone may be imported."""

    @classmethod
    def of(cls, model: nn.Module, backbone: Backbone, **fields: Any) -> Artifact:
        """Artifact holding a copy of `model`'s values."""
        state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
        return cls(backbone=backbone, state=state, **fields)

    def model(self) -> nn.Module:
        """A plain eager module with these values, on the CPU, in eval mode; yours to change.

        Raises:
            StoreError: the history does not rebuild a network with these keys, shapes and dtypes.
        """
        from slim.store import rebuild

        return rebuild(self)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the values, loadable into `model()`."""
        return {key: value.clone() for key, value in self.state.items()}

    @cached_property
    def weights(self) -> str:
        """sha256 of the values, computed once: `verify` compares it with the values as they are later."""
        return state_digest(self.state)

    @cached_property
    def costs(self) -> dict[str, int]:
        """Parameters and multiply-accumulates, counted once; see slim/costs.py."""
        return costs.count(self.model(), self.backbone.input.size)

    @cached_property
    def digest(self) -> str:
        """sha256 over the structure (backbone, plans) and the values; what a later step names as its input."""
        structure = [self.backbone.model_dump(mode="json"), [[s.name, s.version, s.plan] for s in self.history]]
        head = json.dumps(structure, sort_keys=True).encode()
        return hashlib.sha256(head + self.weights.encode()).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over keys, dtypes, shapes and bytes, in key order; equal exactly where the values are bit-identical."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
