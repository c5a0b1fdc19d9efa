"""Every code block that readers are shown is run, in order, as they would: README, docs and method cards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "passes").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"text"}
"""Languages of blocks that show output."""


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(language, text) for language, text in BLOCK.findall(page.read_text()) if language not in NOT_RUN]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run_as_they_stand(page: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, text in blocks(page):
        assert language in ("bash", "python"), f"{page.name}: a block in {language or 'no language'} cannot be run"
        # `make` is asked what it would do: the set-up is what runs this test, and the demo has a test of its own.
        script = re.sub(r"^make ", f"make -n -C {ROOT} ", text, flags=re.MULTILINE)
        command = ["bash", "-euo", "pipefail", "-c", script] if language == "bash" else [sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_every_page_a_page_links_to_is_there() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_page_speaks_of_a_pass_that_has_no_card() -> None:
    from slim.passes import PASSES

    for name, (module, _, _) in PASSES.items():
        card = ROOT / "passes" / f"{module.rpartition('.')[2]}.md"
        assert card.is_file(), f"{name} has no card"
        assert card.read_text().startswith(f"# {name}\n")


def test_results_page_is_what_the_result_files_say() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == tables.page()
    for name, draw in tables.CHARTS.items():
        assert (ROOT / "docs" / name).read_text() == draw()


def test_example_compares_two_networks() -> None:
    script = ROOT / "examples" / "compare_backbones.py"
    done = subprocess.run(
        [sys.executable, str(script), "mobilenetv3_small_050", "resnet18"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"resnet18 against mobilenetv3_small_050: .* ratio \(.*\): slower\n", done.stdout), done.stdout
