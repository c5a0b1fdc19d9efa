"""Maps the three root folders into the one package; everything else is in pyproject.toml."""

from setuptools import setup

PARTS = ("passes", "export", "bench")  # real folders at the root, imported as slim.<part>
FOLDERS = ("passes.distill", "passes.elastic", "passes.low_rank", "passes.prune")  # methods that outgrew one file

setup(
    packages=["slim", *(f"slim.{part}" for part in PARTS), *(f"slim.{folder}" for folder in FOLDERS)],
    package_dir={"slim": "slim", **{f"slim.{part}": part for part in PARTS}},
    package_data={
        "slim": ["py.typed"],
        "slim.passes": ["*.md"],
        "slim.bench": ["*.jinja"],
        "slim.export": ["*.jinja"],
    },
)
