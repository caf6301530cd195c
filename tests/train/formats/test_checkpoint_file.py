"""Checkpoints with a correct digest but wrong content are refused. The error has one line and names the wrong field."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prep.console import UserError
from tests.train.formats.signed import entries_of, tiny_content, write_signed, write_signed_pickle
from train.config.architecture import ARCHITECTURES
from train.config.recipes import RECIPES
from train.formats.fields import parameter_shapes
from train.model.alexnet import AlexNet
from train.runs import checkpoint
from train.runs.checkpoint import UnreadableCheckpoint

Edit = Callable[[dict[str, Any]], object]


def put(value: object, *path: str | int) -> Edit:
    """Return a function that sets the field at `path`, a sequence of keys, to `value`."""

    def edit(content: dict[str, Any]) -> None:
        target: Any = content
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return edit


def weight(tensor: torch.Tensor) -> Edit:
    return put(tensor, "parameters", "conv1.weight")


def share_storage(content: dict[str, Any]) -> None:
    content["velocity"]["fc7.bias"] = content["parameters"]["fc7.bias"]


NESTED: list[Any] = []
for _ in range(100):
    NESTED = [NESTED]
SHAPE = (2, 3, 11, 11)
EDITS: dict[str, tuple[Edit, str]] = {
    "meta": (weight(torch.zeros(SHAPE, device="meta")), r"the name torch\._utils\._rebuild_meta_tensor"),
    "sparse": (weight(torch.zeros(SHAPE).to_sparse()), r"the name torch\._utils\._rebuild_sparse_tensor"),
    "complex": (weight(torch.zeros(SHAPE, dtype=torch.complex64)), r"the name torch\.ComplexFloatStorage"),
    "float64": (weight(torch.zeros(SHAPE).double()), r"parameters\.conv1\.weight has the type float64"),
    "strided": (weight(torch.zeros(2, 3, 11, 22)[..., ::2]), r"conv1\.weight has strides \(726, 242, 22, 2\)"),
    "overlapping": (weight(torch.zeros(3, 11, 11).expand(SHAPE)), r"conv1\.weight has strides \(0, 121, 11, 1\)"),
    "part of a storage": (weight(torch.zeros(4, 3, 11, 11)[2:]), "at element 726 of 1,452"),
    "shape": (weight(torch.zeros(2, 3, 11, 12)), r"shape \(2, 3, 11, 12\), expected \(2, 3, 11, 11\)"),
    "no tensor": (put(3, "parameters", "conv1.weight"), r"conv1\.weight is int, expected a tensor"),
    "NaN": (weight(torch.full(SHAPE, float("nan"))), r"conv1\.weight has NaN or infinite values"),
    "infinite velocity": (put(torch.full((2,), float("inf")), "velocity", "fc7.bias"), r"velocity\.fc7\.bias has NaN"),
    "shared": (share_storage, r"velocity\.fc7\.bias shares the storage"),
    "missing tensor": (lambda content: content["velocity"].pop("fc8.bias"), r"velocity lacks fc8\.bias"),
    "more tensors": (put(torch.zeros(1), "parameters", "fc9.bias"), r"parameters has fc9\.bias"),
    "tensors in a list": (put([], "parameters"), "parameters is list, expected a dict of tensors"),
    "generator state size": (put(torch.zeros(16, dtype=torch.uint8), "random"), r"random has shape \(16,\), expected"),
    "generator state": (put(torch.zeros(5056, dtype=torch.uint8), "random"), "random is no state of torch's random"),
    "GPU state": (put([torch.zeros(9, dtype=torch.uint8)], "random_cuda"), r"random_cuda\.0 has shape \(9,\)"),
    "GPU states": (put([torch.zeros(16, dtype=torch.uint8)], "random_cuda"), "random_cuda has 1 states, expected 0"),
    "a million units": (
        put(1_000_000, "model", "widths", "fc6"),
        r"model\.widths\.fc6 is 1000000, expected an integer",
    ),
    "odd width": (put(3, "model", "widths", "fc6"), "fc6 = 3: expected even numbers"),
    "unknown field": (put(1, "model", "skip"), 'model has the unknown field "skip"'),
    "other identity": (
        put(4, "identity", "model_numbers", "widths", "fc6"),
        r"model_numbers\.widths\.fc6 is 4, expected 2",
    ),
    "recipe": (put("wide", "recipe", "activation"), r'recipe\.activation is "wide", expected'),
    "source": (lambda content: content["recipe"]["sources"].pop("lr"), "sources has no lr"),
    "schedule of the recipe": (put({"warmup_epochs": 1.0}, "recipe", "schedule"), "has no field start"),
    "step": (put(-1, "step"), "step is -1, expected an integer of at least 0"),
    "no steps in an epoch": (put(0, "steps_per_epoch"), "steps_per_epoch is 0, expected"),
    "best error": (put(float("nan"), "schedule", "best_error"), r"schedule\.best_error is nan"),
    "device": (put(["cpu", "meta"], "devices"), r'devices\.1 is "meta", expected'),
    "classes": (put(["a", 2], "classes"), r"classes\.1 is 2, expected a string"),
    "number of classes": (put(["a", "b", "c"], "classes"), r"identity\.classes is 2, expected 3"),
    "ancestry": (put([{"path": "a\0b", "step": 1}], "ancestry"), r"ancestry\.0"),
    "stream": (put("x", "stream", "batch_size"), r'stream\.batch_size is "x", expected an integer'),
    "environment": (put(3, "environment", "torch"), r"environment\.torch is 3, expected a text"),
    "nested": (put(NESTED, "identity", "recipe_numbers"), "nested more than 32 deep"),
    "set": (put({1}, "best"), r"the name __builtin__\.set"),
    "key that is a number": (put({1: 2}, "best"), "the key 1, which is not a text"),
    "format": (put("2", "format"), 'checkpoint format "2", this program reads 2'),
    "missing field": (lambda content: content.pop("stream"), "the checkpoint has no stream"),
}


def test_the_unedited_content_is_read(tmp_path: Path) -> None:
    content = tiny_content()
    state = checkpoint.read(write_signed(tmp_path / "a.pt", content))
    assert state.step == 1 and state.identity == content["identity"] and len(state.digest) == 64
    for part in ("parameters", "velocity"):
        for name, tensor in content[part].items():
            assert torch.equal(getattr(state, part)[name], tensor), name


@pytest.mark.parametrize("name", EDITS)
def test_wrong_content_with_a_correct_digest_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    edit, message = EDITS[name]
    content = tiny_content()
    edit(content)
    path = write_signed(tmp_path / "a.pt", content)
    with pytest.raises(UserError, match=message) as raised:
        checkpoint.read(path)
    text = str(raised.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and text.endswith(".")
    assert not isinstance(raised.value, UnreadableCheckpoint)  # load_latest would skip an unreadable checkpoint


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Call(os.mkdir, "executed"), r"the name posix\.mkdir"),
        (Call(bytearray, 10**11), r"the name __builtin__\.bytearray"),
        (Call(print, "executed"), r"the name __builtin__\.print"),
        (OrderedDict(a=1), "checkpoint format null"),
        ([1, 2], "holds an array of 2 values"),
        (2**100, "holds 1267650600228229401496703205376"),
    ],
)
def test_nothing_in_a_pickle_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_signed_pickle(tmp_path / "a.pt", pickle.dumps(value, protocol=2))
    with pytest.raises(UserError, match=message):
        checkpoint.read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_a_string_with_an_unknown_escape_sequence_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = write_signed_pickle(tmp_path / "a.pt", rb"S'\Q'" + b"\n.")
    with pytest.raises(UserError, match="the instruction STRING"):
        checkpoint.read(path)


def test_a_storage_that_is_smaller_than_its_tensor_is_refused(tmp_path: Path) -> None:
    """If the sizes were not compared, torch could read memory beyond the end of the storage."""
    content = tiny_content()
    content["parameters"]["fc7.bias"] = torch.full((2,), 0.125)
    entries = entries_of(content)
    short = next(name for name, data in entries.items() if data == struct.pack("<2f", 0.125, 0.125))
    path = write_signed_pickle(tmp_path / "a.pt", entries.pop("data.pkl"), **{**entries, short: b"\0\0\0\0"})
    with pytest.raises(UserError, match="is stated to have 8 bytes, but the archive holds 4"):
        checkpoint.read(path)
    del entries[short]
    path = write_signed_pickle(tmp_path / "b.pt", entries_of(content)["data.pkl"], **entries)
    with pytest.raises(UserError, match="is stated to have 8 bytes, but the archive lacks this storage"):
        checkpoint.read(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["named pipe", "folder"])
def test_a_named_pipe_or_folder_in_place_of_a_checkpoint_is_refused(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "checkpoint-00000001.pt"
    make(path)
    for read in (lambda: checkpoint.read(path), lambda: checkpoint.load_latest(tmp_path)):
        with pytest.raises(UserError, match="expected a regular file"):
            read()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_expected_shapes_are_those_of_the_network(architecture: str) -> None:
    for recipe in RECIPES.values():
        network = AlexNet(7, recipe, ("meta", "meta"), ARCHITECTURES[architecture])
        shapes = {
            name: (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:])
            for name, parameters in network.parameters_by_joined_name().items()
        }
        assert parameter_shapes(ARCHITECTURES[architecture], recipe.crossing, 7) == shapes
