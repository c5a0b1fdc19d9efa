from __future__ import annotations

from importlib import util

import pytest
from pydantic import ValidationError

from slim.errors import MissingExtra, UsageError
from slim.export.target import Target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("ort:cpu", Target(runtime="ort", device="cpu")),
        ("ort", Target(runtime="ort", device="cpu")),
        ("ort:cpu,threads=4", Target(runtime="ort", device="cpu", threads=4)),
        ("ort,batch=8,threads=2,precision=fp32", Target(runtime="ort", device="cpu", threads=2, batch=8)),
    ],
)
def test_words_become_a_target(text: str, target: Target) -> None:
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "ort:cpu",
        "ort,threads=3",
        "ort:cpu,batch=16,threads=2",
        "openvino,precision=bf16",
        "torch,mode=aoti",
        "ort@ssh://a",
    ],
)
def test_a_target_written_out_reads_back_equal(text: str) -> None:
    target = Target.parse(text)
    assert Target.parse(str(target)) == target


def test_nothing_is_left_unsaid_when_written_out() -> None:
    assert str(Target.parse("ort")) == "ort:cpu,threads=1,batch=1,precision=fp32"
    assert str(Target.parse("torch")) == "torch:cpu,threads=1,batch=1,precision=fp32,mode=eager"
    assert str(Target.parse("ort@ssh://me@board")) == "ort:cpu,threads=1,batch=1,precision=fp32@ssh://me@board"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ort:gpu", r"target 'ort:gpu': unknown runtime 'ort:gpu'; did you mean 'ort:cpu'\?"),
        ("paddle", r"unknown runtime 'paddle'; known: .*openvino:cpu, ort:cpu"),
        ("", r"target '': unknown runtime ''"),
        ("ort:cpu@jetson", r"'jetson' is not ssh://\[user@\]host\[:port\]"),
        ("ort:cpu,mode=eager", r"mode=eager: ort:cpu has no mode"),
        ("torch,mode=fast", r"mode=fast: torch:cpu takes eager or compiled or aoti"),
        ("ort:cpu,thread=2", r"unknown option 'thread'; did you mean 'threads'\?"),
        ("ort:cpu,threads", r"'threads' is not threads=N or batch=N or precision=fp32 or mode=compiled"),
        ("ort:cpu, threads=2", r"' threads=2' is not threads=N"),
        ("ort:cpu,", r"'' is not threads=N"),
        ("ort:cpu,threads=2,threads=4", r"'threads' is given twice; keep one"),
        ("ort:cpu,threads=0", r"threads=0: Input should be greater than or equal to 1"),
        ("ort:cpu,threads=many", r"threads=many: Input should be a valid integer"),
        ("ort:cpu,batch=70000", r"batch=70000: Input should be less than or equal to 65536"),
        ("ort:cpu,precision=int8", r"precision=int8: ort:cpu takes fp32$"),
    ],
)
def test_words_that_are_no_target_are_a_usage_error_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Target.parse(text)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_target_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Target.parse("ort").threads = 2  # type: ignore[misc]


def test_probe_tells_the_version_of_the_runtime() -> None:
    import onnxruntime

    assert Target.parse("ort").probe() == onnxruntime.__version__


def test_a_runtime_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda module: None)
    with pytest.raises(MissingExtra, match=r"onnxruntime is not installed; pip install 'slim\[cpu\]'") as caught:
        Target.parse("ort").probe()
    assert caught.value.exit_code == 5
