"""Where photographs come from: folders of classes, a flat folder with labels, or archives of either.

Listing opens nothing but label files and archives. A name that begins with a dot is no input; any other entry ends in
the listing, or in `refused` with the reason: nothing is passed over without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.inputs.archive import Archive, list_archive
from prep.inputs.folder import Folder, list_folder
from prep.inputs.labels import read_labels
from prep.inputs.listing import Listing
from prep.inputs.reader import Place, Source
from prep.store.manifest import SPLITS


def find_splits(source: Path, split: str | None) -> dict[str, Path]:
    """What to build each split of: SOURCE/train and SOURCE/val, or their archives, where SOURCE has them, else SOURCE.

    Raises UserError for a SOURCE that is missing, neither a folder nor an archive, or lacks the split that was named.
    """
    if source.is_file():
        guess = next((name for name in SPLITS if source.stem == name or f"img_{name}" in source.name), SPLITS[0])
        return {split or guess: source}
    if not source.is_dir():
        raise UserError(f"{source}: {'not a folder or an archive' if source.exists() else 'no such folder'}.")
    inside = {}
    for name in SPLITS:
        archives = (source / f"ILSVRC2012_img_{name}.tar", source / f"{name}.tar")
        found = [path for path in (source / name, *archives) if path.is_dir() or (path in archives and path.is_file())]
        if found:
            inside[name] = found[0]
    if split is None:
        _tell_beside(source, inside)
        return inside or {SPLITS[0]: source}
    if not inside:
        return {split: source}
    if split not in inside:
        raise UserError(f"--split {split}: {source} has {' and '.join(inside)} but no {split}.")
    return {split: inside[split]}


def _tell_beside(source: Path, inside: dict[str, Path]) -> None:
    """Say what is left aside where one folder looks like a split: it may be a class of that name."""
    if inside and len(inside) < len(SPLITS):
        others = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name not in (*SPLITS, "test"))
        if others:
            found = " and ".join(path.name for path in inside.values())
            say(
                f"{source}: taking {found}; {count_noun(len(others), 'folder')} beside it not (first: {others[0]}). "
                "Are they classes? Then build from a folder of another layout."
            )


def read_source(
    path: Path,
    split: str,
    labels: Path | None,
    label_order: str | None,
    known: Sequence[str],
    follow_links: bool = False,
) -> Source:
    """List one split, from a folder or a tar archive.

    Class folders give classes and labels by their sorted names. Flat photographs need `labels`, see prep.inputs.labels;
    `known` are the classes that the store already has, empty where it has none. Symbolic links that lead out of the
    folder are refused unless `follow_links`. Raises UserError for a source that holds neither, labels that do not fit,
    and classes other than `known`.
    """
    if path.is_file():
        place: Place = Archive(path)
        found = list_archive(path, flat=labels is not None)
    else:
        place = Folder(path)
        found = list_folder(path, split, follow_links)
    if found.flat:
        named, classes = read_labels(
            labels, [found.listing.path(i) for i in range(len(found.listing))], path, label_order, known
        )
        inputs = Listing()
        for item in found.listing:
            inputs.add(item.path, named[item.path], item.size, item.stamp_ns, item.at)
        return Source(place, split, classes, inputs, found.refused)
    if labels is not None:
        say(f"{path}: class folders give the labels of {split}; --labels is not needed there.")
    _same_classes(found.classes, known, path)
    return Source(place, split, found.classes, found.listing, found.refused)


def _same_classes(found: Sequence[str], known: Sequence[str], root: Path) -> None:
    if known and tuple(found) != tuple(known):
        odd = sorted(set(found) ^ set(known))
        raise UserError(
            f"{root}: {len(found)} classes, the store has {len(known)}"
            + (f" (first that only one of them has: {odd[0]})" if odd else "")
            + ". Splits of one store share their classes."
        )
