"""Loads the tensors of a file whose content has been checked, and checks the numbers in the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prep.console import UserError, bytes_text
from train.formats.pickled_values import StoredTensor
from train.formats.torch_file import tensors_in


def load_tensors(file: BinaryIO, content: Any, name: str, advice: str) -> Any:
    """Return `content` with a tensor of the file in place of each StoredTensor. The tensors are on the CPU.

    file     an open file of torch.save
    content  the content of this file (train.formats.torch_file.read_content), or a part of it

    Raises UserError, with `name` and `advice` in its message, if torch cannot load the file, or if the loaded tensors
    are not the tensors that `content` describes.
    """
    needed_bytes = sum(tensor.storage.bytes for tensor in tensors_in(content))
    file.seek(0)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        return _joined(content, loaded)
    except _OtherTensors as error:
        raise UserError(f"{name}: torch loads {error}. {advice}") from None
    except Exception as error:  # torch raises many types of errors for damage, and if memory runs out
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"{name}: torch cannot load its {bytes_text(needed_bytes)} of tensors ({reason}). {advice}"
        ) from None


class _OtherTensors(Exception):
    """The loaded object is not the object that the file describes."""


def _joined(content: Any, loaded: Any) -> Any:
    if isinstance(content, StoredTensor):
        if isinstance(loaded, torch.nn.Parameter):
            loaded = loaded.detach()
        if type(loaded) is not Tensor or loaded.layout != torch.strided or loaded.device.type != "cpu":
            raise _OtherTensors(f"a {type(loaded).__name__} in place of a tensor of shape {content.shape}")
        if str(loaded.dtype) != f"torch.{content.dtype}" or tuple(loaded.shape) != content.shape:
            found, expected = f"{loaded.dtype} {tuple(loaded.shape)}", f"{content.dtype} {content.shape}"
            raise _OtherTensors(f"{found} in place of {expected}")
        if loaded.stride() != content.stride or loaded.storage_offset() != content.offset:
            raise _OtherTensors(f"a tensor of shape {content.shape} with other strides")
        return loaded
    if isinstance(content, dict):
        return {key: _joined(part, loaded[key]) for key, part in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_joined(part, other) for part, other in zip(content, loaded, strict=True))
    return content


def check_finite(tensors: Mapping[str, Tensor], name: str, advice: str) -> None:
    """Raise UserError if a tensor has NaN or infinite values. `name` is the name of the mapping in the error."""
    for key, tensor in tensors.items():
        if tensor.numel():
            smallest, largest = tensor.aminmax()
            if not (smallest.isfinite() and largest.isfinite()):
                raise UserError(f"{name}.{key} has NaN or infinite values, expected finite numbers. {advice}")


def check_generator_state(state: Tensor, name: str, advice: str) -> None:
    """Raise UserError if torch's generator on the CPU refuses a state."""
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        reason = str(error).split("\n")[0][:100]
        raise UserError(f"{name} is no state of torch's random generator ({reason}). {advice}") from None
