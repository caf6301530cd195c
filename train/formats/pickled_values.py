"""Reads plain values and descriptions of tensors from a pickle of torch.save. Calls no function that the pickle names.

torch.load(weights_only=True) executes no code of a file, but allocates what the file asks for: `bytearray(10**11)`, or
a tensor of any size. This module therefore reads the instructions of the pickle first, with Python's pickletools. The
module accepts only the instructions and names that torch.save writes for dicts, lists, tuples, strings, numbers and
dense tensors. A tensor becomes a StoredTensor, which holds the description of the tensor in the file.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

MAX_INSTRUCTIONS = 2_000_000  # largest number of instructions; a checkpoint for 1,000 classes has about 5,000
# Largest number of values. A value counts as often as it occurs, because a pickle can refer to one list many times.
MAX_VALUES = 2_000_000
MAX_DEPTH = 32  # largest number of nested levels of lists, tuples and dicts

# Storage types of dense real tensors: name in the pickle -> (dtype, bytes of an element).
_STORAGES = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "ByteStorage": ("uint8", 1),
    "CharStorage": ("int8", 1),
    "ShortStorage": ("int16", 2),
    "IntStorage": ("int32", 4),
    "LongStorage": ("int64", 8),
    "BoolStorage": ("bool", 1),
}
_REBUILD, _REBUILD_V1 = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"
_PARAMETER, _ORDERED_DICT = "torch._utils _rebuild_parameter", "collections OrderedDict"


class UnsafeFile(ValueError):
    """Raised for a pickle or an archive that torch.save would not write. The text says what is wrong."""


@dataclass(frozen=True)
class Storage:
    """Description, in a pickle, of the memory of a tensor."""

    key: str  # name of the storage in the file
    dtype: str  # such as "float32"
    elements: int  # number of elements
    element_bytes: int
    device: str  # such as "cpu" or "cuda:0"

    @property
    def bytes(self) -> int:
        """Number of bytes of the storage."""
        return self.elements * self.element_bytes


@dataclass(frozen=True)
class StoredTensor:
    """Description of a tensor in a pickle. The numbers of the tensor are not read."""

    storage: Storage
    offset: int  # index of the first element in the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements, one for each dimension

    @property
    def dtype(self) -> str:
        """Name of the type of the elements, such as "float32"."""
        return self.storage.dtype

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    def is_dense(self) -> bool:
        """Return whether the tensor fills its storage without gaps or overlaps.

        The dimensions may lie in the storage in any order: contiguous, channels last or transposed. The stride of a
        dimension of size 1 has no effect, so torch may have written any number there.
        """
        expected = 1
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return self.offset == 0 and self.elements == self.storage.elements


@dataclass(frozen=True)
class _Name:
    """A name of a class or function in the pickle, which torch.load would look up."""

    name: str


class _Dict(dict[Any, Any]):
    """A dict that the pickle makes by OrderedDict(). `attributes` holds its attributes, such as torch's _metadata."""

    attributes: Mapping[str, Any] = {}


def read_pickle(file: BinaryIO) -> Any:
    """Return the value of the pickle at the current position of `file`: plain values and StoredTensor.

    An OrderedDict becomes a dict whose `attributes` are the attributes that the pickle sets. Raises UnsafeFile if the
    pickle holds anything but plain values and dense tensors.
    """
    reader = _Reader()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # genops warns of unknown escape sequences in the strings of a damaged file
            for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if number >= MAX_INSTRUCTIONS:
                    _refuse(f"more than {MAX_INSTRUCTIONS:,} instructions")
                step = _STEPS.get(opcode.name)
                if step is None:
                    _refuse(f"the instruction {opcode.name}")
                step(reader, argument)
    except UnsafeFile:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise UnsafeFile(f"a pickle that cannot be read ({type(error).__name__}: {error})") from None
    if len(reader.stack) != 1 or reader.marks:
        _refuse("an unfinished pickle")
    value = reader.stack[0]
    _check_size(value)
    return value


def _refuse(what: str) -> NoReturn:
    raise UnsafeFile(f"{what}, which torch.save does not write into files of tensors")


def _check_size(value: Any) -> None:
    """Raise UnsafeFile for a value that is nested too deeply, is too large, or contains itself."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        next_level: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                next_level.extend(item.values())
                next_level.extend(getattr(item, "attributes", {}).values())
            elif isinstance(item, list | tuple):
                next_level.extend(item)
            count += 1
            if count + len(next_level) > MAX_VALUES:
                _refuse(f"more than {MAX_VALUES:,} values")
        if not next_level:
            return
        level = next_level
    _refuse(f"lists and dicts that are nested more than {MAX_DEPTH} deep")


class _Reader:
    """The stack of a pickle that is being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            _refuse("a missing value")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _push(value: Any) -> Callable[[_Reader, Any], None]:
    return lambda reader, argument: reader.stack.append(value)


def _push_argument(reader: _Reader, argument: Any) -> None:
    reader.stack.append(argument)


def _mark(reader: _Reader, argument: Any) -> None:
    reader.marks.append(len(reader.stack))


def _tuple_of(count: int) -> Callable[[_Reader, Any], None]:
    def make(reader: _Reader, argument: Any) -> None:
        items = [reader.pop() for _ in range(count)]
        reader.stack.append(tuple(reversed(items)))

    return make


