"""Latency of exported files: one file in ms, or two files as a paired ratio.

The sides of a comparison run in lockstep, each in a worker of its own: in every round each side, in random order, makes
one call that is not recorded and a few that are. What disturbs the machine for longer than a round disturbs all sides.
A third side is the reference once more, in a second worker: if the comparison finds a difference between a file and
itself, this machine is unfit to judge just now, and no verdict is given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from slim import environment
from slim.bench import statistics
from slim.bench.statistics import Array, Interval
from slim.bench.worker import Worker, device, golden
from slim.errors import SlimError
from slim.export.target import Target
from slim.measurement import Measurement

if TYPE_CHECKING:  # the contract of passes loads torch, which timing an .onnx file does not need
    from slim.contract import Advance, Progress

Outcome = Literal["pass", "fail", "inconclusive"]


class Protocol(BaseModel):
    """How often what is called, and what counts as a difference."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sessions: int = Field(default=8, ge=3)
    """Times each side opens its session; two sessions of one file differ by about 1 % on a 2 ms network."""
    rounds: int = Field(default=16, ge=2)
    """Rounds in each session."""
    calls: int = Field(default=3, ge=1)
    """Recorded calls of each side in a round, after one that is not."""
    warm_up: int = Field(default=5, ge=1)
    """Calls thrown away after a session is opened."""
    aim_s: float = Field(default=20.0, gt=0)
    """Time aimed at, seconds: a slow network gets fewer rounds in each session (they spread less), never under 4."""
    max_rounds: int = Field(default=512, ge=2)
    """Rounds of all sessions together that doubling may reach while the limit is undecided."""
    tolerance: float = Field(default=0.02, gt=0, lt=1)
    """Share by which a ratio must differ from 1, with its whole interval, to be called a difference."""
    cpus: tuple[int, ...] | None = None
    """Cores the workers are bound to; none leaves them to the scheduler."""


FEWEST_ROUNDS = 4


