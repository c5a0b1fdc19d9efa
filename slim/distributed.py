"""Several processes, one run: what rank 0 decides, measures and writes, everybody learns.

Started by `torchrun --nproc_per_node N -m slim run ...`; accelerate reads the environment torchrun sets. With one
process every function here does the plain thing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


def world() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's place, 0 to world - 1."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process decides, measures and writes."""
    return rank() == 0


def on_main(work: Callable[[], T]) -> T:
    """`work()` done once, by rank 0; its result, or the error it raised, reaches every process.

    The result travels by pickle, between processes of one run only.
    """
    if world() == 1:
        return work()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not _has_cuda())
    outcome: list[tuple[Any, Exception | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(work(), None)]
        except Exception as error:  # raised below, in every process
            outcome = [(None, error)]
    result, failure = broadcast_object_list(outcome)[0]
    if failure is not None:
        raise failure
    return cast(T, result)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
