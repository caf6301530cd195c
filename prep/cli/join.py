"""`alexprep join`: completes a store whose shards were built in parts."""

from __future__ import annotations

from pathlib import Path

import click

from prep.build.report import report_build
from prep.cli.options import allow_empty_option
from prep.console import UserError, count_noun, json_option, print_json, print_line, store_option
from prep.files import no_lock_option
from prep.store.manifest import SPLITS, Store


@click.command("join")
@store_option
@click.option(
    "--split", type=click.Choice(SPLITS), help="Split to complete.  [default: every split whose build has begun]"
)
@click.option(
    "--max-bad",
    type=click.IntRange(0),
    metavar="N",
    help="Largest number of bad inputs that the parts may have left out.  [default: no limit]",
)
@allow_empty_option
@no_lock_option
@json_option
def join(store: Path, split: str | None, max_bad: int | None, allow_empty_classes: bool, as_json: bool) -> None:
    """Complete a store whose shards were built with `build-lmdb --part`.

    Normally, the part that ends last completes the store. `join` is needed only if this part was interrupted. If shards
    are missing, `join` prints the commands that build these shards, and the exit code is 1.

    \b
    Example:
      alexprep join --store /nfs/store
    """
    from prep.build.parts import begun_splits, join_split, shard_list

    begun = [name for name in begun_splits(store) if split in (None, name)]
    if not begun:
        built = Store.open(store)
        for name in [split] if split else list(built.splits):
            report_build(built, name, 0, 0.0, as_json, "  the split is complete; nothing to do")
        return
    unfinished = []
    for name in begun:
        joined, missing, parts = join_split(store, name, max_bad, allow_empty_classes)
        if joined is not None:
            report_build(joined, name, 0, 0.0, as_json, "  completed from finished shards")
            continue
        unfinished.append(name)
        words = f"{parts.command}{'' if '--split' in parts.command else f' --split {name}'}"
        commands = {part: f"{words} --part {part}" if part.count > 1 else words for part in missing}
        if as_json:
            rows = [{"part": str(part), "shards": missing[part], "command": commands[part]} for part in missing]
            print_json({"split": name, "missing": rows})
            continue
        for part, shards in missing.items():
            text = f"{name}: part {part} lacks {count_noun(len(shards), 'shard')} ({shard_list(shards)}). Build with:"
            print_line(f"{text} {commands[part]}")
    if unfinished:
        raise UserError(
            f"{store}: {' and '.join(unfinished)} cannot be completed, because shards are missing. Run the commands "
            "that are printed above. The command that ends last completes the store."
        )
