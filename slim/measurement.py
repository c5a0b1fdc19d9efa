"""Measurement: a number with its unit, its interval and everything it depended on."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Measurement(BaseModel):
    """One measured figure."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: str
    """What was measured: a metric name of budgets.yaml, such as `latency_p50_ms`, or `accuracy_top1`."""
    value: float = Field(allow_inf_nan=False)
    """The figure, in `unit`."""
    unit: str
    """`ms`, `bytes`, `percent`, `points`, `ratio`, `params`, `macs`."""
    n: int = 1
    """Samples behind the figure: timed calls, or images."""
    low: float | None = Field(default=None, allow_inf_nan=False)
    """Lower end of the 95 % interval, in `unit`; none for a figure that is counted, not sampled."""
    high: float | None = Field(default=None, allow_inf_nan=False)
    """Upper end of the 95 % interval, in `unit`."""
    statistic: str = ""
    """How `value` was made from the samples: `p50`, `p95`, `mean`."""
    target: str | None = None
    """The target it was taken on, in the words of `--target`; none for a property of the file itself."""
    environment: dict[str, Any] = {}
    """Device, threads and library versions (see slim/environment.py)."""
    samples: tuple[float, ...] = ()
    """Raw samples, in `unit`, in the order they were taken."""
    details: dict[str, Any] = {}
    """Whatever else the reader needs to judge the figure, such as the A/A control."""

    def __str__(self) -> str:
        """`2.71 ms (p50, n=500, 95% 2.69..2.73)`."""
        figure = f"{self.value:.4g}" if abs(self.value) < 1e5 else f"{self.value:,.0f}"
        if self.low is None or self.high is None:
            return f"{figure} {self.unit}"
        statistic = f"{self.statistic}, " if self.statistic else ""
        return f"{figure} {self.unit} ({statistic}n={self.n}, 95% {self.low:.4g}..{self.high:.4g})"
