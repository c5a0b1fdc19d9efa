"""What became elastic and what did not, in lines for people: things that are alike share a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from slim.passes.elastic.space import Dim, Space

NAMES = 4
"""That a line holds; of more it says how many."""


def lines(space: Space) -> Iterator[str]:
    """`width  64, 48, 32: layer1.0.conv1, layer1.1.conv1`, then what stays as it is, and why."""
    widths = [(", ".join(str(count) for count in _shown(dim)), dim.group.name) for dim in space.dims]
    yield from _grouped("width", widths)
    stages = (
        (f"{least} to {len(blocks)} of {len(blocks)}", space.blocks[number].name)
        for blocks, least in zip(space.stages, space.fewest, strict=True)
        for number in blocks
    )
    yield from _grouped("depth", stages)
    yield from _grouped("rank", ((", ".join(map(str, rank.choices[1:])), rank.layer) for rank in space.ranks))
    if len(space.pixels) > 1:
        yield f"input  {', '.join(map(str, space.pixels[1:]))} pixels too"
    yield from _grouped("whole", ((why, name) for name, why in space.left.items()))


def _shown(dim: Dim) -> Iterator[int]:
    """Its choices: heads, or channels."""
    return (count * (dim.group.unit if dim.group.kind == "channels" else 1) for count in dim.choices)


def _grouped(kind: str, found: Iterable[tuple[str, str]]) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for shown, name in found:
        names.setdefault(shown, []).append(name)
    for shown, some in names.items():
        more = f" and {len(some) - NAMES} more" if len(some) > NAMES else ""
        yield f"{kind:5}  {shown}: {', '.join(some[:NAMES])}{more}"
