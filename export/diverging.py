"""Where two forms of a network part: the first node whose tensor differs.

Asked once parity has failed, of a few images. Torch modules and the nodes of a graph are paired by structure alone: a
module gives the one tensor that leaves its nodes, and takes the one that enters them. What cannot be paired so is not
compared, and then the node named is the first that can be.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from slim.errors import MissingExtra
from slim.export.ladder import copied, merged
from slim.export.target import Target
from slim.surgery import followers, in_eval

if TYPE_CHECKING:
    from slim.export.onnx import OnnxFile

IMAGES = 4
"""Images at most: every tensor of them is looked at."""

HELD_BYTES = 256 << 20
"""Tensors of one side held at once, bytes; a network with more is run several times."""

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True)
class Divergence:
    """The first tensor in which two forms of a network differ."""

    node: str
    """ONNX node that gives it."""
    op: str
    """Operator of that node."""
    module: str
    """Torch module the node came from, as in `named_modules`; empty for the network itself."""
    relative: float
    """Largest difference as a share of the largest value; infinite where a value is not finite, and another."""
    largest: float
    """Largest difference."""

    def __str__(self) -> str:
        place = f"{self.op} of {self.module}" if self.module else self.op
        return f"first apart at {self.node} ({place}): {self.relative:.2g} of the largest value"


@dataclass(frozen=True)
class _Role:
    """What a tensor of the graph is in the network."""

    module: str
    entering: bool
    """The module's first input; otherwise what it gives."""
    norm: str
    """Batch norm that the exporter folded into the module, whose nodes give what the norm makes of it; often none."""


class _Graph:
    """An ONNX graph, and those of its tensors that are floats and depend on the images."""

    def __init__(self, path: Path, count: int) -> None:
        self.proto = onnx.load(path)
        graph = self.proto.graph
        self.given = {port.name for port in graph.output}
        self.users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        makers: dict[str, onnx.NodeProto] = {}
        live = {port.name for port in graph.input}
        for node in graph.node:
            for name in node.input:
                self.users[name].append(node)
            if live.intersection(node.input):
                live.update(filter(None, node.output))
                makers.update((name, node) for name in node.output if name)
        typed = onnx.shape_inference.infer_shapes(self.proto).graph
        types = {info.name: info.type.tensor_type for info in (*typed.value_info, *typed.output)}
        self.makers = {name: node for name, node in makers.items() if name in types and types[name].elem_type in FLOATS}
        """In topological order, as the nodes of a graph are."""
        self.sizes = {
            name: 4 * math.prod(dim.dim_value or count for dim in types[name].shape.dim) for name in self.makers
        }
        """Bytes of `count` images in float32."""

    def giving(self, names: Iterable[str]) -> onnx.ModelProto:
        """The graph with the tensors `names` for outputs, in that order."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        del proto.graph.output[:]
        # Runtimes find the types themselves.
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return proto

    def as_read(self, name: str) -> str:
        """The tensor, or what comes of it where all that reads it reads it quantised.

        There a layer may give what the activation behind it is to give: the range quantised ends where that cuts off.
        """
        for op in ("QuantizeLinear", "DequantizeLinear"):
            users = self.users[name]
            if not users or any(user.op_type != op for user in users):
                return name
            name = users[0].output[0]
        return name


def first_apart(model: nn.Module, file: OnnxFile, images: Tensor, *, tolerance: float) -> Divergence | None:
    """The first node of `file` whose tensor is not what `model` computes there; None where all that is paired agrees.

    images: (B, C, H, W) float32, of which the first few are used. `tolerance`: largest difference that passes, as a
    share of the largest value. Both run on the CPU, the file without optimisations. `model` is left as it was.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
    """
    few = images[:IMAGES].float().cpu()
    network = copied(model).cpu()
    network, _ = merged(network, tuple(few.shape[1:]))  # as it was before the trace
    graph = _Graph(file.path, len(few))
    roles = _roles(graph, file.scopes, network, few)

    def torch_side(names: list[str]) -> dict[str, Tensor]:
        return _of_network(network, few, {name: roles[name] for name in names})

    return _first(graph, file.scopes, roles, torch_side, lambda names: _of_graph(graph, names, few), tolerance)


def first_apart_files(
    reference: OnnxFile, candidate: OnnxFile | Path, images: Tensor, *, target: Target, tolerance: float
) -> Divergence | None:
    """The first node of `reference` whose tensor is another in `candidate` on `target`; None where none is.

    Tensors of the same name are compared. The reference runs in ONNX Runtime without optimisations; the candidate is
    opened in this process, and gives these tensors beside computing what it computes. So a fault of operators that its
    runtime merges, and keeps apart when it has to show what lies between them, may not be found. Otherwise as
    `first_apart`.

    Raises:
        MissingExtra: ONNX Runtime, or the runtime of the target, is not installed.
        TargetError: the runtime cannot run files here.
        StoreError: the runtime cannot load the candidate with so many outputs.
    """
    target.model_copy(update={"host": ""}).probe()
    few = images[:IMAGES].float().cpu()
    graph = _Graph(reference.path, len(few))
    other = _Graph(candidate if isinstance(candidate, Path) else candidate.path, len(few))
    names = [name for name in graph.makers if name in other.makers]

    def candidate_side(names: list[str]) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(other.giving(map(other.as_read, names)), path)
            session = target.on.open(path, threads=target.threads, precision=target.precision, mode=target.mode)
            return _named(names, session.call([few.numpy()]))

    return _first(graph, reference.scopes, names, lambda names: _of_graph(graph, names, few), candidate_side, tolerance)


Side = Callable[[list[str]], Mapping[str, Tensor]]
"""Tensors by name, in float32; some may be missing."""


def _first(
    graph: _Graph, scopes: Mapping[str, str], names: Iterable[str], wanted: Side, given: Side, tolerance: float
) -> Divergence | None:
    """`names` in topological order: nothing that the first one apart depends on is known to differ."""
    apart: dict[str, tuple[float, float]] = {}
    for group in _groups(names, graph.sizes):
        ours, theirs = wanted(group), given(group)
        for name in group:
            if name in ours and name in theirs and ours[name].shape == theirs[name].shape:
                apart[name] = _apart(ours[name], theirs[name])
    beyond = [name for name, (relative, _) in apart.items() if relative > tolerance]
    # What is lost again at once, as below zero in front of a ReLU, does not set the logits apart if anything else does.
    lasting = (name for name in beyond if not (readers := _readers(graph, name, apart)) or readers.intersection(beyond))
    first = next(lasting, beyond[0] if beyond else None)
    if first is None:
        return None
    node = graph.makers[first]
    return Divergence(node.name, node.op_type, scopes.get(node.name, ""), *apart[first])


def _readers(graph: _Graph, name: str, known: Container[str]) -> set[str]:
    """The nearest of `known` that depend on `name`."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        made = {output for user in graph.users[waiting.pop()] for output in user.output} - seen
        seen |= made
        found.update(output for output in made if output in known)
        waiting.extend(output for output in made if output not in known)
    return found


