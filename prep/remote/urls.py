"""Opens the folder that a user names by a path, file:///PATH, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prep.console import WrongArgument
from prep.remote.folder import Folder, LocalFolder
from prep.remote.object_store import ObjectFolder

SCHEMES = ("s3", "gs")  # schemes of object storage


@lru_cache(maxsize=8)
def open_folder(name: str) -> Folder:
    """Open a folder by its path or URL. Raises UserError if the URL is not supported or obstore is not installed."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name)
    if match is None:
        return LocalFolder(Path(name))
    scheme = match[1].lower()
    if scheme == "file":
        url = urlsplit(name)
        if url.netloc not in ("", "localhost") or not url.path:
            raise WrongArgument(f"{name}: expected file:///PATH, with three slashes.")
        return LocalFolder(Path(unquote(url.path)))
    if scheme not in SCHEMES:
        raise WrongArgument(
            f"{name}: {scheme}:// is not supported. Pass a path, file://, "
            f"{' or '.join(f'{known}://BUCKET/PREFIX' for known in SCHEMES)}."
        )
    bucket, _, prefix = name[match.end() :].partition("/")
    if not bucket or "//" in prefix or any(part in (".", "..") for part in prefix.split("/")):
        raise WrongArgument(
            f"{name}: expected {scheme}://BUCKET/PREFIX, with a bucket, and with no part that is empty, `.` or `..`."
        )
    return ObjectFolder(scheme, bucket, prefix.rstrip("/"))
