"""Opens files, limits their size, and checks their content. Every file that a command reads goes through this package.

`read_regular` and `open_regular` open a file. `decode` turns the bytes of a JSON file into a typed model. `read_npy`
and `read_npz` return the arrays of NumPy files. `convert` checks Python objects that another library has read, such as
the metadata of a checkpoint. Each error message is one line that states the file, the field, the value found, the value
expected, and the next step.

A model is a `msgspec.Struct`, a frozen dataclass or a TypedDict. The type of a field includes the bounds of its value.
The models of manifest.json and colour.json, whose format has a schema number, refuse unknown fields
(`forbid_unknown_fields=True`, see also prep/schema/unknown_fields.py). Files of a run folder, work files and files of
other programs have no schema number, so the models of such files ignore unknown fields.
"""

from prep.schema.arrays import ArrayShape, decode_npy, read_npy, read_npz, view_npy
from prep.schema.check import convert, decode, parse_json, shown
from prep.schema.fields import Count, Digest, Finite, NonNegative, Text, one_of, text_of
from prep.schema.regular_file import (
    MAX_TEXT_BYTES,
    check_regular,
    file_sha256,
    open_regular,
    read_regular,
    regular_descriptor,
)
from prep.schema.unknown_fields import REFUSES_UNKNOWN

__all__ = [
    "MAX_TEXT_BYTES",
    "REFUSES_UNKNOWN",
    "ArrayShape",
    "Count",
    "Digest",
    "Finite",
    "NonNegative",
    "Text",
    "check_regular",
    "convert",
    "decode",
    "decode_npy",
    "file_sha256",
    "one_of",
    "open_regular",
    "parse_json",
    "read_npy",
    "read_npz",
    "read_regular",
    "regular_descriptor",
    "shown",
    "text_of",
    "view_npy",
]
