"""Shared by all tests: threads that yield, the place of the real data, the command line in this process, one run."""

from __future__ import annotations

import gc
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

# Read by OpenMP when torch is loaded: waiting threads that spin starve whatever else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The gate adds its table to this file; the verdicts on the runs of tests are nobody's summary.
os.environ.pop("GITHUB_STEP_SUMMARY", None)

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real networks and images; the test is skipped where there is none."""
    place = os.environ.get("SLIM_TEST_DATA")
    if not place:
        pytest.skip("SLIM_TEST_DATA is not set: the real network and images are not here")
    return Path(place)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread while the module's tests run: nets this small only wait for a second one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def little_garbage() -> Iterator[None]:
    """accelerate collects garbage after each training: searching all that was imported takes longer than the rest."""
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr that says why: the last; log lines or click's usage may stand before it."""
        *before, last = self.err.strip().splitlines()
        assert last.startswith("Error: "), self.err
        assert not [line for line in before if line.startswith(("Error", "Traceback"))], self.err
        return last.removeprefix("Error: ")


Call = Callable[..., Said]


@pytest.fixture(scope="session")
def call() -> Call:
    """`call("show", folder)` is `slim show folder`, run in this process."""
    from slim import cli

    def run(*words: object) -> Said:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, out.getvalue(), err.getvalue())

    return run


# fmt: off
TINY = (
    "--model", "vit_tiny_patch16_224", "--model-arg", "img_size=32", "--model-arg", "patch_size=8",
    "--model-arg", "depth=1", "--model-arg", "embed_dim=64", "--model-arg", "num_heads=1", "--input-size", "32",
    "--weights", "none",
)
DIGITS = ("--data", "digits", "--limit-train", "200", "--limit-val", "100", "--calib", "32")
# fmt: on


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options of `slim run` for a network that takes a tenth of a millisecond, on a few handwritten digits."""
    return (*TINY, *DIGITS, "--threads", "1")


@pytest.fixture(scope="session")
def finished(call: Call, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """A run with a bundle, and what the command said; not to be changed. Without guard: its verdicts never differ."""
    out = tmp_path_factory.mktemp("finished") / "run"
    chain = ("finetune", "--epochs", "1", "low-rank", "--ratio", "0.2", "export")
    said = call("run", *tiny, "--target", "ort:cpu", "--no-guard", "--out", out, *chain)
    assert said.code == 0, said.err
    return out, said