def _groups(names: Iterable[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name in names:
        if group and held + sizes[name] > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += sizes[name]
    if group:
        yield group


def _apart(wanted: Tensor, given: Tensor) -> tuple[float, float]:
    """Largest difference as a share of the largest value, and itself; infinite where one side alone is finite."""
    like = (wanted == given) | (wanted.isnan() & given.isnan())
    largest = torch.where(like, 0.0, (wanted - given).abs()).nan_to_num(math.inf, math.inf).max().item()
    scale = wanted[wanted.isfinite()].abs().max().item() if wanted.isfinite().any() else 0.0
    return (largest / scale if scale else math.inf if largest else 0.0), largest


def _roles(graph: _Graph, scopes: Mapping[str, str], network: nn.Module, images: Tensor) -> dict[str, _Role]:
    """Tensor -> what it is in the network, for those that structure tells; in topological order."""
    lineages = {node.name: _lineage(scopes.get(node.name, "")) for node in graph.proto.graph.node}
    leaving, entering = defaultdict(list), defaultdict(list)
    for name, node in graph.makers.items():
        own, readers = lineages[node.name], [lineages[user.name] for user in graph.users[name]]
        for module in own:
            if name in graph.given or any(module not in reader for reader in readers):
                leaving[module].append(name)
        for module in set().union(*readers).difference(own):
            entering[module].append(name)
    modules = {name for name, _ in network.named_modules()}
    folded = _folded(graph, scopes, network, images)
    found: dict[str, _Role] = {}
    for table, enters in ((leaving, False), (entering, True)):
        # The innermost says most of where it is.
        for module in sorted(modules.intersection(table), key=lambda name: (-len(_lineage(name)), name)):
            if len(table[module]) == 1:
                found.setdefault(table[module][0], _Role(module, enters, "" if enters else folded.get(module, "")))
    return {name: found[name] for name in graph.makers if name in found}


def _folded(graph: _Graph, scopes: Mapping[str, str], network: nn.Module, images: Tensor) -> dict[str, str]:
    """Layer -> the batch norm behind it of which no node is left."""
    left = {scopes.get(node.name) for node in graph.proto.graph.node if node.op_type == "BatchNormalization"}
    layers, norms = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear), (nn.BatchNorm1d, nn.BatchNorm2d)
    return {layer: norm for layer, norm in followers(network, images, layers, norms).items() if norm not in left}


def _lineage(module: str) -> frozenset[str]:
    """The module and those around it; the network itself is empty."""
    parts = module.split(".") if module else []
    return frozenset(".".join(parts[:count]) for count in range(len(parts) + 1))


def _of_network(network: nn.Module, images: Tensor, roles: Mapping[str, _Role]) -> dict[str, Tensor]:
    """Tensors by their names in the graph; without those of modules that are called several times."""
    found: dict[str, list[Any]] = defaultdict(list)
    modules: dict[str, Any] = dict(network.named_modules())

    def keep(name: str, value: Any) -> None:
        if (norm := modules[roles[name].norm] if roles[name].norm else None) is not None:
            value = functional.batch_norm(
                value, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        # What follows may work in place.
        found[name].append(value.clone() if isinstance(value, Tensor) else None)

    hooks = [
        modules[role.module].register_forward_pre_hook(lambda _, given, name=name: keep(name, (*given, None)[0]))
        if role.entering
        else modules[role.module].register_forward_hook(lambda _, given, output, name=name: keep(name, output))
        for name, role in roles.items()
    ]
    try:
        with in_eval(network):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: values[0] for name, values in found.items() if len(values) == 1 and values[0] is not None}


def _of_graph(graph: _Graph, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Tensors that ONNX Runtime computes with its optimisations off."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("ONNX Runtime is not installed: pip install 'slim[cpu]'") from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        graph.giving(map(graph.as_read, names)).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return _named(
        names, session.run(list(map(graph.as_read, names)), {graph.proto.graph.input[0].name: images.numpy()})
    )


def _named(names: Iterable[str], arrays: Iterable[Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(array).float() for name, array in zip(names, arrays, strict=True)}
