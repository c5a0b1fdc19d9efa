"""The shape of the tree: three folders and three links, imports that point one way, small files, a whole wheel."""

from __future__ import annotations

import ast
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import slim
from slim.passes import PASSES

ROOT = Path(__file__).parent.parent
PARTS = ("passes", "export", "bench")
PACKAGE = [path for folder in ("slim", *PARTS) for path in sorted((ROOT / folder).glob("*.py"))] + [
    path for part in PARTS for path in sorted((ROOT / part).glob("*/*.py"))
]


def part_of(path: Path) -> str:
    """`slim`, or the part of it that a file of PACKAGE belongs to."""
    return path.relative_to(ROOT).parts[0]


def name_of(path: Path) -> str:
    return "/".join(path.relative_to(ROOT).with_suffix("").parts)


LOOKS_BACK = {
    "cli": {"passes"},  # the table of passes, for the options and the help
    "recipe": {"passes"},  # a pass by its name
    "store": {"passes"},  # the same, to apply a history again
    "served": {"export"},  # the inputs and outputs of a file
    "runs": {"bench"},  # the report of a run, for `Run.report`
    "__init__": {"passes", "bench", "export"},  # the public list
}
"""Core modules that may import a part, and only inside a function: the part is loaded when it is needed."""

ROADS = {"bundles", "commands", "family", "job"}
"""Core modules that lead through all the parts and import them as they like; so nothing may import these but..."""
ENDS = {"cli", "__init__", "__main__", "demo", *ROADS}
"""...the ends of the program."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported module, and whether importing the file already imports it."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield from ((f"{child.module}.{alias.name}", at_once) for alias in child.names)
            else:
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing
                yield from walk(child, at_once and not later)

    yield from walk(ast.parse(path.read_text()), True)


def slim_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """First name below `slim` of each import of it, and whether it is at once."""
    for module, at_once in imports(path):
        first, _, rest = module.partition(".")
        if first == "slim":
            yield rest.split(".")[0], at_once


def test_this_tree_is_what_is_imported() -> None:
    assert Path(slim.__file__) == ROOT / "slim" / "__init__.py"


@pytest.mark.parametrize("part", PARTS)
def test_each_link_leads_to_the_folder_at_the_root(part: str) -> None:
    link = ROOT / "slim" / part
    assert link.is_symlink()
    assert link.readlink() == Path("..", part)
    assert link.resolve() == ROOT / part
    assert not (ROOT / part).is_symlink()


def test_setup_lists_the_folders_and_there_are_no_others() -> None:
    setup = ast.parse((ROOT / "setup.py").read_text())
    listed = {ast.unparse(node.targets[0]): node.value for node in setup.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(listed["PARTS"]) == PARTS
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {"slim", *PARTS}
    assert {path.name for path in (ROOT / "slim").iterdir() if path.is_symlink()} == set(PARTS)
    # A folder within a part that setup does not list would be missing from the wheel.
    within = {
        path.parent.relative_to(ROOT) for path in everything() if path.parents[1] in {ROOT / part for part in PARTS}
    }
    assert {".".join(folder.parts) for folder in within} == set(ast.literal_eval(listed["FOLDERS"]))
    assert all((ROOT / folder / "__init__.py").is_file() for folder in within)
    assert {path.name for path in (ROOT / "slim").iterdir() if any(path.glob("*.py"))} == set(PARTS)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    folder, found = part_of(path), list(slim_imports(path))
    names = {name for name, _ in found}
    if folder == "slim":
        if path.stem not in ROADS:
            assert names & set(PARTS) <= LOOKS_BACK.get(path.stem, set())
            assert not {name for name, at_once in found if at_once} & set(PARTS)
    else:
        forbidden = {"passes": {"export", "bench"}, "export": {"passes", "bench"}, "bench": {"passes"}}
        assert not names & forbidden[folder]
    if folder != "slim" or path.stem not in ENDS:
        assert not names & ENDS


def test_the_exceptions_are_all_in_use() -> None:
    for stem, parts in LOOKS_BACK.items():
        if stem != "__init__":  # it names modules by strings
            assert {name for name, _ in slim_imports(ROOT / "slim" / f"{stem}.py")} & set(PARTS) == parts
    for stem in ROADS:
        assert {name for name, _ in slim_imports(ROOT / "slim" / f"{stem}.py")} & set(PARTS)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_part_is_imported_by_its_bare_name(path: Path) -> None:
    assert not {module.split(".")[0] for module, _ in imports(path)} & set(PARTS)


EVERYTHING = """
import importlib, pkgutil, sys
import slim
for module in pkgutil.walk_packages(slim.__path__, "slim."):
    if module.name != "slim.__main__":
        importlib.import_module(module.name)
