"""Command-line input and output: one-line errors, exit codes, interrupts, escaped lines, progress, `--json`.

alexprep, alexstream and alextrain use this package.
"""

from prep.console.errors import DiskFull, Terminated, UserError, WrongArgument, disk_error
from prep.console.group import CONTEXT_SETTINGS, FiniteRange, Group, json_option, store_option
from prep.console.machine import address_space_text, is_memory_error, keep_freed_memory, memory_error, usable_cores
from prep.console.output import print_above, print_json, print_line, say
from prep.console.progress_display import Progress, progress
from prep.console.text import (
    bytes_text,
    count_noun,
    did_you_mean,
    duration_text,
    encodable,
    escaped,
    path_of,
    shell_quoted,
)

__all__ = [
    "CONTEXT_SETTINGS",
    "DiskFull",
    "FiniteRange",
    "Group",
    "Progress",
    "Terminated",
    "UserError",
    "WrongArgument",
    "address_space_text",
    "bytes_text",
    "count_noun",
    "did_you_mean",
    "disk_error",
    "duration_text",
    "encodable",
    "escaped",
    "is_memory_error",
    "json_option",
    "keep_freed_memory",
    "memory_error",
    "path_of",
    "print_above",
    "print_json",
    "print_line",
    "progress",
    "say",
    "shell_quoted",
    "store_option",
    "usable_cores",
]
