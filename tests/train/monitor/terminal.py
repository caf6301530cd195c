"""A pseudo-terminal, in which a test runs a program, types keys, and reads the rows of the screen at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence

_PARTS = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def run_in_terminal(command: Sequence[str], columns: int, keys: Mapping[str, bytes]) -> tuple[int, list[str]]:
    """Run a program in a terminal. Returns its exit code, and the rows of the screen without blank rows.

    keys  {text: bytes to type as soon as the program has printed this text}, as in {"ready": b"\\x03"} for Ctrl-C
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    output, waiting = b"", dict(keys)
    while True:
        try:
            output += os.read(ours, 4096)
        except OSError:  # at the end of file, a pseudo-terminal raises EIO
            break
        for text in [text for text in waiting if text.encode() in output]:
            os.write(ours, waiting.pop(text))
    os.close(ours)
    return process.wait(), [row for row in screen_rows(output.decode(), columns) if row]


def screen_rows(output: str, columns: int) -> list[str]:
    """Return the rows that a terminal shows after it has received `output`.

    The output may contain text, line ends, and the escape codes that move the cursor up or erase a line.
    """
    rows: dict[int, dict[int, str]] = {}
    y = x = 0
    for part in _PARTS.finditer(output):
        if part[0] == "\r":
            x = 0
        elif part[0] == "\n":
            y += 1
        elif part[2] == "A":
            y = max(0, y - int(part[1] or 1))
        elif part[2] == "K":
            rows.pop(y, None)
        elif not part[2]:
            for character in part[0]:
                if x == columns:
                    x, y = 0, y + 1
                rows.setdefault(y, {})[x] = character
                x += 1
    return [
        "".join(rows.get(row, {}).get(column, " ") for column in range(columns)).rstrip()
        for row in range(max(rows, default=-1) + 1)
    ]
