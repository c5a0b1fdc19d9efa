"""What a person sees: results on stdout; log lines, progress and errors on stderr.

Where the one or the other is no terminal but a file or a CI log, lines are plain, wide enough not to be broken, and
progress is a line when something is done and every half minute until then.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slim.contract import Advance
from slim.distributed import is_main

WIDTH = 120
"""Columns of a table where there is no terminal to ask."""
LINE_EVERY_S = 30.0
"""Seconds between two lines on one piece of work where there is no terminal to draw a bar on."""

# Unlit: colours are for verdicts, not for every number in a line.
stdout = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)
stderr = Console(stderr=True, highlight=False)
log = logging.getLogger("slim")


def show_log(*, quiet: bool) -> None:
    """Log lines of slim on stderr; warnings and errors alone when quiet, or in a process that is not rank 0."""
    log.setLevel(logging.WARNING if quiet or not is_main() else logging.INFO)
    log.handlers = [_handler()]  # not one more for each command of a process


def _handler() -> logging.Handler:
    if stderr.is_terminal:
        return RichHandler(console=stderr, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    return handler


@contextmanager
def bars(title: str, total: int) -> Iterator[Advance]:
    """A progress bar with a note behind it; where stderr is no terminal, lines."""
    if not is_main():
        yield lambda steps=1, note=None: None
    elif stderr.is_terminal:
        with _bar(title, total) as advance:
            yield advance
    else:
        with _lines(title, total) as advance:
            yield advance


@contextmanager
def _bar(title: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            progress.update(task, advance=steps)
            if note is not None:
                progress.update(task, note=note)

        yield advance


@contextmanager
def _lines(title: str, total: int) -> Iterator[Advance]:
    begun = said = time.monotonic()
    done, last = 0, ""

    def advance(steps: int = 1, note: str | None = None) -> None:
        nonlocal done, last, said
        done, last = done + steps, last if note is None else note
        if time.monotonic() - said > LINE_EVERY_S:
            said = time.monotonic()
            say()

    def say() -> None:
        log.info("%s: %d of %d, %.0f s%s", title, done, total, time.monotonic() - begun, f", {last}" if last else "")

    yield advance
    say()


def tell(name: str, text: str) -> None:
    """One line of a result: what it is, and what was found."""
    stdout.print(f"{name:<9} {escape(text)}", soft_wrap=True)
