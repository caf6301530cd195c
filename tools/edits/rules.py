"""Rules that say which edits a command may accept, each with its reason.

A rule states files, fields, kinds of edits and commands. If no rule allows a command to accept an edit, the command
must refuse the edited file. No rule allows control characters in the output, tracebacks or other faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Protocol

from tools.edits.json_edits import field_matches


class Edited(Protocol):
    """An edit, and the command that was run after the edit."""

    @property
    def file(self) -> str:
        """Path of the edited file."""

    @property
    def field(self) -> str:
        """Name of the edited field; empty if the edit concerns the whole file."""

    @property
    def kind(self) -> str:
        """Kind of the edit."""

    @property
    def command(self) -> str:
        """Command line."""


# Kinds of edits of json_edits.py that replace a number by another number, or a text by another text.
_OTHER_NUMBERS = ("plus 1", "minus 1", "zero", "number", "fraction", "negative")
_OTHER_TEXTS = ("other text", "long text", "outside", "absolute")
_ODD_TEXTS = ("escape code", "C1 control", "newline", "NUL", "bidi", "empty text")
_ALL_NUMBERS = (*_OTHER_NUMBERS, "10^30", "400 digits", "1e308", "NaN", "Infinity", "-Infinity")
WHOLE_FILE = "."  # the pattern of edits that do not belong to one field
# Edits with the same effect on a file of lines as a crash of the machine: the end is missing, or has wrong bytes.
_CUT = (
    *("empty", "missing", "truncated to 1 byte", "truncated to 1/4", "truncated to 2/4", "truncated to 3/4"),
    *("without last byte", "random bytes", "zero bytes", "text after the end", "nested lists", "nested objects"),
    *("escape codes", "UTF-16", "many digits"),
)

_ENCODED = (
    *(
        "encoded missing",
        "encoded plus 1",
        "encoded 0",
        "encoded 2^31",
        "encoded 2^32",
        "encoded 2^63",
        "unknown field",
    ),
    "encoded 2^64 - 1",
)
_SOURCES = ("source b'\\x1b[31m\\x9b31m'", "source b'\\xff\\x00\\n'", "source missing", "source of 1 MB")
_LIMITS_OF_INTEGERS = ("largest numbers", "smallest numbers")
_SAME_SCALAR = (
    *("rows repeated", "half of the rows", "shape scalar", "Fortran order", "as text", "first number NaN"),
    *("first number Infinity", "first number 1e30", "first number negative", *_LIMITS_OF_INTEGERS),
)
_LINES = ("run/metrics.jsonl", "run/evaluations.jsonl")
_RUN_FILES = ("run/run.json", "run/checkpoint-*", "ensemble/*", "ablations/*")
_TEXTS = (
    *("classes", "environment", "store.tools", "recipe.sources", "recipe.name", "model.source", "model.name"),
    *("identity.model", "identity.recipe", "settings.run_dir", "settings.store", "settings.store_absolute"),
    *("settings.service", "stream.split", "ancestry", "command"),
)
_LATER_FIELDS = (
    *("recipe.schedule", "recipe.lr_batch", "recipe.lr_batch_power", "recipe.lars_trust", "recipe.augmentation"),
    *("identity.recipe_numbers", "identity.stream_seed", "settings", "store.settings", "store.tools", "environment"),
    *("classes", "ancestry", "recipe"),
)


@dataclass(frozen=True)
class Rule:
    """Edits that a command may accept. An empty tuple stands for all fields, kinds or commands."""

    reason: str
    files: tuple[str, ...]  # patterns of paths, for fnmatch
    fields: tuple[str, ...] = ()  # patterns of json_edits.field_matches
    kinds: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()  # the rule holds for command lines that contain one of these texts

    def allows(self, edited: Edited) -> bool:
        """Return True if the rule allows a command to accept an edit."""
        return (
            any(fnmatch(edited.file, pattern) for pattern in self.files)
            and (not self.fields or _names_field(self.fields, edited.field))
            and (not self.kinds or edited.kind in self.kinds)
            and (not self.commands or any(text in edited.command for text in self.commands))
        )


def _names_field(patterns: Sequence[str], field: str) -> bool:
    return field == "" if WHOLE_FILE in patterns else field_matches(field, patterns)


RULES: Sequence[Rule] = (
    Rule(
        "A link to a file with the same content gives the same result.",
        ("*",),
        (WHOLE_FILE,),
        ("link out of the folder",),
    ),
    Rule(
        "The versions of tools are for information. Only a resumed build compares them.",
        ("store/manifest.json",),
        ("tools",),
        (*_OTHER_TEXTS, *_ODD_TEXTS, "delete", "unknown field", "empty"),
    ),
    Rule(
        "No other field tells which value is right. `alexprep verify` compares some values with the records.",
        ("store/manifest.json",),
        ("settings", "classes", "splits.*.account", "splits.*.moments", "splits.*.pixels", "splits.*.label_counts"),
        (*_OTHER_NUMBERS, *_OTHER_TEXTS, "items reversed"),
    ),
    Rule(
        "Older versions did not write the field.",
        ("store/manifest.json",),
        ("settings.background", "settings.reduce_above", "splits.*.account"),
        ("delete",),
    ),
    Rule(
        "A count may have any text as its name.",
        ("store/manifest.json",),
        ("splits.*.account",),
        ("unknown field", "empty"),
    ),
    Rule("The command reads only the manifest.", ("store/train/*",), (), (), ("alexprep inspect --store store",)),
    Rule(
        "The edited bytes can be unused. If they belong to a record, `alexprep verify` finds a wrong digest.",
        ("store/*/data.mdb",),
        ("pages",),
    ),
    Rule("A shard is built again if its files in .build cannot be used.", ("parts/*", "merge/*")),
    Rule(
        "These fields of a finished build are for information.",
        ("ready/*",),
        ("fates", "ignored", "refused", "source", "id"),
    ),
    Rule("No other field tells which value is right.", ("ready/*",), (), (*_OTHER_NUMBERS, *_OTHER_TEXTS)),
    Rule("A damaged journal is ignored, and the files are copied again.", ("copy/*",)),
    Rule("A log of events has no effect on a run.", ("run/tensorboard/*",)),
    Rule(
        "A crash of the machine can damage the end of the file. Readers ignore a damaged end.",
        _LINES,
        (WHOLE_FILE,),
        _CUT,
    ),
    Rule("No other field tells which value is right.", _LINES, (), (*_OTHER_NUMBERS, *_OTHER_TEXTS, "twice")),
    Rule(
        "The field may hold any text. The text is escaped when it is printed.",
        ("run/evaluations.jsonl",),
        ("*.split", "*.split_fingerprint"),
        _ODD_TEXTS,
    ),
    Rule("The new run of --fork does not read the file.", _LINES, (), (), ("--fork",)),
    Rule(
        "The metrics of a network that diverges can be any number.",
        _LINES,
        (),
        ("10^30", "1e308"),
    ),
    Rule(
        "The loss of a network that diverges can be NaN or infinite.",
        _LINES,
        ("*.loss",),
        ("NaN", "Infinity", "-Infinity", "400 digits"),
    ),
    Rule(
        "Older versions did not write the field. A layer that is not trained has no norm.",
        ("run/metrics.jsonl",),
        (
            "*.gradient_norm",
            "*.weight_norm",
            "*.stream_waiting_share",
            "*.memory_mb",
            "*.gpu_memory_mb",
            "*.unix_time_s",
        ),
        ("delete", "empty", "item removed", "item repeated"),
    ),
    Rule(
        "The edit changes only integers, and the array has no integers.",
        ("run.npz",),
        ("probabilities", "keys"),
        _LIMITS_OF_INTEGERS,
    ),
    Rule("An array with one axis is the same in Fortran order.", ("*.npz",), (), ("Fortran order",)),
    Rule(
        "The command reads only a part of the records.",
        ("store/*/data.mdb",),
        (),
        (),
        ("alexstream preview", "alexstream bench"),
    ),
    Rule(
        "The label is within the range. `alexprep verify` finds the edit.",
        ("store/*/data.mdb",),
        (),
        ("label plus 1", "label 0"),
    ),
    Rule(
        "The field may hold any text or nothing.",
        _RUN_FILES,
        ("settings.service", "settings.store_absolute"),
        ("text", "null", "delete"),
    ),
    Rule("No other field tells which value is right.", ("run/status.json",), (), (*_OTHER_NUMBERS, *_OTHER_TEXTS)),
    Rule(
        "The best error of a run without a validation is infinite.",
        ("run/checkpoint-*",),
        ("schedule.best_error",),
        ("10^30", "1e308", "Infinity"),
    ),
    Rule("A merge does not write the field.", ("ready/*",), ("moments", "largest_px", "build"), ("delete",)),
    Rule("A store of older versions names no tools.", _RUN_FILES, ("store.tools",), ("empty",)),
    Rule(
        "Only a run that continues reads the position of the stream.",
        ("run/checkpoint-*",),
        ("stream",),
        ("1e308", "10^30"),
    ),
    Rule(
        "The stream does not read the field, and `alexprep verify` finds the edit.", ("store/*/data.mdb",), (), _ENCODED
    ),
    Rule(
        "A run or an ablation that was ended early lacks the file.",
        ("run/status.json", "ablations/*"),
        (WHOLE_FILE,),
        ("missing",),
    ),
    Rule("A checkpoint of an older version names no devices.", ("run/checkpoint-*",), ("devices",), ("item removed",)),
    Rule("The order of the counts has no meaning.", ("ready/*",), ("labels",), ("items reversed",)),
    Rule("A missing number of the identity stands for null.", _RUN_FILES, ("identity.model_numbers",), ("delete",)),
    Rule("A run without a validation has no best checkpoint.", ("run/checkpoint-*",), ("best",), ("null",)),
    Rule("Fields of newer versions are ignored.", ("run/checkpoint-*",), ("random",), ("unknown tensor",)),
    Rule("A store can lack the split.", _RUN_FILES, ("store.splits.*",), ("delete",)),
    Rule(
        "Readers accept arrays in Fortran order.", ("run/mean_image.npy", "*/extra/*", "*.npz"), (), ("Fortran order",)
    ),
    Rule(
        "`alexstream inspect` reads only the labels.",
        ("store/*/data.mdb",),
        ("record 0", "records"),
        (),
        ("alexstream inspect",),
    ),
    Rule(
        "The copy has the bytes of the source, and `alexprep verify` finds the edit.",
        ("store/*/data.mdb",),
        ("record 0", "records"),
        (),
        ("alexprep copy",),
    ),
    Rule("The name of an input can have any bytes.", ("store/*/data.mdb",), (), _SOURCES),
    Rule("Fields of newer versions are ignored.", ("ready/*",), (), ("unknown field",)),
    Rule(
        "Older versions did not write the field.",
        ("ready/*/plan.json",),
        ("digest", "id", "source"),
        ("delete", "null"),
    ),
    Rule("The array is a scalar, so the edit changes nothing.", ("run.npz", "run/SCORES"), ("about",), _SAME_SCALAR),
    Rule("Unknown arrays are not read.", ("*.npz", "run/SCORES"), (WHOLE_FILE,), ("unknown member", "member outside")),
    Rule(
        "Only the numbers of a tensor are read.",
        ("weights.pth", "exported.pth", "run/checkpoint-*"),
        (),
        ("requires grad", "a Parameter"),
    ),
    Rule(
        "The edit leaves an array of texts unchanged.",
        ("run.npz", "run/SCORES"),
        ("keys",),
        ("first number NaN", "first number Infinity", "first number 1e30", "first number negative"),
    ),
    Rule(
        "`alexprep join` needs only plan.json and the summaries.", ("ready/*/parts.json",), (WHOLE_FILE,), ("missing",)
    ),
    Rule(
        "An import reads only the normalization and the classes from the metadata.",
        ("exported.pth",),
        ("metadata.architecture", "metadata.recipe", "metadata.environment"),
    ),
    Rule("The saved result is computed again.", ("run/index-fc7-*.npz", "run/SCORES")),
    Rule("Fields of newer versions are ignored.", ("run/*", "ensemble/*", "ablations/*"), (), ("unknown field",)),
    Rule(
        "The field may hold any text. The text is escaped when it is printed.",
        (*_RUN_FILES, "ready/*"),
        _TEXTS,
        (*_OTHER_TEXTS, *_ODD_TEXTS),
    ),
    Rule(
        "An additional member of the archive is not read.",
        ("weights.pth", "exported.pth", "run/best.pt"),
        (),
        ("member outside",),
    ),
    Rule(
        "The field may hold any text. The text is escaped when it is printed.",
        ("run/status.json",),
        ("said", "host"),
        _ODD_TEXTS,
    ),
    Rule(
        "Times and locations of the inputs matter only if the inputs are read again.",
        ("ready/*/inputs.npz",),
        ("stamp_ns", "at"),
        (
            "largest numbers",
            "smallest numbers",
            "first number NaN",
            "first number Infinity",
            "first number 1e30",
            "first number negative",
        ),
    ),
    Rule("Older versions did not write the field.", _RUN_FILES, _LATER_FIELDS, ("delete", "null")),
    Rule(
        "The command says that the file is damaged, and uses the previous checkpoint.",
        ("run/checkpoint-*",),
        (WHOLE_FILE,),
    ),
    Rule(
        "Floating-point numbers of another size are converted.",
        ("weights.pth", "exported.pth"),
        (),
        ("dtype torch.float64", "dtype torch.float16", "dtype torch.bfloat16"),
    ),
    Rule(
        "No other field tells which value is right.",
        ("run/run.json", "run/checkpoint-*", "ensemble/*", "ablations/*", "run.npz", "exported.pth", "weights.pth"),
        (),
        (*_OTHER_NUMBERS, *_OTHER_TEXTS, "items reversed", "first number 1e30", "first number negative", "1e38"),
    ),
)


def reason_to_accept(edited: Edited) -> str | None:
    """Return the reason why a command may accept an edit, or None if the command must refuse the edit."""
    return next((rule.reason for rule in RULES if rule.allows(edited)), None)
