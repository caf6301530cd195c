"""Version of this software, read from the installed package or, if it is not installed, from the checkout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import click

DISTRIBUTION = "alexnet"
UNKNOWN = "unknown"

Command = TypeVar("Command", bound=Callable[..., Any])


@cache
def package_version() -> str:
    """The version, such as `0.1.0`.

    The version is read from the metadata that pip wrote. If there is no metadata (a checkout that is only on
    PYTHONPATH), the version is read from the pyproject.toml next to the packages. If pyproject.toml is missing too, the
    version is `unknown`.
    """
    from importlib.metadata import PackageNotFoundError, version  # imported only when needed: the import takes 20 ms

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return checkout_version(Path(__file__).parents[1])


def checkout_version(root: Path) -> str:
    """The version in `root`/pyproject.toml, or `unknown` if the file is missing or of another project."""
    import tomllib

    try:
        project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
        return str(project["version"]) if project["name"] == DISTRIBUTION else UNKNOWN
    except (OSError, ValueError, KeyError):
        return UNKNOWN


def version_option(command: Command) -> Command:
    """Add the option --version to a command group. click's own option works for an installed package only."""

    def show(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(f"{ctx.find_root().info_name}, version {package_version()}")
            ctx.exit()

    option = click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )
    return option(command)
