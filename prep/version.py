"""Version of this software, from the installed package or from the checkout.

This module also lists the packages that optional features need.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import click

from prep.console import print_line

DISTRIBUTION = "alexnet"
UNKNOWN = "unknown"

# Packages of the extras in pyproject.toml, as arguments for pip. Errors name these packages instead of
# `alexnet[EXTRA]`, because pip can install `alexnet[EXTRA]` only from a checkout.
PACKAGES = {
    "cluster": ("ray[default]>=2.60,<3",),
    "cuda12": ("nvidia-dali-cuda120>=2.4,<3",),
    "cuda13": ("nvidia-dali-cuda130>=2.4,<3",),
    "export": ("onnx>=1.19", "onnxscript>=0.5", "safetensors>=0.5"),
    "figures": ("matplotlib>=3.9",),
    "heic": ("pillow-heif>=1.0",),
    "jxl": ("pillow-jxl-plugin>=1.3",),
    "parquet": ("pyarrow>=18",),
    "remote": ("obstore>=0.12,<0.13",),
    "tensorboard": ("tensorboard>=2.16",),
}

Command = TypeVar("Command", bound=Callable[..., Any])


def pip_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, such as `pip install 'matplotlib>=3.9'`."""
    return f"pip install {' '.join(map(quote, PACKAGES[extra]))}"


@cache
def package_version() -> str:
    """Return the version, such as `0.1.0`.

    The version is read from the metadata that pip wrote. If there is no metadata (a checkout that is only on
    PYTHONPATH), the version is read from the pyproject.toml next to the packages. If pyproject.toml is missing too, the
    version is `unknown`.
    """
    # Imported only when needed, because the import takes 20 ms.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return checkout_version(Path(__file__).parents[1])


def checkout_version(root: Path) -> str:
    """Return the version in `root`/pyproject.toml; `unknown` if the file is missing or of another project."""
    import tomllib

    try:
        project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
        return str(project["version"]) if project["name"] == DISTRIBUTION else UNKNOWN
    except (OSError, ValueError, KeyError):
        return UNKNOWN


def version_option(command: Command) -> Command:
    """Add the option --version to a command group. click's own option works only for an installed package."""

    def show(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            print_line(f"{ctx.find_root().info_name}, version {package_version()}")
            ctx.exit()

    option = click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )
    return option(command)