for part in ("passes", "export", "bench"):
    print(part in sys.modules, f"slim.{part}" in sys.modules)
files = [module.__file__ for module in list(sys.modules.values()) if getattr(module, "__name__", "").startswith("slim")]
print(len(files) - len({__import__("os").path.realpath(file) for file in files}))
"""


def test_no_bare_name_is_loaded_and_no_file_twice() -> None:
    # From the root, where a bare import would find them.
    done = subprocess.run([sys.executable, "-c", EVERYTHING], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False True"] * 3 + ["0"]


HELP = """
import sys
import slim
print([name for name in ("torch", "timm", "numpy", "pydantic") if name in sys.modules])
from slim.cli import main
for words in (["--help"], ["run", "--help"]):
    try:
        main(words)
    except SystemExit as ended:
        print(ended.code, file=sys.stderr)
print([name for name in ("torch", "timm", "onnx", "onnxruntime") if name in sys.modules])
"""


def test_neither_importing_slim_nor_its_help_loads_torch_or_timm() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    first, *helped, last = done.stdout.splitlines()
    assert (first, last) == ("[]", "[]")
    assert done.stderr.split() == ["0", "0"]
    assert any("low-rank" in line for line in helped)


def everything() -> list[Path]:
    """Every Python file that is ours."""
    folders = ("slim", *PARTS, "tests", "benchmarks", "examples")
    found = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    return [path for path in found if not (path.parent.is_symlink() or path.parent.parent.is_symlink())]


def test_files_are_small() -> None:
    lines = {path.relative_to(ROOT): path.read_text().splitlines() for path in everything()}
    assert not {str(path): len(text) for path, text in lines.items() if len(text) > 500}
    # The median is of the toolchain itself, and of lines with something on them.
    full = [sum(bool(line.strip()) for line in lines[path.relative_to(ROOT)]) for path in PACKAGE]
    assert statistics.median(full) <= 150


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not {path.stem for path in everything()} & {
        "util",
        "utils",
        "helper",
        "helpers",
        "manager",
        "base",
        "common",
        "misc",
    }


def test_the_version_is_the_top_of_the_changelog() -> None:
    top = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert top
    assert top[1] == slim.__version__


def test_each_pass_has_a_card_beside_it() -> None:
    for name, (module, _, _) in PASSES.items():
        card = ROOT / "passes" / f"{module.rsplit('.', 1)[1]}.md"
        assert name in card.read_text()


BUILD = "import sys; from setuptools.build_meta import build_wheel; print('wheel', build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip(
        "setuptools", minversion="77", reason="setuptools >= 77 is not installed: no wheel can be built"
    )
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tree)
    for folder in ("slim", *PARTS, "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(place)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(place / done.stdout.split()[-1])


def test_the_wheel_holds_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {"slim", f"slim-{slim.__version__}.dist-info"}
    assert "slim = slim.cli:main" in wheel.read(f"slim-{slim.__version__}.dist-info/entry_points.txt").decode()


def test_the_wheel_holds_every_module_card_and_template(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"slim/{path.name}" for path in (ROOT / "slim").iterdir() if path.suffix == ".py" or path.name == "py.typed"
    }
    for part in PARTS:
        files = (path for path in (ROOT / part).rglob("*") if path.suffix in {".py", ".md", ".jinja"})
        expected |= {f"slim/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert held == expected
    assert {"slim/passes/low_rank.md", "slim/bench/report.html.jinja", "slim/export/predict.py.jinja"} <= held
