"""The option --part of `alexprep build-lmdb`, and the build command that messages show."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from prep.console import WrongArgument

if TYPE_CHECKING:  # a run-time import would load LMDB and Pillow, even for --help
    from prep.build.parts import Part


def parse_part(part: str | None, cluster: str | None, dry_run: bool, restart: bool) -> Part | None:
    """Return the value of --part. Raises UserError if the value is wrong, or if another option excludes --part."""
    if part is None:
        return None
    from prep.build.parts import Part

    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise WrongArgument(f"--part {part}: expected I/N with I from 1 to N, for example 3/16.")
    if cluster is not None:
        raise WrongArgument("--part is for builds without a cluster. Leave --part out: --cluster divides the shards.")
    if dry_run:
        raise WrongArgument("--dry-run estimates the whole build. Leave out --part.")
    if restart:
        raise WrongArgument(
            "--restart would discard the shards of all parts. When no part is running, delete the folder of the split "
            "in the store; then start the parts without --restart."
        )
    return Part(int(number), int(count))


def command_line(context: click.Context) -> str:
    """Return the `build-lmdb` command that the user typed, without --part, --jobs and --json, for messages."""
    words = ["alexprep", "build-lmdb"]
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        given = context.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
        if not given or name in ("part", "jobs", "as_json"):
            continue
        for each in value if parameter.multiple and value else (value,):
            if isinstance(parameter, click.Option):
                words.append(parameter.opts[-1])
            if each is not True:
                words.append(quote(str(each)))
    return " ".join(words)
