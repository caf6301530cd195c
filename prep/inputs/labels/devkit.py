"""ILSVRC's devkit: the synset of each class number, and the ground truth of the validation images.

The devkit is a folder, a meta.mat, or the file ILSVRC2012_devkit_t12.tar.gz, which need not be unpacked. No name in
that tar archive is used as a path on the disk.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from prep.console import UserError
from prep.schema import read_regular

DEVKIT_NAME = "ILSVRC2012_devkit_t12"
GROUND_TRUTH_NAME = "ILSVRC2012_validation_ground_truth.txt"
_MAX_FILE_BYTES = 64 << 20  # largest size of a file that is read; the devkit's largest file has 300 KB
_ADVICE = f"Download {DEVKIT_NAME}.tar.gz from https://image-net.org and pass it with --devkit FILE."


@dataclass(frozen=True)
class Devkit:
    """The devkit at `path`: the bytes of its meta.mat and of its ground truth (b"" if there is no ground truth)."""

    path: Path
    meta: bytes
    ground_truth: bytes = b""

    def synsets(self) -> dict[int, str]:
        """Return {ILSVRC2012_ID: synset}. Raises UserError if the bytes are not those of a devkit's meta.mat."""
        from scipy.io import loadmat

        try:
            rows = loadmat(io.BytesIO(self.meta), squeeze_me=True)["synsets"]
            synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
            if len(set(synsets.values())) < len(rows):
                raise ValueError("a synset or a number occurs twice")
            return synsets
        except Exception as error:  # loadmat raises many kinds of errors for a damaged file
            raise UserError(f"{self.path} is not the devkit's meta.mat ({error}). {_ADVICE}") from None


def open_devkit(path: Path) -> Devkit:
    """Open the devkit that --devkit names. Raises UserError if the devkit has no meta.mat."""
    try:
        if path.is_dir():
            found = next(filter(None, (_in_folder(folder) for folder in _data_folders(path))), None)
        elif path.name.endswith((".tar.gz", ".tgz", ".tar")):
            found = _in_archive(path)
        else:
            found = Devkit(
                path, read_regular(path, _MAX_FILE_BYTES, _ADVICE), _read_if_there(path.with_name(GROUND_TRUTH_NAME))
            )
    except OSError as error:
        raise UserError(f"--devkit {path}: {error.strerror or error}. {_ADVICE}") from None
    if found is None:
        raise UserError(f"--devkit {path}: contains no meta.mat. {_ADVICE}")
    return found


def find_devkit(folders: list[Path]) -> Devkit | None:
    """Return the devkit, unpacked or not, in the first of the `folders` that contains a devkit.

    Returns None if no folder contains a devkit.
    """
    for folder in folders:
        for data in _data_folders(folder):
            found = _in_folder(data)
            if found:
                return found
        for name in (f"{DEVKIT_NAME}.tar.gz", f"{DEVKIT_NAME}.tgz", f"{DEVKIT_NAME}.tar"):
            if (folder / name).is_file():
                return open_devkit(folder / name)
    return None


def _data_folders(folder: Path) -> list[Path]:
    return [folder, folder / "data", folder / DEVKIT_NAME / "data"]


def _in_folder(folder: Path) -> Devkit | None:
    meta = folder / "meta.mat"
    if not meta.is_file():
        return None
    return Devkit(meta, read_regular(meta, _MAX_FILE_BYTES, _ADVICE), _read_if_there(folder / GROUND_TRUTH_NAME))


def _read_if_there(path: Path) -> bytes:
    return read_regular(path, _MAX_FILE_BYTES, _ADVICE) if path.is_file() else b""


def _in_archive(path: Path) -> Devkit | None:
    """Return the files of the devkit in a tar archive. Raises UserError if the archive is damaged."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name in ("meta.mat", GROUND_TRUTH_NAME) and member.size <= _MAX_FILE_BYTES:
                    file = tar.extractfile(member)
                    contents[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        reason = str(error).partition(":")[0]
        raise UserError(f"--devkit {path}: the archive is damaged ({reason}). {_ADVICE}") from None
    return Devkit(path, contents["meta.mat"], contents.get(GROUND_TRUTH_NAME, b"")) if "meta.mat" in contents else None
