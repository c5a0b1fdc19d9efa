"""What a person sees while something runs: progress bars, log lines, one-line errors; all on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slim.contract import Advance
from slim.distributed import is_main

stderr = Console(stderr=True)


def show_log(*, quiet: bool) -> None:
    """Log lines of slim on stderr; warnings and errors alone when quiet, or in a process that is not rank 0."""
    log = logging.getLogger("slim")
    log.setLevel(logging.WARNING if quiet or not is_main() else logging.INFO)
    if not log.handlers:
        log.addHandler(RichHandler(console=stderr, show_path=False, show_level=False, log_time_format="%H:%M:%S"))


@contextmanager
def bars(title: str, total: int) -> Iterator[Advance]:
    """A progress bar with a note behind it; where stderr is no terminal, one line when it is done."""
    if not is_main():
        yield lambda steps, note=None: None
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            progress.update(task, advance=steps)
            if note is not None:
                progress.update(task, note=note)

        yield advance
