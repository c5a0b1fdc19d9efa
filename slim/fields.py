"""Fields of a pass as options of the command line."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click


def option_of(name: str, info: Any) -> click.Option:
    """The option of a pydantic field: its flag, type, help and default."""
    annotation = info.annotation
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    flag = "--" + name.replace("_", "-")
    default = ", ".join(map(str, info.default)) if isinstance(info.default, tuple) else info.default
    text = f"{info.description} [default: {'none' if default in (None, '') else default}]"
    if annotation is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    if get_origin(annotation) is tuple:
        numbers = get_args(annotation)[0] in (int, float)
        return click.Option([flag], multiple=True, callback=_listed if numbers else None, help=text)
    if get_origin(annotation) is Literal:
        return click.Option([flag], type=click.Choice(get_args(annotation)), help=text)
    return click.Option([flag], type=annotation if annotation in (int, float) else str, help=text)


def _listed(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Numbers of `--widths 1,0.5` as of `--widths 1 --widths 0.5`."""
    return tuple(part.strip() for value in values for part in value.split(","))
