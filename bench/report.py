"""The report of a run: report.json for programs, one report.html for people, one table for the terminal.

All three are made from `Report` alone, so what a person reads is what a program reads. The page needs no network and
runs no script. Its charts are inline SVG drawn by the template with the page's own colours, so that they follow dark
mode; this file only says where things go. A figure that is not there is reported as not measured, never as zero.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slim.artifact import Preprocessing
from slim.errors import StoreError
from slim.pipeline import Guard
from slim.runs import Figures, Record

if TYPE_CHECKING:
    from rich.console import RenderableType

    from slim.bench.wording import Row

NOT_MEASURED = "not measured"
UNIT_GAP = re.compile(r"(?<=\d) (?=(?:%|x|ms|points|[kMGT]?B?)\b|%)|(?<=95 %) (?=\d)")
"""The space between a figure and its unit, where a line must not break."""
ROWS_SHOWN = 500
"""Entries of one plan the page lists; a longer plan is cut with a note, report.json has it whole."""


class DataUsed(BaseModel):
    """The dataset of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str
    """The words of `--data`."""
    id: str
    """Fingerprint: how it was made, then the digest."""
    train: int | None = None
    """Training images."""
    val: int | None = None
    """Validation images."""


class Report(BaseModel):
    """Everything a run has to say."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["slim-report/1"] = "slim-report/1"
    """Format of this file."""
    model: str
    """Name of the backbone."""
    target: str | None = None
    """The words of `--target`, none when nothing was timed."""
    data: DataUsed | None = None
    """The dataset, none when the run had none."""
    seed: int = 0
    """Seed of the run."""
    guard: Guard
    """The guard's settings."""
    notices: tuple[str, ...] = ()
    """What the reader must know before the figures, one line each."""
    environment: dict[str, Any] = {}
    """slim.environment.describe()."""
    dense: Figures = {}
    """What the run is compared with: the network before the first stage that changes its structure."""
    steps: tuple[Record, ...] = ()
    """The chain in order."""
    final: Figures = {}
    """The file that ships; ratio, drop and agreement are against `dense`."""
    dense_input: Preprocessing | None = None
    """What the dense network is fed, none where an older slim wrote the report; here and below."""
    final_input: Preprocessing | None = None
    """What the file that ships is fed; another one where a pass changed it."""
    file: str | None = None
    """Path of the exported file inside the run directory."""


def load(path: str | Path) -> Report:
    """Report from report.json, or from the run directory it lies in.

    Raises:
        StoreError: no such file, or not a report of this format.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; `slim run` writes it") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StoreError(f"{path}: {place}: {first['msg']}; not a whole report; `slim run` writes it again") from error


def write(report: Report, folder: Path) -> None:
    """report.json and report.html in `folder`, each written beside its place and renamed.

    Raises:
        StoreError: the disk is full or the folder not writable; the files that were there are whole.
    """
    from slim.store import write_text

    page = to_html(report)  # before anything is written: a report that cannot be drawn leaves no half pair
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.html", page)


def to_html(report: Report) -> str:
    """The page: one file, no network, no script; every text that came from a file is escaped."""
    from jinja2 import Environment, StrictUndefined

    from slim.bench import charts, wording

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["glued"] = lambda text: UNIT_GAP.sub("\N{NO-BREAK SPACE}", text)
    environment.filters |= {name: getattr(wording, name) for name in ("number", "interval", "as_table", "as_text")}
    source = resources.files("slim.bench").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        headline=wording.headline(report),
        fed=wording.fed(report),
        tiles=wording.tiles(report),
        rows=wording.rows(report),
        columns=wording.COLUMNS,
        method=wording.method(report),
        scatter=charts.scatter(report),
        waterfall=charts.waterfall(report),
        rows_shown=ROWS_SHOWN,
        not_measured=NOT_MEASURED,
    )


def to_console(report: Report) -> RenderableType:
    """The headline, the notices and the step table, for `rich.console.Console.print`; fits 120 columns."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from slim.bench.wording import COLUMNS, fed, headline, interval, number, printable, rows

    def cell(text: str, style: str = "") -> Text:
        # Text, not markup, and printable: a pass option read from a file must not be able to drive the terminal.
        return Text("\n".join(map(printable, text.split("\n"))), style)

    def figure(row: Row, metric: str) -> Text:
        found = row.figures.get(metric)
        if found is None:
            return cell("-" if row.kind == "not run" else NOT_MEASURED, "dim")
        return cell("\n".join(filter(None, (number(found), interval(found)))))

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    table.add_column("step")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    table.add_column("verdict and why", overflow="fold")
    styles = {"kept": "green", "rolled back": "yellow", "final": "bold"}
    for row in rows(report):
        style = styles.get(row.kind, "dim")
        why = ": ".join(filter(None, (row.verdict, row.reason)))
        table.add_row(cell(row.label, style), *(figure(row, metric) for metric in COLUMNS), cell(why, style))
    notices = (cell(f"notice: {notice}", "yellow") for notice in report.notices)
    changed = (cell(line) for line in (fed(report),) if line)
    return Group(cell(headline(report), "bold"), *changed, *notices, table)
