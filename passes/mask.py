"""Masks: two of every four consecutive weights become zero, and stay so in whatever is trained afterwards.

The 2:4 pattern of sparse tensor cores (Mishra et al. 2021, arXiv:2104.08378). Which two is chosen by what they change
in the layer's output for the calibration images, or by magnitude; then the others are fine-tuned. No tensor gets
smaller: the zeros pay on runtimes with kernels for them, and nowhere else. `unstructured` magnitude pruning (Han et al.
2015, arXiv:1506.02626) pays nowhere, and is there to be compared with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self, cast

from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from slim import surgery
from slim.contract import Context, Pass, Plan, Role
from slim.data import Augment
from slim.distributed import is_main
from slim.errors import PassError
from slim.measurement import Measurement
from slim.passes import calibrate, calibration
from slim.passes.calibrate import Layer
from slim.passes.finetune import label_loss
from slim.passes.layers import calls_of, is_plain, skipped
from slim.passes.patterns import GROUP, cheapest, two_of_four
from slim.training import Training


class Mask(Training, Augment, Pass):
    """Set weights to zero, two of every four, and fine-tune the others."""

    name: ClassVar[str] = "mask"
    role: ClassVar[Role] = "structure"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})

    pattern: Literal["2:4", "unstructured"] = "2:4"
    """Two of every four consecutive inputs, or any weights of a layer: a baseline, which no runtime is faster with."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """With `unstructured`: share of each layer's weights set to zero, in (0, 1)."""
    criterion: Literal["magnitude", "gram"] = "gram"
    """Zero is what changes the layer's output least for the calibration images (`gram`), or the smallest weights."""
    epochs: int = Field(default=10, ge=0)
    """Passes over the training split with the zeros held; 0 sets the zeros and trains nothing."""
    skip: tuple[str, ...] = ()
    """Layers left as they are, as patterns of dotted names: `stages.0.*`."""
    memory_gb: float = Field(default=2.0, gt=0)
    """Memory for second moments of inputs, GB; beyond it those of k x k convolutions are simplified, largest first."""

    @model_validator(mode="after")
    def _half_of_four(self) -> Self:
        if self.pattern == "2:4" and self.share != type(self).model_fields["share"].default:
            raise ValueError(f"share={self.share:g} does not go with 2:4, which is a half; give pattern unstructured")
        return self

    @property
    def reads(self) -> frozenset[str]:
        """Calibration images where inputs are looked at, labelled ones where values are trained."""
        looks = {"calib"} if self.criterion == "gram" else set()
        return frozenset(looks | ({"train"} if self.epochs else set()))

    def caveat(self, figures: Mapping[str, Measurement]) -> str:
        """Where zeros pay, if anywhere."""
        if self.pattern == "2:4":
            return "2:4 zeros pay only on TensorRT and CUDA sparse kernels"
        return "unstructured zeros give no latency gain on any runtime here: a baseline only"

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Which layers get zeros, and why the others get none."""
        names, left = self._layers(model, context)
        if not names:
            reasons = "; ".join(sorted(set(left.values()))) or "no Linear layer or convolution"
            raise PassError(f"mask: {self.pattern} fits no layer ({reasons}); skip less, or leave the pass out")
        entry: JsonValue = {"pattern": self.pattern, "kept": round(1 - self.share, 6)}
        sparse: list[JsonValue] = [f"{name}.weight" for name in names]
        return {"layers": dict.fromkeys(names, entry), "left": cast(JsonValue, left), "sparse": sparse}

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue]:
        """Set the zeros, then train the rest; the training loop reads off the plan which zeros to keep."""
        names = [*cast(dict[str, JsonValue], context.plan["layers"])]
        if is_main():  # training hands rank 0's values on
            self._set_zeros(model, names, context)
        trained = context.train(model, label_loss, self, self) if self.epochs else {}
        weights = [_layer(model, name).weight for name in names]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        return {"zeros": round(zeros, 6), **trained}

    def _set_zeros(self, model: nn.Module, names: Sequence[str], context: Context) -> None:
        seconds = self._second_moments(model, names, context) if self.criterion == "gram" else {}
        for name in names:
            weight, second = _layer(model, name).weight, seconds.pop(name, None)
            two = self.pattern == "2:4"
            zeros = two_of_four(weight, second) if two else cheapest(weight, self.share, second)
            weight.detach().masked_fill_(zeros, 0)

    def _second_moments(self, model: nn.Module, names: Sequence[str], context: Context) -> dict[str, Tensor]:
        data = context.data
        if data is None or not data.has("calib"):
            raise PassError("mask: there are no calibration images; give data with a training split, or magnitude")
        with surgery.on_device(context.device, model):
            moments = calibrate.collect(
                model,
                names,
                calibration.images(context),
                images=len(data.split("calib")),
                memory_gb=self.memory_gb,
                device=context.device,
                progress=context.progress,
            )
        return {name: found.second[0] for name, found in moments.items()}

    def _layers(self, model: nn.Module, context: Context) -> tuple[list[str], dict[str, str]]:
        """Layers that get zeros, and why each other one gets none."""
        assert context.backbone is not None  # Pass.__call__ set it
        found = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
        unwanted = skipped("mask", self.skip, found)
        heads = surgery.classifiers(model)
        owners = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
        plain = [name for name, layer in found.items() if is_plain(layer)]
        # The weights of layers that are not called have no inputs to be seen.
        calls = calls_of(model, plain, context.backbone.input.size) if self.criterion == "gram" else None
        left: dict[str, str] = {}
        for name, layer in found.items():
            inputs = layer.weight.shape[1]
            if name in heads:
                left[name] = "classifier"
            elif name in unwanted:
                left[name] = "in skip"
            elif name not in plain:
                left[name] = "it does not compute with its weight as it is"
            elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
                left[name] = "depthwise" if layer.groups == layer.in_channels else "grouped"
            elif self.pattern == "2:4" and inputs % GROUP:
                left[name] = f"{inputs} inputs are no multiple of {GROUP}"
            elif owners[id(layer.weight)] > 1:
                left[name] = "its weight is shared"
            elif calls is not None and not calls[name]:
                left[name] = "its weight is read directly, not called"
            elif not layer.weight.isfinite().all():
                raise PassError(f"mask: layer {name!r} holds values that are not finite; start from weights that are")
            elif not layer.weight.any():
                left[name] = "its weight is zero"
        return [name for name in found if name not in left], left


def _layer(model: nn.Module, name: str) -> Layer:
    return cast(Layer, model.get_submodule(name))
