"""In how many bits a file computes: what the pass `quantize` decided, and every target writes in its own form.

Tensors and nodes of an exported graph are named by the module they come from, `layer1.0.conv1/Conv/0`: module,
operator, running number within the module. The names in the file are an exporter's, and change with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from slim.errors import StoreError

if TYPE_CHECKING:
    from slim.artifact import Step

Method = Literal["minmax", "entropy", "percentile-99.99", "percentile-99.9"]
METHODS: tuple[Method, ...] = get_args(Method)
"""How the range of an activation is read off images: its ends; those that lose least information (Migacz 2017); those
that hold so many percent of its values."""

IMAGE = "image"
"""Key of the graph's input."""


class Quantization(BaseModel):
    """What is served in fewer bits, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Literal["int8", "fp16"] = "int8"
    """What the file computes in."""
    graph: str = ""
    """sha256 of the structure of the graph whose ranges these are: operators, attributes, edges and shapes."""
    method: str = ""
    """How the ranges were read; one of METHODS."""
    ranges: dict[str, tuple[float, float]] = {}
    """Key of a tensor -> its least and largest value."""
    floats: tuple[str, ...] = ()
    """What stays in 32 bits: keys of nodes with INT8, names of modules with half precision."""


def module_of(key: str) -> str:
    """Name of the module that a key begins with; empty for the network itself."""
    return key.rsplit("/", 2)[0] if "/" in key else ""


def quantization_of(history: Sequence[Step]) -> Quantization | None:
    """In how many bits the network of this history is served; none for 32.

    Raises:
        StoreError: a plan that this slim cannot read.
    """
    step = next((step for step in reversed(history) if step.name == "quantize"), None)
    if step is None:
        return None
    try:
        return Quantization.model_validate(step.plan.get("quantization"))
    except ValidationError as error:
        raise StoreError(
            f"step {step.name!r}: its plan is no quantization: {error.errors()[0]['msg']}; use the slim that wrote it"
        ) from error
