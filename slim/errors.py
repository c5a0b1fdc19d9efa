"""The exception tree, and the exit code each branch ends the program with.

    SlimError                  1   failure while working
    ├── UsageError             2   option, order or input that cannot work; nothing was started
    │   ├── RecipeError        2   a recipe, on the command line or in a file
    │   ├── OrderError         2   passes in an order that cannot work
    │   ├── DataError          2   a dataset, or an image in it
    │   └── BackboneError      2   a network that cannot be built, or weights that do not fit it
    ├── StoreError             1   an artifact or run on disk: broken, edited, or not writable
    ├── PassError              1   a pass that could not do its work
    │   └── VerifyError        1   a pass that broke the contract
    ├── DivergedError          1   a loss that is no longer a number
    ├── TargetError            5   a target that is missing, or not the budget's device
    │   └── MissingExtra       5   an optional runtime that is not installed
    └── ParityError            6   an exported file that does not compute what the network computes

A budget that is missed (3) or undecided (4) is a verdict, not an error: see `exit_code` in bench/budget.py.

Every message is one line: the place, the value, the rule, the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


class SlimError(Exception):
    """Anything slim reports by one line instead of a traceback."""

    exit_code = 1


class UsageError(SlimError):
    """Input that cannot work; found before any work starts."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe with an unknown key or a value outside its range."""


class OrderError(UsageError):
    """Passes in an order that cannot work."""


class DataError(UsageError):
    """A dataset that is not what was asked for."""


class BackboneError(UsageError):
    """A backbone that cannot be built, or weights that do not fit it."""


class StoreError(SlimError):
    """An artifact or run on disk that cannot be read or written."""


class PassError(SlimError):
    """A pass that could not do its work."""


class VerifyError(PassError):
    """A pass that broke the contract of passes."""


class DivergedError(SlimError):
    """Training whose loss is no longer a number."""


class TargetError(SlimError):
    """A target that is missing here, or not the device a budget is for."""

    exit_code = 5


class MissingExtra(TargetError):
    """An optional runtime that is not installed."""


class ParityError(SlimError):
    """An exported file that does not compute what the network computes."""

    exit_code = 6


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'low-rank'?` for the nearest known word, or the list of them all when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
