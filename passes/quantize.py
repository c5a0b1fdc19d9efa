"""Fewer bits: the exported file computes in INT8, or in half precision. The network itself stays as it is.

Post-training quantisation with static ranges (Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018,
arXiv:1806.08342): one scale for each output channel of a weight, one range for each activation, read off calibration
images. How ranges are read, and which layers are left in float, is chosen by how many calibration images keep their
class on the target. The plan holds all ranges, so exporting later needs no data, and each target gets the form that it
takes. Trains nothing; see `qat` for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, cast

from pydantic import Field, JsonValue
from torch import nn

from slim.contract import Context, Fed, Meter, Pass, Plan, Role
from slim.errors import PassError
from slim.measurement import Measurement
from slim.passes.layers import skipped
from slim.quantization import Method, Quantization, module_of

LARGEST_HALF = 65504.0
"""Largest number in half precision."""

HEADROOM = 8.0
"""Other images may have activations so many times as large as those of the calibration images."""

FRAGILE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""They sum squares, which half precision overflows on first. Batch norms are folded into layers, and sum nothing."""


class Quantize(Pass):
    """Serve the network in INT8 or half precision, with ranges and exceptions chosen on calibration images."""

    name: ClassVar[str] = "quantize"
    role: ClassVar[Role] = "structure"
    needs: ClassVar[frozenset[str]] = frozenset({"float"})
    drops: ClassVar[frozenset[str]] = frozenset({"float"})

    precision: Literal["int8", "fp16"] = "int8"
    """What the file computes in."""
    methods: tuple[Method, ...] = Field(default=("minmax", "percentile-99.99"), min_length=1)
    """How ranges of activations may be read: minmax, entropy, percentile-99.99, percentile-99.9; of several, the one
    with which most calibration images keep their class. INT8 alone."""
    agreement: float = Field(default=97.0, ge=0, le=100)
    """Calibration images that are to keep their class, percent; layers are left in float until so many do, which costs
    speed. Parity asks for 95 on other images. INT8 alone."""
    most_float: float = Field(default=0.1, ge=0, lt=1)
    """Largest share of the layers left in float for `agreement`, those that change the logits most. INT8 alone."""
    skip: tuple[str, ...] = ()
    """Layers left in float whatever they change, as patterns of dotted names: `stages.0.*`."""

    @property
    def reads(self) -> frozenset[str]:
        """Calibration images."""
        return frozenset({"calib"})

    @property
    def measures(self) -> bool:
        """Ranges are read, and files compared, on the target."""
        return True

    def caveat(self, figures: Mapping[str, Measurement]) -> str:
        """Why INT8 is not faster, where layers are not computed in it."""
        fused = figures.get("int8_coverage")
        if fused is None or fused.value == 100:
            return ""
        return f"{fused.value:.0f} % of {fused.n} layers are computed in INT8"

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Ranges, and layers left in float, with what each candidate was found to keep."""
        meter, fed = context.meter, context.fed(model)
        assert meter is not None  # `measures`
        if self.precision == "fp16":
            return self._half(model, fed, meter)
        layers = meter.layers(fed)
        if not layers:
            raise PassError("quantize: the exported graph has no convolution or Linear layer to serve in INT8")
        unwanted = self._unwanted(layers)
        tried: list[JsonValue] = []
        with context.progress("quantize", len(self.methods)) as advance:
            rated = []
            for method in self.methods:
                setting = meter.calibrate(fed, method).model_copy(update={"floats": unwanted})
                rated.append((setting, _rated(setting, fed, meter, tried)))
                advance(1, f"{method}: {rated[-1][1].value:.1f} % keep their class")
        best, found = max(rated, key=_worth)
        if found.value < self.agreement:
            best, found = self._spared(best, found, layers, fed, context, tried)
        return {"quantization": cast(JsonValue, best.model_dump(mode="json")), "candidates": tried}

    def _spared(
        self,
        best: Quantization,
        found: Measurement,
        layers: Sequence[str],
        fed: Fed,
        context: Context,
        tried: list[JsonValue],
    ) -> tuple[Quantization, Measurement]:
        """The setting with as few more layers in float as `agreement` takes; the best one where none reaches it."""
        meter = context.meter
        assert meter is not None  # `measures`
        most = int(self.most_float * len(layers))
        open_ = [layer for layer in layers if layer not in best.floats]
        if not most or len(open_) <= most:
            return best, found
        change: dict[str, float] = {}
        with context.progress("layers alone in INT8", len(open_)) as advance:
            for layer in open_:
                alone = best.model_copy(update={"floats": tuple(other for other in layers if other != layer)})
                rated = meter.fidelity(replace(fed, quantization=alone), fed)
                change[layer] = rated.details["mse"]
                advance(1, layer)
        worst = sorted(open_, key=lambda layer: -change[layer])
        for count in _doubling(most):
            spared = {*best.floats, *worst[:count]}
            setting = best.model_copy(update={"floats": tuple(layer for layer in layers if layer in spared)})
            rated = _rated(setting, fed, meter, tried)
            if _worth((setting, rated)) > _worth((best, found)):
                best, found = setting, rated
            if found.value >= self.agreement:
                break
        return best, found

    def _unwanted(self, layers: Sequence[str]) -> tuple[str, ...]:
        modules = {layer: module_of(layer) for layer in layers}
        names = skipped("quantize", self.skip, modules.values())
        if names and names.issuperset(modules.values()):
            raise PassError(f"quantize: skip leaves all {len(layers)} layers in float; skip less, or drop the pass")
        return tuple(layer for layer, module in modules.items() if module in names)

    def _half(self, model: nn.Module, fed: Fed, meter: Meter) -> Plan:
        """Norms, and whatever comes near the largest number, stay in 32 bits."""
        ranges = meter.calibrate(fed, "minmax").ranges
        loud = {module_of(key) for key, ends in ranges.items() if HEADROOM * max(map(abs, ends)) > LARGEST_HALF}
        modules = dict(model.named_modules())
        unwanted = skipped("quantize", self.skip, filter(None, modules))
        kept = [
            name
            for name, module in modules.items()
            if name and (isinstance(module, FRAGILE) or name in loud or name in unwanted)
        ]
        setting = Quantization(precision="fp16", floats=tuple(kept))
        tried: list[JsonValue] = []
        _rated(setting, fed, meter, tried)
        return {"quantization": cast(JsonValue, setting.model_dump(mode="json")), "candidates": tried}


def _rated(setting: Quantization, fed: Fed, meter: Meter, tried: list[JsonValue]) -> Measurement:
    found = meter.fidelity(replace(fed, quantization=setting), fed)
    tried.append(
        {
            "method": setting.method or setting.precision,
            "float_layers": len(setting.floats),
            "agreement": round(found.value, 4),
            "cosine": round(found.details["cosine"], 6),
            "mse": round(found.details["mse"], 8),
        }
    )
    return found


def _worth(rated: tuple[Quantization, Measurement]) -> tuple[float, float]:
    return rated[1].value, -rated[1].details["mse"]


def _doubling(most: int) -> Iterator[int]:
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most