def compare(
    candidate: Path,
    reference: Path,
    target: Target,
    *,
    seed: int,
    protocol: Protocol | None = None,
    limit: float | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Ratio of latencies candidate / reference, paired in one run on this machine; below 1 is faster.

    `value` is the median over rounds of the ratio of the sides' fastest calls; `samples` are these ratios. `details`
    holds both sides' p50 and p95 with raw calls, the CPU time ratio, the control and the steadiness. With `limit` the
    sessions are doubled, up to `protocol.max_rounds`, while the interval holds the limit.

    Raises:
        UsageError: a file that is not there, or does not take the target's batch.
        MissingExtra: the target's runtime is not installed.
        SlimError: the runtime cannot open a file, or a worker died.
    """
    protocol = protocol or Protocol()
    with _Lockstep((candidate, reference, reference), target, protocol, seed, progress) as lockstep:
        lockstep.extend(protocol.sessions)
        while True:
            found = _compared(lockstep, protocol, seed)
            undecided = limit is not None and verdict(found, limit) == "inconclusive"
            settling = found.details["steady"]["drifting"] and not lockstep.extended
            if not ((undecided or settling) and lockstep.doubles()):
                return found
            lockstep.extend(lockstep.sessions)


def latency(
    path: Path, target: Target, *, seed: int, protocol: Protocol | None = None, progress: Progress | None = None
) -> Measurement:
    """p50 in ms of one call at the target's batch size, on this machine. `details` holds p95 and peak memory.

    Figures in ms are for this machine and this moment; two files are compared by `compare`. Raises as `compare`.
    """
    return in_turn((path,), target, seed=seed, protocol=protocol, progress=progress)[0]


def in_turn(
    paths: Sequence[Path],
    target: Target,
    *,
    seed: int,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
) -> tuple[Measurement, ...]:
    """p50 in ms of each file, in the order of `paths`, taken in turn in one run.

    What disturbs the machine disturbs them all, so these may be read side by side, as separate runs may not. Raises as
    `compare`.
    """
    protocol = protocol or Protocol()
    with _Lockstep(paths, target, protocol, seed, progress) as lockstep:
        lockstep.extend(protocol.sessions)
        drifting = any(_settling(lockstep, side, protocol, seed)["drifting"] for side in range(len(paths)))
        if drifting and lockstep.doubles():
            lockstep.extend(lockstep.sessions)
        return tuple(_alone(lockstep, side, protocol, seed) for side in range(len(paths)))


def beside(
    paths: Sequence[Path],
    reference: Path,
    target: Target,
    *,
    seed: int,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
) -> tuple[Measurement, ...]:
    """Ratio of the latency of each file to that of `reference`, in the order of `paths`, all taken in turn in one run.

    `value` is what it is for `compare`, without a control: for networks by the dozen, of which none is judged alone.
    Rounds stand for their fastest calls, so a busy machine is told less than by `latency`. Raises as `compare`.
    """
    protocol = protocol or Protocol()
    with _Lockstep((reference, *paths), target, protocol, seed, progress) as lockstep:
        lockstep.extend(protocol.sessions)
        found = []
        for side in range(1, len(paths) + 1):
            ours, theirs = lockstep.wall(side), lockstep.wall(0)
            ratio = statistics.paired_ratio(ours, theirs, generator=np.random.default_rng(seed))
            found.append(
                _ratio(ratio, lockstep, n=ours.size, details=lockstep.conditions() | {"in_turn_with": len(paths)})
            )
        return tuple(found)


def _ratio(ratio: Interval, lockstep: _Lockstep, **fields: Any) -> Measurement:
    return Measurement(
        metric="latency_ratio",
        value=ratio.value,
        unit="ratio",
        low=ratio.low,
        high=ratio.high,
        statistic="median of paired rounds",
        target=str(lockstep.target),
        environment=lockstep.environment,
        **fields,
    )


def _alone(lockstep: _Lockstep, side: int, protocol: Protocol, seed: int) -> Measurement:
    wall = lockstep.wall(side)
    p50 = statistics.bootstrap(wall, statistics.median, generator=np.random.default_rng(seed))
    details = lockstep.conditions() | {
        "in_turn_with": len(lockstep.paths) - 1,
        "p95_ms": _tail(wall, 0.95, seed),
        "min_ms": round(float(wall.min()), 6),
        "peak_memory_bytes": lockstep.peak_memory_bytes(side),
        "steady": _settling(lockstep, side, protocol, seed),
    }
    return Measurement(
        metric="latency_p50_ms",
        value=p50.value,
        unit="ms",
        n=wall.size,
        low=p50.low,
        high=p50.high,
        statistic="p50",
        target=str(lockstep.target),
        environment=lockstep.environment,
        samples=_raw(wall),
        details=details,
    )


def _settling(lockstep: _Lockstep, side: int, protocol: Protocol, seed: int) -> dict[str, Any]:
    return _steadiness(np.log(lockstep.wall(side).min(axis=-1)), protocol, seed)


def p95(measurement: Measurement) -> Measurement:
    """The p95 of what `latency` measured, as a figure of its own.

    Raises:
        SlimError: too few calls for a p95.
    """
    found = measurement.details["p95_ms"]
    if "refused" in found:
        raise SlimError(f"latency_p95_ms: {found['refused']}; raise the rounds of the protocol")
    return measurement.model_copy(update={"metric": "latency_p95_ms", "statistic": "p95", **found})


def side_figures(ratio: Measurement, side: Literal["candidate", "reference"]) -> dict[str, Measurement]:
    """`latency_p50_ms` of one side of a comparison, and `latency_p95_ms` where enough calls were timed.

    They keep the comparison's control: a machine unfit to judge a ratio is not fit to judge milliseconds either.
    """
    found, figures = ratio.details[side], {}
    control = {key: ratio.details["control"][key] for key in ("value", "low", "high", "fit")}
    for statistic in ("p50", "p95"):
        interval = found[f"{statistic}_ms"]
        if "refused" in interval:
            continue
        figures[f"latency_{statistic}_ms"] = Measurement(
            metric=f"latency_{statistic}_ms",
            value=interval["value"],
            unit="ms",
            n=ratio.n,
            low=interval["low"],
            high=interval["high"],
            statistic=statistic,
            target=ratio.target,
            environment=ratio.environment,
            details={"peak_memory_bytes": found["peak_memory_bytes"], "control": control},
        )
    return figures


def verdict(measurement: Measurement, limit: float, *, bound: Literal["max", "min"] = "max") -> Outcome:
    """`pass` or `fail` only if the whole interval lies on one side of `limit`; `limit` itself passes.

    A comparison whose control found a file to differ from itself is inconclusive, never a failure. A figure without
    interval was counted, and stands for itself.
    """
    if not measurement.details.get("control", {"fit": True})["fit"]:
        return "inconclusive"
    low, high = _ends(measurement)
    if bound == "min":
        low, high, limit = -high, -low, -limit
    if high <= limit:
        return "pass"
    return "fail" if low > limit else "inconclusive"


def differs(measurement: Measurement, tolerance: float = Protocol().tolerance) -> bool:
    """Whether a ratio's whole interval lies outside 1 +- `tolerance`."""
    return Interval(measurement.value, *_ends(measurement)).leaves(1.0, tolerance)


def _ends(measurement: Measurement) -> tuple[float, float]:
    if measurement.low is None or measurement.high is None:
        return measurement.value, measurement.value
    return measurement.low, measurement.high


class _Lockstep:
    """Workers taking turns, one for each side, and all their timings so far."""

    def __init__(
        self, paths: Sequence[Path], target: Target, protocol: Protocol, seed: int, progress: Progress | None
    ) -> None:
        self.paths, self.target, self.protocol, self.seed, self.progress = paths, target, protocol, seed, progress
        self.extended = False
        self.rounds = 0
        self._timings: list[Array] = []
        self._order = np.random.default_rng(seed)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            self._device = starting.enter_context(device(self.target))
            self._before = _host()
            self._workers = [
                starting.enter_context(Worker(self.target, host=self._device, cpus=self.protocol.cpus))
                for _ in self.paths
            ]
            self.environment = self._device.describe() if self._device else environment.describe()
            self._stack = starting.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def sessions(self) -> int:
        """Sessions each side has had."""
        return len(self._timings)

    def doubles(self) -> bool:
        """Whether as many sessions again stay within the protocol."""
        return 2 * self.sessions * self.rounds <= self.protocol.max_rounds

    def extend(self, sessions: int) -> None:
        """Give every side `sessions` more sessions."""
        self.extended = self.sessions > 0
        with (self.progress or _quiet)("latency", sessions) as advance:
            for _ in range(sessions):
                self._timings.append(self._session())
                advance(1, f"{self.sessions * self.rounds} rounds")

    def wall(self, side: int) -> Array:
        """Wall time of the side's recorded calls, ms, (sessions, rounds, calls)."""
        return np.stack(self._timings)[:, :, side, 0]

    def cpu(self, side: int) -> Array:
        """CPU time of the side's recorded calls, ms, (sessions, rounds, calls)."""
        return np.stack(self._timings)[:, :, side, 1]

    def peak_memory_bytes(self, side: int) -> int | None:
        """Largest resident memory of the side's worker, interpreter and runtime included."""
        return self._workers[side].peak_memory_bytes()

    def conditions(self) -> dict[str, Any]:
        """Under what the timings were taken."""
        after = _host()
        ticks = after["ticks"] - self._before["ticks"]
        stolen = after["steal"] - self._before["steal"]
        return {
            "layout": [self.sessions, self.rounds, self.protocol.calls],
            "threads": self.target.threads,
            "cpus": list(self.protocol.cpus) if self.protocol.cpus else None,
            "spinning": False,
            "load_average": [self._before["load"], after["load"]],
            "steal_percent": round(100 * stolen / ticks, 3) if ticks else None,
            "seed": self.seed,
        }

    def _session(self) -> Array:
        """One session of every side. Returns (rounds, sides, 2, calls) ms: wall, CPU."""
        round_ms = 0.0
        for side in self._order.permutation(len(self.paths)):
            worker = self._workers[side]
            worker.open(self.paths[side], batch=self.target.batch, seed=self.seed)
            if self._device and not self._timings:
                golden(worker, self.paths[side], seed=self.seed)
            warm = worker.run(self.protocol.warm_up)
            round_ms += min(warm.wall_ms) * (self.protocol.calls + 1)
        if not self.rounds:
            affordable = int(1000 * self.protocol.aim_s / (self.protocol.sessions * round_ms))
            self.rounds = min(self.protocol.rounds, max(affordable, FEWEST_ROUNDS))
        timings = np.empty((self.rounds, len(self.paths), 2, self.protocol.calls))
        for row in timings:
            for side in self._order.permutation(len(self.paths)):
                calls = self._workers[side].run(self.protocol.calls, warm_up=1)
                row[side] = calls.wall_ms, calls.cpu_ms
        return timings


def _compared(lockstep: _Lockstep, protocol: Protocol, seed: int) -> Measurement:
    candidate, reference, control = (lockstep.wall(side) for side in range(3))
    generator = np.random.default_rng(seed)
    ratio = statistics.paired_ratio(candidate, reference, generator=generator)
    itself = statistics.paired_ratio(control, reference, generator=generator)
    rounds = statistics.round_ratios(candidate, reference)
    details = lockstep.conditions() | {
        "candidate": _side(lockstep, 0, seed),
        "reference": _side(lockstep, 1, seed),
        "control": itself.as_json() | {"fit": not itself.leaves(1.0, protocol.tolerance), "samples_ms": _raw(control)},
        "cpu_ratio": statistics.paired_ratio(lockstep.cpu(0), lockstep.cpu(1), generator=generator).as_json(),
        "steady": _steadiness(rounds, protocol, seed),
        "half_width": round(ratio.half_width, 6),
    }
    return _ratio(ratio, lockstep, n=candidate.size, samples=_raw(np.exp(rounds)), details=details)


def _side(lockstep: _Lockstep, side: int, seed: int) -> dict[str, Any]:
    wall = lockstep.wall(side)
    return {
        "file": lockstep.paths[side].name,
        "p50_ms": statistics.bootstrap(wall, statistics.median, generator=np.random.default_rng(seed)).as_json(),
        "p95_ms": _tail(wall, 0.95, seed),
        "peak_memory_bytes": lockstep.peak_memory_bytes(side),
        "samples_ms": _raw(wall),
        "samples_cpu_ms": _raw(lockstep.cpu(side)),
    }


def _tail(wall: Array, share: float, seed: int) -> dict[str, Any]:
    """A high quantile with its interval, or why there is none."""
    fewest = statistics.fewest_samples(share)
    if wall.size < fewest:
        return {"refused": f"{wall.size} calls say nothing about p{share * 100:g}, which needs {fewest}"}
    generator = np.random.default_rng(seed)
    return statistics.bootstrap(wall, statistics.quantile(share), generator=generator).as_json()


def _steadiness(logs: Array, protocol: Protocol, seed: int) -> dict[str, Any]:
    shift = statistics.drift(logs, generator=np.random.default_rng(seed))
    return shift.as_json() | {"drifting": shift.leaves(1.0, 0.0) and abs(shift.value - 1) > protocol.tolerance}


def _raw(timings: Array) -> tuple[float, ...]:
    # Clocks tick in tens of ns; further digits would only fatten the report.
    return tuple(timings.reshape(-1).round(5).tolist())


def _quiet(title: str, total: int) -> AbstractContextManager[Advance]:
    return nullcontext(lambda steps, note="": None)


def _host() -> dict[str, Any]:
    """Load average, and the ticks this (virtual) machine was given and was denied so far."""
    path = Path("/proc/stat")
    ticks = [int(word) for word in path.read_text().split("\n", 1)[0].split()[1:9]] if path.exists() else []
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"load": load, "ticks": sum(ticks), "steal": ticks[7] if len(ticks) > 7 else 0}
