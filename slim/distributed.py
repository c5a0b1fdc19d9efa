"""Several processes, one run: what rank 0 decides, measures and writes, everybody learns.

Started by `torchrun --nproc_per_node N -m slim run ...`; accelerate reads the environment torchrun sets. With one
process every function here does the plain thing. A process that dies is noticed by torchrun, which ends the others.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

from slim.errors import SlimError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: rank 0 measures alone, for as long as that takes."""


def world() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's place, 0 to world - 1."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process decides, measures and writes."""
    return rank() == 0


def join() -> None:
    """Meet the other processes, once; accelerate finds them met. Nothing to do for one process."""
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        # gloo even where training uses nccl: what `on_main` hands on lies in main memory.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        # Python would end with gloo's threads still running, and now and then the process aborts for that.
        atexit.register(_leave)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Go on once every process has come here. Nothing to wait for with one process."""
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    join()
    dist.all_reduce(torch.zeros(1))  # a broadcast, as in `on_main`, would not hold its sender back


def on_main(work: Callable[[], T]) -> T:
    """`work()` done once, by rank 0; its result, or the error it raised, reaches every process.

    The result travels by pickle, between processes of one run only.
    """
    if world() == 1:
        return work()
    import torch
    import torch.distributed as dist

    join()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except Exception as error:
            # Only our own errors are known to survive pickling; a peer that cannot read one would wait for ever.
            known = isinstance(error, SlimError)
            outcome[1] = error if known else SlimError(f"rank 0 failed: {type(error).__name__}: {error}")
            dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
            raise
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])
