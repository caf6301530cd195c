"""Rules for the classes of a data set: folders that are never classes, order of the classes, classes without images.

Every input format uses these functions, so that the same data set has the same classes in every format. A label is an
index into the classes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.inputs.listing import Listing
from prep.inputs.names import composed, name_text, visible
from prep.schema import MAX_TEXT_BYTES, read_regular
from prep.store.models import MAX_CLASSES

# Folders that operating systems, network drives and programs create. Upper and lower case are treated as equal, except
# that the names RECYCLED and RECYCLER must be in upper case.
_NO_CLASS_FOLDERS = re.compile(
    rb"lost\+found|found\.\d{3}|\$recycle\.bin|(?-i:RECYCLE[DR])|\$extend|\$winreagent|\$sysreset|"
    rb"system volume information|@eadir|@tmp|@__thumb|#recycle|#snapshot|~snapshot|@recycle|"
    rb"@recently-snapshot|@sharesnap|@syno.*|network trash folder|temporary items|"
    rb"__macosx|__pycache__|paxheaders?(\.\w+)?|\..*",
    re.IGNORECASE,
)
_SYSTEM_FILES = re.compile(
    rb"(eh)?thumbs(_vista)?\.db(:encryptable)?|desktop\.ini|desktop d[bf]|icon\r|folder\.htt|.*@syno\w+|"
    rb".*:zone\.identifier|\..*",
    re.IGNORECASE | re.DOTALL,
)
_CLASS_FILE_HEADERS = ("class", "classes", "class_name", "label", "labels", "name", "category", "synset", "wnid")
_IMAGE_NAMES = re.compile(
    rb".*\.(jpe?g?|jfif|pjpeg|jpg_large|png|apng|gif|bmp|dib|webp|tiff?|p[bgpn]m|avif|hei[cf]s?|jxl|jp2|j2k)",
    re.IGNORECASE | re.DOTALL,
)

SPLIT_OF_FOLDER = {  # name of a folder in lower case -> split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

NO_CLASS = "a folder of the system or of a program, not a class"
STRAY_FILE = "a file beside the class folders"
INNER_FOLDER = "a folder inside a class folder, without photographs"
NO_PHOTOGRAPH = "a file beside the photographs; its name is not that of an image"
SYSTEM_FILE = "a file of the system, not a photograph"


def is_no_class_folder(name: bytes) -> bool:
    """Return whether a folder of this name is never a class, for example `lost+found`, `@eaDir` or `__MACOSX`."""
    return _NO_CLASS_FOLDERS.fullmatch(name) is not None


def is_system_file(name: bytes) -> bool:
    """Return whether a file of this name is never a photograph, for example `Thumbs.db` or `.hidden`."""
    return _SYSTEM_FILES.fullmatch(name) is not None


def has_image_name(name: bytes) -> bool:
    """Return whether a file name has the extension of an image file.

    A file in a class folder is an input even if its name has another extension.
    """
    return _IMAGE_NAMES.fullmatch(name) is not None


def may_be_image(name: bytes) -> bool:
    """Return whether a file with this name may be an image.

    Files named `a.jpg` or `a` may be images. Files named `README`, `a.txt` or `a.db` may not.
    """
    is_text = name.upper() in (b"README", b"LICENSE", b"LICENCE", b"COPYING", b"NOTICE", b"VERSION", b"MAKEFILE")
    return has_image_name(name) or not (is_text or b"." in name)


def class_names(folders: Sequence[bytes], where: str, are_given: bool = False) -> list[str]:
    """Return the class name of each class folder.

    The class name is the path of the folder. If all paths end with the same part (`n01/images`), this part is left out.
    `are_given` is true if the store or a file lists all classes. Raises UserError if a part of a path is the name of a
    split. If `are_given` is false, UserError is also raised if a class folder is inside another class folder, or if
    some class folders are at the top level and others are deeper.
    """
    parts = [folder.split(b"/") for folder in folders]
    inner = [path for path in parts if len(path) > 1]
    of_split = next((path for path in inner if any(_text([part]).lower() in SPLIT_OF_FOLDER for part in path)), None)
    if of_split:
        raise UserError(
            f"{where}: the path of the class folder {_text(of_split)} contains the name of a split. Name the folder "
            "of one split as SOURCE. If class folders contain folders of splits, move the class folders into the "
            "folder of their split."
        )
    nested = None if are_given else _nested_folders(parts)
    if nested:
        outside, inside = map(_text, nested)
        raise UserError(
            f"{where}: photographs in {outside}, and in the folder {inside} inside it, so it is unclear whether "
            f"{inside} is a separate class. If {inside} is a class, name all classes with --classes FILE, one on each "
            f"line. Otherwise move the photographs of {inside} into {outside}."
        )
    top = next((path for path in parts if len(path) == 1), None)
    if top and inner and not are_given:
        raise UserError(
            f"{where}: photographs in {_text(top)}, and deeper in {_text(inner[0])}, so it is unclear which folders "
            "are the classes. Put all class folders at the same depth, or name all classes with --classes FILE."
        )
    if len(parts) > 1 and inner and not top and len({path[-1] for path in parts}) == 1:
        parts = [path[:-1] for path in parts]
    names = [_text(path) for path in parts]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: two class folders have the same name when bytes that are not UTF-8 are escaped.")
    return names


def _nested_folders(paths: Sequence[list[bytes]]) -> tuple[list[bytes], list[bytes]] | None:
    """Return (outer class folder, inner class folder) if a class folder is inside another class folder, else None."""
    folders = set(map(tuple, paths))
    pairs = ((path[:depth], path) for path in paths for depth in range(1, len(path)) if tuple(path[:depth]) in folders)
    return next(pairs, None)


def _text(parts: Sequence[bytes]) -> str:
    return name_text(b"/".join(parts))


def order_classes(names: Iterable[str], origin: str) -> tuple[str, ...]:
    """Return the classes in order.

    If all names are numbers, the order is that of the numbers; otherwise, the names are sorted as text. The parts of a
    name with slashes (`a/airfield`) are compared one after another. Parts are compared as numbers if all names in the
    same folder are numbers. `origin` is the beginning of messages. Raises UserError if two names are the same number
    (`1` and `01`). Also raises UserError if only some names are numbers, and their numeric and text orders differ.
    """
    names = set(names)
    _compare_spellings(names, origin)
    siblings: defaultdict[str, set[str]] = defaultdict(set)
    split_names = [name.split("/") for name in names]
    for parts in split_names:
        for depth, part in enumerate(parts):
            siblings["/".join(parts[:depth])].add(part)
    numbered = {folder for folder, found in siblings.items() if _are_numbers(found, origin)}

    def key(parts: Sequence[str]) -> list[tuple[int, str]]:
        folders = ["/".join(parts[:depth]) for depth in range(len(parts))]
        return [(int(part) if folder in numbered else 0, part) for folder, part in zip(folders, parts, strict=True)]

    return tuple("/".join(parts) for parts in sorted(split_names, key=key))


def _compare_spellings(names: Collection[str], origin: str) -> None:
    """Raise UserError if two names look the same. Print a warning if two names differ only in upper and lower case."""
    by_sight: dict[str, str] = {}
    by_letters: dict[str, str] = {}
    for name in sorted(names):
        other = by_sight.setdefault(visible(name), name)
        if other != name:
            raise UserError(
                f"{origin}: the classes {other!a} and {name!a} look the same. The two names differ in invisible "
                "characters or in the form of accents. Give both classes the same name."
            )
        other = by_letters.setdefault(visible(name).casefold(), name)
        if other != name:
            say(f"{origin}: the classes {other} and {name} differ only in upper and lower case.")


def _are_numbers(names: set[str], origin: str) -> bool:
    """Return whether all `names` are numbers.

    Raises UserError if the order of the names is ambiguous (see order_classes).
    """
    numbers = [name for name in names if is_number(name)]
    by_value, by_text = sorted(numbers, key=lambda name: (int(name), name)), sorted(numbers)
    same = next((pair for pair in pairwise(by_value) if int(pair[0]) == int(pair[1])), None)
    if same:
        raise UserError(
            f"{origin}: the classes {same[0]} and {same[1]} are the same number, so their order is ambiguous. "
            "Give the order with --classes FILE, one class on each line."
        )
    if numbers and len(numbers) < len(names) and by_value != by_text:
        other = min(names.difference(numbers))
        pair = next(pair for pair in pairwise(by_text) if int(pair[0]) > int(pair[1]))
        raise UserError(
            f"{origin}: some classes are numbers ({pair[0]}, {pair[1]}) and others are not ({other}), so it is "
            "ambiguous which of the numbers comes first. Give the order with --classes FILE, one class on each line."
        )
    return bool(numbers) and len(numbers) == len(names)


def is_number(name: str) -> bool:
    """Return whether a name consists of at most 18 decimal digits."""
    return name.isascii() and name.isdecimal() and len(name) <= 18


def numbered_classes(first: int, last: int, origin: str) -> tuple[str, ...]:
    """Return the numbers `first` to `last` as class names.

    Raises UserError, with `origin` in its message, if there are more than MAX_CLASSES.
    """
    if last - first + 1 > MAX_CLASSES:
        raise UserError(
            f"{origin}: the labels need {last - first + 1:,} classes; the limit is {MAX_CLASSES:,}. "
            "Correct the largest label."
        )
    return tuple(str(k) for k in range(first, last + 1))


def with_classes(
    found: Sequence[str], listing: Listing, wanted: Sequence[str], owner: str, where: str, allow_empty: bool
) -> Listing:
    """Convert the labels of `listing` from indices into `found` to indices into `wanted`.

    `owner` is a text for messages: it says where the classes `wanted` come from. Raises UserError if `wanted` lacks a
    class of `found`. Unless `allow_empty` is true, also raises UserError if `found` lacks a class of `wanted`.
    """
    if tuple(found) == tuple(wanted):
        return listing
    position = {composed(name): label for label, name in enumerate(wanted)}
    new = [name for name in found if composed(name) not in position]
    present = {composed(name) for name in found}
    missing = [] if allow_empty else [name for name in wanted if composed(name) not in present]
    counts = f"{where}: {count_noun(len(found), 'class', 'classes')}, {owner} has {len(wanted):,}. "
    if new or missing:
        rows = []
        if new:
            rows.append(f"Only in this split: {examples(new)}.")
        if missing:
            rows.append(f"Only in {owner}: {examples(missing)}.")
        advice = "All splits of a store must have the same classes."
        if not new:
            advice += " To build a split that lacks some of these classes, pass --allow-empty-classes."
        raise UserError(counts + " ".join(rows) + " " + advice)
    return listing.relabelled([position[composed(name)] for name in found])


def wanted_classes(
    file: Path | None, found: Sequence[str], store_classes: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    """Return the classes in the order of the labels, and a text that says where these classes come from.

    If the store has classes, the classes of the store are returned. If the store has none, the classes in `file`, the
    file of --classes, are returned. If `file` is None too, the result is empty. `found` has the classes of the images;
    it helps to recognize the class names in the file. Raises UserError if the file has other classes than the store, or
    has the same classes in another order.
    """
    if file is None:
        return tuple(store_classes), "the store"
    names = read_class_file(file, {*store_classes, *found})
    if store_classes and names != tuple(store_classes):
        pairs = zip_longest(names, store_classes, fillvalue="no class")
        label, (new, old) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"--classes {file}: label {label} is {new}, but {old} in the store. The classes of a store keep their "
            "labels: leave out --classes, or choose another --store."
        )
    return names, str(file)


def refuse_empty_classes(where: str, empty: Sequence[str], refused: Iterable[tuple[str, str]] = ()) -> None:
    """Raise UserError if `empty`, the list of the classes without a photograph, has an entry.

    `refused` has the name of each refused input and the reason for refusing it; the message quotes one of the reasons.
    """
    if not empty:
        return
    entries, names = list(refused), set(empty)
    reason = next((f" {name}: {why}." for name, why in entries if name.rpartition("/")[0] in names), "")
    if entries and not reason:
        reason = f" The first input that cannot be read is {entries[0][0]}: {entries[0][1]}."
    what = "class has" if len(empty) == 1 else "classes have"
    raise UserError(
        f"{where}: {len(empty):,} {what} no photograph: {examples(empty)}.{reason} Add photographs, remove these "
        "classes, or pass --allow-empty-classes to give labels to empty classes, too."
    )


def examples(names: Collection[str], shown: int = 3) -> str:
    """Return the first names of a collection, for a message: `a, b, c and 17 more`."""
    first = ", ".join(list(names)[:shown])
    return first + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def first_labels_text(classes: Sequence[str], shown: int = 5) -> str:
    """Return the first classes and the last class with their labels: `0 n01440764, 1 n01443537, …, 999 n15075141`."""
    rows = [f"{label} {name}" for label, name in enumerate(classes)]
    return ", ".join(rows if len(rows) <= shown + 1 else [*rows[:shown], "…", rows[-1]])


def read_class_file(file: Path, known: Collection[str] = ()) -> tuple[str, ...]:
    """Read the classes of `--classes FILE`, one on each line, in the order of the labels.

    A line consists of the name of a class, or begins with such a name: `n01440764 tench`, `/a/airfield 0`, `cat,0`.
    The name is the longest `known` class with which the line begins, or else the first word of the line. Lines that
    begin with `#`, and a first line such as `class` (a header), are left out unless they begin with a `known` class.
    Raises UserError if the file cannot be read, if a class occurs twice, or if a line names several classes. Also
    raises UserError if the numbers after the names are 0 to K − 1 or 1 to K for K lines, but do not ascend.
    """
    try:
        text = name_text(read_regular(file, MAX_TEXT_BYTES, "Name a text file.").removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise UserError(f"--classes {file}: {error.strerror or error}.") from None
    written = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    lines = [line for line in written if line and (not line.startswith("#") or _class_of_line(line, known)[0] in known)]
    if lines and lines[0].lower() in _CLASS_FILE_HEADERS and lines[0] not in known:
        say(f"--classes {file}: line 1 is taken as a header: {lines.pop(0)}.")
    if not lines:
        raise UserError(f"--classes {file}: the file is empty.")
    rows = [_class_of_line(line, known) for line in lines]
    of_several = next((row for row in rows if _has_classes(row[1], row[0], known)), None)
    if of_several:
        raise UserError(
            f"--classes {file}: a line names several classes, {of_several[0]} and {of_several[1][:60]}. Expected one "
            "class on each line."
        )
    names = [name for name, _ in rows]
    seen: set[str] = set()
    double = next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
    if double is not None:
        raise UserError(
            f"--classes {file}: {double} occurs twice. Expected one class on each line, in the order of the labels."
        )
    numbers = [int(rest) for _, rest in rows if is_number(rest)]
    ordered = sorted(numbers)
    if numbers != ordered and ordered in (list(range(len(rows))), list(range(1, len(rows) + 1))):
        wrong = next(k for k, number in enumerate(numbers) if number != ordered[k])
        raise UserError(
            f"--classes {file}, line {wrong + 1}: number {numbers[wrong]} follows {names[wrong]}, but the order of the "
            "lines gives the labels. Sort the lines by these numbers, or remove the numbers."
        )
    return tuple(names)


def _has_classes(rest: str, name: str, known: Collection[str]) -> bool:
    """Return whether `rest`, the text after the class `name` in a line, consists only of names of other classes."""
    words = set(re.split(r"[,;\s]+", rest)) - {""}
    return bool(words) and all(word in known and word != name and not is_number(word) for word in words)


def _class_of_line(line: str, known: Collection[str]) -> tuple[str, str]:
    """Return the name of the class in a line, and the rest of the line."""
    candidates = [line, *(line[: match.start()] for match in reversed(list(re.finditer(r"[\s,;]+", line))))]
    stripped = [(text.strip("\"'").lstrip("/"), line[len(text) :].strip(" \t,;\"'")) for text in candidates]
    for name, rest in stripped:
        if name in known:
            return name, rest
    return stripped[-1]
