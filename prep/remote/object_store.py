"""Reads and writes a folder in a bucket of S3 or Google Cloud Storage, with the library obstore.

A request that fails because of the connection or the server is sent again. obstore first repeats the request almost at
once (INNER_RETRIES). If these tries fail, too, this module sends the request again after each of the waiting times in
WAITS_S, until a try succeeds. A large file is read in parts of CHUNK_BYTES, and only a part that failed is read again.
A large file is written as a multipart upload, in which obstore repeats a part that failed. The file appears in the
bucket as a whole or not at all.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from prep.console import UserError
from prep.remote.aws_profile import profile_settings
from prep.remote.folder import CHUNK_BYTES, MAX_SMALL_FILE_BYTES, CountBytes, FileState
from prep.schema import open_regular, read_regular
from prep.version import pip_command

T = TypeVar("T")

INNER_RETRIES: dict[str, Any] = {
    "max_retries": 2,
    "backoff": {"init_backoff": timedelta(milliseconds=100)},  # the second wait is twice as long as the first
}
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # mean waiting times before the second and later tries of a request
# Time limits of a request for one part, long enough for a slow uplink.
_TIMEOUTS = {"connect_timeout": "5s", "timeout": "900s"}
# A download request fails if no byte arrives for this time. Upload requests do not have this limit, because the limit
# would include the time in which a part is sent.
_READ_TIMEOUT = "60s"
_PARTS_AT_ONCE = 2  # number of parts of one upload that are kept in memory and sent at the same time
_MAX_PARTS = 9_000  # largest number of parts of one upload; S3 allows 10,000

_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
}


def _obstore(scheme: str) -> ModuleType:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "obstore":
            raise
        hint = f"Install obstore with: {pip_command('remote')}"
        raise UserError(f"{scheme}:// needs obstore, which is not installed. {hint}") from None
    module: ModuleType = obstore
    return module


class ObjectFolder:
    """The folder `prefix` of a bucket: all objects whose keys begin with `prefix`/. Implements Folder."""

    is_remote = True

    def __init__(self, scheme: str, bucket: str, prefix: str) -> None:
        self._obstore = _obstore(scheme)
        self._scheme, self._bucket = scheme, bucket
        self.name = f"{scheme}://{bucket}/{prefix}".rstrip("/")
        self.retries = 0
        options: dict[str, Any] = {"prefix": prefix or None, "retry_config": dict(INNER_RETRIES)}
        kind = self._obstore.store.GCSStore
        if scheme == "s3":
            kind = self._obstore.store.S3Store
            options |= profile_settings()
        # With allow_http, obstore connects without TLS only if the user's endpoint begins with http://.
        client_options = {**_TIMEOUTS, "allow_http": True}
        try:
            self._store: Any = kind(bucket, **options, client_options={**client_options, "read_timeout": _READ_TIMEOUT})
            self._writing_store: Any = kind(bucket, **options, client_options=client_options)
        except (self._obstore.exceptions.BaseError, ValueError, OSError) as error:
            raise UserError(f"{self.name}: {_reason(error)}. Correct the environment variables.") from None

    def is_empty(self) -> bool:
        """See Folder.is_empty."""
        return not self._tried("", lambda: next(iter(self._obstore.list(self._store, chunk_size=1)), []))

    def states(self, paths: Iterable[str]) -> dict[str, FileState]:
        """See Folder.states. This method lists all objects of the folder."""
        wanted = set(paths)

        def listed() -> dict[str, FileState]:
            pages = self._obstore.list(self._store, chunk_size=1000)
            return {meta["path"]: _state(meta) for page in pages for meta in page if meta["path"] in wanted}

        return self._tried("", listed)

    def read(self, path: str) -> bytes:
        """See Folder.read."""
        return self._tried(path, lambda: self._get(path, {}, MAX_SMALL_FILE_BYTES))

    def chunks(self, path: str, state: FileState) -> Iterator[bytes]:
        """See Folder.chunks."""
        for start in range(0, state.size_bytes, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, state.size_bytes)
            options: dict[str, Any] = {"range": (start, end)}
            if state.version:
                options["if_match"] = state.version
            chunk = self._tried(path, partial(self._get, path, options))
            if len(chunk) != end - start:
                raise UserError(
                    f"{self.name}/{path}: the server sent {len(chunk):,} bytes, expected {end - start:,}. Run the same "
                    "command again."
                )
            yield chunk

    def _get(self, path: str, options: dict[str, Any], max_bytes: int | None = None) -> bytes:
        result = self._obstore.get(self._store, path, options=options)
        size = result.meta["size"]
        if max_bytes is not None and size > max_bytes:
            raise UserError(f"{self.name}/{path} has {size:,} bytes, expected at most {max_bytes:,}. Copy it again.")
        return bytes(result.bytes())

    def write(self, path: str, content: bytes) -> None:
        """See Folder.write."""
        self._tried(path, lambda: self._obstore.put(self._writing_store, path, content, use_multipart=False))

    def upload(self, path: str, file: Path, count: CountBytes) -> FileState:
        """Upload a local file of any size.

        `count` is called with the number of bytes that have been passed to obstore so far.
        """
        size_bytes = file.stat().st_size
        chunk_bytes = max(CHUNK_BYTES, -(-size_bytes // _MAX_PARTS))

        def send() -> None:
            if size_bytes <= chunk_bytes:
                content = read_regular(file, size_bytes, "Run the same command again.")
                self._obstore.put(self._writing_store, path, content, use_multipart=False)
                count(len(content))
                return
            options = {"chunk_size": chunk_bytes, "max_concurrency": _PARTS_AT_ONCE}
            self._obstore.put(self._writing_store, path, _counted_chunks(file, chunk_bytes, count), **options)

        self._tried(path, send)
        return self._tried(path, lambda: _state(self._obstore.head(self._store, path)))

    def delete(self, paths: Iterable[str]) -> None:
        """See Folder.delete."""
        for path in paths:
            with suppress(FileNotFoundError):
                self._tried(path, partial(self._obstore.delete, self._store, path))

    def _tried(self, path: str, request: Callable[[], T]) -> T:
        """Send a request and return its result.

        If the request fails for a temporary reason, send it again after each of the waiting times in WAITS_S, until it
        succeeds.
        """
        waits_s = list(WAITS_S)
        while True:
            try:
                return _interruptible(request)
            except (self._obstore.exceptions.BaseError, OSError) as error:
                if not waits_s or not self._is_temporary(error):
                    self._raise(path, error)
            self.retries += 1
            time.sleep(waits_s.pop(0) * random.uniform(0.5, 1.5))

    def _is_temporary(self, error: Exception) -> bool:
        """Return whether the same request can succeed later.

        A second try may succeed after a broken connection, after a timeout, or after a status of 408, 429 or 5xx. A
        second try can also succeed if the server has dropped an unfinished multipart upload, because this module then
        sends the whole upload again.
        """
        text = str(error)
        if "NoSuchUpload" in text:
            return True
        status = re.search(r"status code: (\d{3})", text)
        if type(error) is not self._obstore.exceptions.GenericError or _METADATA_SERVICE.search(text):
            return False
        return status is None or status[1] in ("408", "429") or status[1].startswith("5")

    def _raise(self, path: str, error: Exception) -> NoReturn:
        """Raise FileNotFoundError if the bucket exists, but not the object.

        For other errors, raise UserError with the reason and advice.
        """
        text, where = str(error), f"{self.name}/{path}".rstrip("/")
        exceptions = self._obstore.exceptions
        if "NoSuchBucket" in text or (isinstance(error, FileNotFoundError) and not path):
            raise UserError(
                f"{self.name}: there is no bucket {self._bucket}. Create the bucket, or correct its name."
            ) from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(2, "no such object", where) from None
        if _METADATA_SERVICE.search(text) or "Missing Credentials" in text:
            raise UserError(f"{self.name}: no credentials found. {_CREDENTIALS[self._scheme]}.") from None
        if isinstance(error, exceptions.PreconditionError):
            raise UserError(f"{where} changed while it was read. Run the same command again.") from None
        if isinstance(error, exceptions.UnauthenticatedError | exceptions.PermissionDeniedError) or _REFUSED in text:
            code = re.search(r"<Code>(\w+)</Code>", text)
            reason = code[1] if code else _reason(error)
            raise UserError(
                f"{where}: permission denied ({reason}). {_CREDENTIALS[self._scheme]}, with an account that may read, "
                "write and list this bucket."
            ) from None
        if "PermanentRedirect" in text or "BareRedirect" in text or "IllegalLocationConstraint" in text:
            raise UserError(
                f"{self.name}: the bucket is in another region. Set AWS_REGION to the region of the bucket."
            ) from None
        advice = "Run the same command again. Files that have arrived are kept."
        tries = f", {len(WAITS_S) + 1} tries in {sum(WAITS_S):.0f} s" if self._is_temporary(error) else ""
        raise UserError(f"{where}: {_reason(error)}{tries}. {advice}") from None


# Text in the GenericError that obstore raises if the server refuses to list objects or to begin a multipart upload.
_REFUSED = "status code: 403"
# Addresses of the metadata service that machines in the cloud have. obstore asks this service for credentials if the
# environment has none.
_METADATA_SERVICE = re.compile(r"//169\.254\.|/latest/api/token|/latest/meta-data/|/computeMetadata/")


def _state(meta: Any) -> FileState:
    return FileState(meta["size"], meta["e_tag"] or "")


def _counted_chunks(file: Path, chunk_bytes: int, count: CountBytes) -> Iterator[bytes]:
    with open_regular(file) as opened:
        while chunk := opened.read(chunk_bytes):
            yield chunk
            count(opened.tell())


def _reason(error: Exception) -> str:
    """Return the message of an obstore error on one line, without debug output and without the server's full answer."""
    text = str(error).partition("\n\nDebug source")[0]
    code = re.search(r"<Code>(\w+)</Code>", text)
    text = re.sub(r"\s*<(\?xml|Error|html|!doctype).*", f" {code[1]}" if code else "", text, flags=re.S | re.I)
    text = re.sub(
        r"Generic \w+ error: |Error performing |( in [\d.]+\S+)?(, after .* retry_timeout: \w+)?(?= +- )", "", text
    )
    text = " ".join(text.split()).rstrip(" .:")
    return text if len(text) <= 300 else f"{text[:300]}…"


def _interruptible(request: Callable[[], T]) -> T:
    """Run a request in such a way that Ctrl-C ends the command at once.

    A call of obstore returns only when its request has ended, even after Ctrl-C. If the main thread of the command
    calls this function, the request therefore runs in another thread. Otherwise, the request runs directly, because
    Ctrl-C interrupts only the main thread, and because the command can kill worker processes.
    """
    in_worker = multiprocessing.parent_process() is not None
    if in_worker or threading.current_thread() is not threading.main_thread():
        return request()
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(request())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]
    return result[0]
