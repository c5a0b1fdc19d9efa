"""What single layers take on the target: a table from which a pass chooses before it changes a network.

Every layer is a file of its own, made by the exporter that writes the whole network, so the runtime sees the operators
it will see there. A layer alone also pays for bringing its input and output into the form the runtime computes in,
which inside a network neighbours share: the options of one layer pay the same, so their differences can be trusted,
while the sum over layers is above the network.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.utils import Extractor
from torch import Tensor, nn

from slim import environment
from slim.bench.remote import Host
from slim.bench.worker import Worker, device
from slim.contract import Progress, no_progress
from slim.errors import SlimError
from slim.export.onnx import quiet, reason, trace
from slim.export.target import Target
from slim.measurement import Measurement
from slim.surgery import in_eval

Entry = tuple[nn.Module, tuple[int, ...]]
"""A layer and the shape of its input without the batch."""

ROUNDS = 6
"""The least and the largest of six hold the median with 97 %, whatever the distribution: 1 - 2 ** -5."""
CALLS = 10
"""Recorded calls of a round."""
FEWEST_CALLS = 4
ROUND_MS = 50.0
"""Time aimed at for the calls of a round: slow layers spread less and get fewer calls, never under the fewest."""
WARM_UP = 2
"""Calls thrown away after a session is opened."""
FASTEST = 0.25
"""A round stands for this quantile of its calls: what disturbs a call only ever lengthens it.

On two cores beside other work, 60 sessions each of five layers of 0.02 to 1.2 ms: values of six rounds of 10 calls
spread by 0.6 to 2.5 % (sd) with this quantile, by 0.6 to 2.8 % with the median.
"""
GROUP_BYTES = 200_000_000
"""Values in one export. Tracing costs half a second however little there is to trace, so layers share it."""


def key(entry: Entry) -> tuple[str, str]:
    """What tells entries apart: the layer printed, the shape of its input."""
    return str(entry[0]), str(entry[1])


def layer_table(
    entries: Sequence[Entry], target: Target, folder: Path, *, seed: int, progress: Progress = no_progress
) -> list[Measurement]:
    """Time in ms of one call of each layer alone, at the target's batch, in the order of `entries`.

    Equal entries are measured once. Values play no part: every layer is timed with random ones, and is left as it was.
    All layers are timed in the same rounds, in random order; a value is the median over rounds, its interval their
    range. `samples` holds the rounds.

    Raises:
        MissingExtra: the target's runtime is not installed.
        SlimError: a layer cannot be traced with its shape, or the runtime cannot open it.
    """
    distinct = {key(entry): entry for entry in entries}
    if not distinct:
        return []
    with progress("layers", len(distinct) * (ROUNDS + 1)) as advance:
        paths: dict[tuple[str, str], Path] = {}
        for group in _groups([*distinct.values()]):
            for entry, path in zip(group, _export(group, folder, seed), strict=True):
                paths[key(entry)] = path
            advance(len(group), "exported")
        with device(target) as host:
            timings = _timings([paths[name] for name in distinct], target, host, seed, lambda: advance(1, "timed"))
            known = host.describe() if host else environment.describe()
    found = {name: _measurement(rounds, name, target, known) for name, rounds in zip(distinct, timings, strict=True)}
    return [found[key(entry)] for entry in entries]


def _groups(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries with inputs of one shape, as many as one file should hold."""
    for shape in dict.fromkeys(shape for _, shape in entries):
        group: list[Entry] = []
        for entry in entries:
            if entry[1] != shape:
                continue
            if group and sum(_bytes(layer) for layer, _ in [*group, entry]) > GROUP_BYTES:
                yield group
                group = []
            group.append(entry)
        yield group


def _bytes(layer: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in layer.parameters())


class _Beside(nn.Module):
    """Layers that are given the same input: one graph with an output for each."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(inputs) for layer in self.layers)


def _export(group: Sequence[Entry], folder: Path, seed: int) -> list[Path]:
    """One file for each entry of a group."""
    generator = torch.Generator().manual_seed(seed)
    (first, shape), *_ = group
    together = _Beside([_filled(layer, generator) for layer, _ in group])
    try:
        with in_eval(together), quiet():
            proto = trace(together, shape, (1, 64))
    except Exception as error:  # the exporter raises what any operator in a layer raises
        layer = " ".join(str(first).split())  # what holds others is printed on several lines
        raise SlimError(
            f"layers: {len(group)} with inputs of {shape}, from {layer} on, cannot be written as ONNX: "
            f"{reason(error)}; leave such layers out"
        ) from error
    parts = Extractor(proto)
    paths = []
    for entry, output in zip(group, proto.graph.output, strict=True):
        digest = hashlib.sha256("".join(key(entry)).encode()).hexdigest()
        path = folder / f"layer-{digest[:16]}.onnx"
        onnx.save(parts.extract_model([proto.graph.input[0].name], [output.name]), path)
        paths.append(path)
    return paths


def _filled(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with values that are neither zero nor denormal, and positive, as variances have to be."""
    filled = copy.deepcopy(layer).to_empty(device="cpu")
    with torch.no_grad():
        for value in (*filled.parameters(), *filled.buffers()):
            if value.is_floating_point():
                value.uniform_(0.5, 1.5, generator=generator)
    return filled


def _timings(
    paths: Sequence[Path], target: Target, host: Host | None, seed: int, timed: Callable[[], None]
) -> NDArray[np.float64]:
    """(files, rounds) ms."""
    order = np.random.default_rng(seed)
    timings = np.empty((len(paths), ROUNDS))
    with Worker(target, host=host) as worker:
        for number in range(ROUNDS):
            for index in order.permutation(len(paths)):
                worker.open(paths[index], batch=target.batch, seed=seed)
                affordable = int(ROUND_MS / min(worker.run(WARM_UP).wall_ms))
                calls = worker.run(min(CALLS, max(affordable, FEWEST_CALLS))).wall_ms
                timings[index, number] = np.quantile(calls, FASTEST)
                timed()
    return timings


def _measurement(
    rounds: NDArray[np.float64], name: tuple[str, str], target: Target, known: dict[str, object]
) -> Measurement:
    return Measurement(
        metric="layer_ms",
        value=float(np.median(rounds)),
        unit="ms",
        n=rounds.size,
        low=float(rounds.min()),
        high=float(rounds.max()),
        statistic="median of rounds",
        target=str(target),
        environment=known,
        samples=tuple(rounds.round(6).tolist()),
        details={"layer": name[0], "input": name[1]},
    )