def _tuple(reader: _Reader, argument: Any) -> None:
    reader.stack.append(tuple(reader.pop_to_mark()))


def _put(reader: _Reader, argument: Any) -> None:
    reader.memo[argument] = reader.stack[-1]


def _get(reader: _Reader, argument: Any) -> None:
    reader.stack.append(reader.memo[argument])


def _append(reader: _Reader, argument: Any) -> None:
    item = reader.pop()
    _last(reader, list).append(item)


def _appends(reader: _Reader, argument: Any) -> None:
    items = reader.pop_to_mark()
    _last(reader, list).extend(items)


def _set_item(reader: _Reader, argument: Any) -> None:
    value, key = reader.pop(), reader.pop()
    _set(_last(reader, dict), [key, value])


def _set_items(reader: _Reader, argument: Any) -> None:
    items = reader.pop_to_mark()
    _set(_last(reader, dict), items)


def _set(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        _refuse("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str or key in target:
            _refuse(f"the key {key!r:.40}" + (", which is not a text" if type(key) is not str else " twice"))
        target[key] = value


def _last(reader: _Reader, kind: type) -> Any:
    value = reader.stack[-1]
    if not isinstance(value, kind):
        _refuse(f"items that are added to a {type(value).__name__}")
    return value


def _name(reader: _Reader, argument: str) -> None:
    module, _, name = argument.partition(" ")
    known = argument in (_REBUILD, _REBUILD_V1, _PARAMETER, _ORDERED_DICT)
    if not known and not (module == "torch" and name in _STORAGES):
        _refuse(f"the name {module}.{name}")
    reader.stack.append(_Name(argument))


def _call(reader: _Reader, argument: Any) -> None:
    arguments, function = reader.pop(), reader.pop()
    if not isinstance(function, _Name) or type(arguments) is not tuple:
        _refuse("a call of something that is not a function")
    if function.name == _ORDERED_DICT and not arguments:
        reader.stack.append(_Dict())
    elif function.name in (_REBUILD, _REBUILD_V1):
        reader.stack.append(_tensor(arguments))
    elif function.name == _PARAMETER and len(arguments) == 3 and isinstance(arguments[0], StoredTensor):
        reader.stack.append(arguments[0])
    else:
        _refuse(f"a call of {function.name.replace(' ', '.')} with {len(arguments)} arguments")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """Return the tensor of a call of _rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks)."""
    if len(arguments) not in (4, 6):
        _refuse(f"a tensor of {len(arguments)} arguments")
    storage, offset, shape, stride = arguments[:4]
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers):
        _refuse("a tensor with an invalid storage, offset, shape or stride")
    if len(shape) != len(stride) or len(shape) > 8:
        _refuse(f"a tensor of {len(shape)} sizes and {len(stride)} strides")
    if len(arguments) == 6 and (type(arguments[4]) is not bool or arguments[5] != {}):
        _refuse("a tensor with hooks")
    return StoredTensor(storage, offset, shape, stride)


def _storage(reader: _Reader, argument: Any) -> None:
    """Replace the tuple ("storage", type, key, device, elements) on the stack by a Storage.

    In older files, the tuple ends with None.
    """
    claims = reader.pop()
    if (
        type(claims) is not tuple
        or len(claims) not in (5, 6)
        or claims[0] != "storage"
        or claims[5:] not in ((), (None,))
    ):
        _refuse("a reference to an object outside of the pickle that is not a storage")
    _, kind, key, device, elements = claims[:5]
    if not isinstance(kind, _Name) or not kind.name.startswith("torch ") or type(key) is not str:
        _refuse("a storage without type or name")
    if type(device) is not str or type(elements) is not int or not 0 <= elements < 2**48:
        _refuse(f"a storage of {elements!r:.40} elements on {device!r:.40}")
    dtype, element_bytes = _STORAGES[kind.name.removeprefix("torch ")]
    reader.stack.append(Storage(key, dtype, elements, element_bytes, device))


def _build(reader: _Reader, argument: Any) -> None:
    """Set the attributes of an OrderedDict, as torch does for the _metadata of a state_dict."""
    attributes, target = reader.pop(), reader.stack[-1]
    if not isinstance(target, _Dict) or type(attributes) is not dict:
        _refuse(f"attributes of a {type(target).__name__}")
    target.attributes = attributes


_STEPS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": lambda reader, argument: None,
    "STOP": lambda reader, argument: None,
    "NONE": _push(None),
    "NEWTRUE": _push(True),
    "NEWFALSE": _push(False),
    "BININT": _push_argument,
    "BININT1": _push_argument,
    "BININT2": _push_argument,
    "LONG1": _push_argument,
    "BINFLOAT": _push_argument,
    "BINUNICODE": _push_argument,
    "SHORT_BINSTRING": _push_argument,
    "EMPTY_DICT": lambda reader, argument: reader.stack.append({}),
    "EMPTY_LIST": lambda reader, argument: reader.stack.append([]),
    "EMPTY_TUPLE": _push(()),
    "MARK": _mark,
    "TUPLE": _tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": _name,
    "REDUCE": _call,
    "BINPERSID": _storage,
    "BUILD": _build,
}
