"""Quantisation-aware recovery: the network learns to put out in INT8 what it puts out in float.

Rounding is simulated while it trains (Jacob et al. 2018, arXiv:1712.05877), and the teacher is the network as it came,
in float; see fake_quant.py. Ranges are those of each batch. Nothing of them is kept: `quantize` behind it reads them
anew, and what is left is a float network like any other. Does not choose what is quantised, and quantises nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from slim import surgery
from slim.contract import Context, Pass, Plan, Role
from slim.data import Augment, Batch
from slim.distributed import on_main
from slim.errors import PassError
from slim.passes import calibration
from slim.passes.distill.logits import label_loss, soft_kl
from slim.passes.fake_quant import Layers, Scheme, ranges_of, simulated
from slim.passes.layers import calls_of, is_plain, skipped
from slim.training import Training


class Qat(Training, Augment, Pass):
    """Train the network so that INT8 changes less of what it puts out."""

    name: ClassVar[str] = "qat"
    role: ClassVar[Role] = "prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})

    activations: Scheme = "asymmetric"
    """How inputs of layers are served: uint8 with a zero point, as on ONNX Runtime, or int8 with zero point 0
    (`symmetric`), as on TensorRT and OpenVINO."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate, for one step over the whole batch; a hundredth of the usual one."""
    freeze_norms: bool = True
    """Batch norms keep their statistics and normalise by them: these are what is folded into the layers that are
    quantised."""
    label_weight: float = Field(default=0.0, ge=0)
    """Weight of cross-entropy with the labels, added; 0 reads no label."""
    skip: tuple[str, ...] = ()
    """Layers left in float, as patterns of dotted names: `stages.0.*`; give `quantize` the same."""

    @property
    def reads(self) -> frozenset[str]:
        """Images to train on, and those that ranges will be read off."""
        return frozenset({"train", "calib"})

    @property
    def trains(self) -> bool:
        """Of a classifier that knows nothing, only from labels."""
        return self.label_weight > 0

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Which layers are in INT8, and why the others are not."""
        assert context.backbone is not None  # Pass.__call__ set it
        found = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
        unwanted = skipped(self.name, self.skip, found)
        plain = [name for name, layer in found.items() if is_plain(layer)]
        calls = calls_of(model, plain, context.backbone.input.size)
        # Of a layer that is not called the network reads the weight itself, and its input is not seen.
        layers: dict[str, JsonValue] = {
            name: ["weight", "input"] if calls[name] else ["weight"] for name in plain if name not in unwanted
        }
        reasons = {name: "in skip" if name in unwanted else "it does not compute with its weight as it is"
                   for name in found if name not in layers}  # fmt: skip
        if not layers:
            why = "; ".join(sorted(set(reasons.values()))) or "no Linear layer or convolution"
            raise PassError(f"qat: no layer can be in INT8 ({why}); skip less, or leave the pass out")
        return {"layers": layers, "left": cast(JsonValue, reasons)}

    def fit(self, model: nn.Module, teacher: nn.Module, context: Context) -> dict[str, JsonValue]:
        """Train in place."""
        layers = cast(Layers, context.plan["layers"])
        before = self._rated(model, teacher, layers, context)
        with surgery.on_device(context.device, teacher):
            figures = context.train(model, Recovering(teacher, layers, self), self, self)
        after = self._rated(model, teacher, layers, context)
        context.log.info(
            "qat: with %d layers in INT8 %.1f %% of the calibration images keep their class, %.1f %% before;"
            " KL %.4f, %.4f before",
            *(len(layers), after["agreement"], before["agreement"], after["kl"], before["kl"]),
        )
        if after["kl"] > before["kl"]:
            context.log.warning("qat: INT8 is further from the float network than before; lower --lr, or leave it out")
        return {**figures, "int8": {"before": {**before}, "after": {**after}}}

    def _rated(self, model: nn.Module, teacher: nn.Module, layers: Layers, context: Context) -> dict[str, float]:
        """The network in simulated INT8 beside the teacher, on the calibration images and with the ranges of them all.

        Percent of `agreement` on the class, and `kl` in nat.
        """

        def images() -> Iterator[Tensor]:
            return (one.to(context.device) for one in calibration.images(context))

        def look() -> dict[str, float]:
            inputs = [name for name, parts in layers.items() if "input" in parts]
            with surgery.on_device(context.device, model, teacher), surgery.in_eval(model), surgery.in_eval(teacher):
                ranges = ranges_of(model, inputs, images())
                both = [(simulated(model, one, layers, self.activations, ranges), teacher(one)) for one in images()]
            ours, theirs = (torch.cat(logits) for logits in zip(*both, strict=True))
            agreement = 100 * (ours.argmax(1) == theirs.argmax(1)).float().mean()
            apart = soft_kl(ours, theirs, kind="forward")
            return {"agreement": round(float(agreement), 4), "kl": round(float(apart), 6)}

        return on_main(look)


class Recovering:
    """The loss of a step: KL(network in float, as it was || network in INT8), and that of the labels."""

    def __init__(self, teacher: nn.Module, layers: Layers, settings: Qat) -> None:
        self.teacher, self.layers, self.settings = teacher, layers, settings

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named losses, float32 scalars."""
        with torch.no_grad():
            theirs = self.teacher(batch.images)
        ours = simulated(model, batch.images, self.layers, self.settings.activations)
        losses = {"kl": soft_kl(ours, theirs, kind="forward")}
        if self.settings.label_weight:
            losses["label"] = label_loss(ours, batch.target) * self.settings.label_weight
        return losses
