"""Export of a trained network, with its classes and preprocessing, to one file for other programs.

    safetensors   the parameters, with the columns concatenated and the names that AlexNet.load_joined_tensors expects
    torchvision   a state_dict for torchvision.models.alexnet(num_classes=…).load_state_dict
    onnx          the network in evaluation mode, with the input `images` (N, 3, 224, 224), grey levels minus the mean,
                  and the output `logits` (N, classes)

Each file also contains four named JSON texts. A safetensors or onnx file has the texts in its metadata. torchvision's
state_dict has the texts in `state._metadata[""]`, where PyTorch also stores module versions. The texts are:

    architecture, recipe   the same objects as `model` and `recipe` in run.json
    classes                names of the classes, in the order of the logits
    preprocessing          the fields of `Preprocessing`, which say how an image becomes the input of the network

A mean image is stored as float32, little-endian, in row-major order, encoded in base64.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import CROP_PX, eval_offsets
from pipeline.still_image import EvalTransform
from prep.console import UserError, disk_error
from prep.files import atomic_file
from prep.version import pip_command
from train.convert.torchvision_weights import IMAGENET_NORMALIZATION, check_fits, to_torchvision_weights
from train.model.alexnet import AlexNet
from train.runs.loading import load_trained, run_and_checkpoint
from train.runs.preprocessing import load_eval_transform

_PACKAGES = {"safetensors": ("safetensors",), "torchvision": (), "onnx": ("onnx", "onnxscript")}


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image into the input of the exported network. The fields are JSON keys in the exported file.

    The image has the channels `channel_order` and values in `range`. The EXIF orientation of the image is not applied.
    The shorter side is rescaled to `shorter_side_px` with `resize_filter`. The length of the longer side is rounded.
    The central square begins at row (height − shorter_side_px) // 2 and column (width − shorter_side_px) // 2, as
    `square_first` says. A crop with a side of `window_px` is taken from this square. For an evaluation with one view,
    the crop is the centre crop, which has the rows `window_rows` and the columns `window_columns` of the square. The
    mean is subtracted from the crop, and the result is divided by `input_divisor`. The batch is float32 in the order
    `layout`. The value of `mean` says what is subtracted from a crop whose top left corner is at (y, x) in the square:

        channel   mean_rgb
        image     the centre crop of the mean image, for every (y, x)
        aligned   the crop of the mean image at (y, x)
        none      nothing
    """

    shorter_side_px: int
    mean: str
    mean_rgb: tuple[float, ...]  # value subtracted from each channel; with a mean image: its average in each channel
    mean_image: Mapping[str, Any] | None  # object with the keys "shape" (side, side, 3), "dtype" and "base64"
    # Number by which the pixels minus the mean are divided before they enter the network in the file. torchvision's
    # weights contain the complete division, so the number is 1. An onnx graph divides by Recipe.input_divisor, so the
    # number is augmentation.divisor_in_evaluation, which is 1 by default. A safetensors file contains only parameters,
    # so the number is the product of both divisors (Recipe.eval_input_divisor).
    input_divisor: float
    # "area": the mean of the source pixels that an output pixel covers, as Pillow's BOX and OpenCV's INTER_AREA. For
    # images that must be enlarged, "area" means bicubic. Filters other than the area filter have Pillow's names.
    resize_filter: str = "area"
    stored_as: str = "ppm"  # format of the rescaled training images: "jpeg, quality N", or "ppm", which is lossless
    background: str = "white"  # colour behind transparent pixels; "dropped": alpha is left out
    # Index of the square's first row (`length` is the height) and of its first column (`length` is the width).
    square_first: str = "(length - shorter_side_px) // 2"
    window_px: int = CROP_PX
    window_rows: tuple[int, int] = (0, 0)  # first and last row of the centre crop in the square, counted from 0
    window_columns: tuple[int, int] = (0, 0)  # first and last column of the centre crop in the square, from 0
    layout: str = "NCHW"
    channel_order: str = "RGB"
    range: tuple[int, int] = (0, 255)
    # None except in a torchvision file, where `normalise` replaces the fields `mean` and `input_divisor`. The keys
    # "mean" and "std" are the arguments of torchvision's Normalize, for pixels in [0, 1]. The key "exact" is False if
    # the network subtracts a mean image, because "mean" is then only the average of this image.
    normalise: Mapping[str, Any] | None = None


def export_preprocessing(transform: EvalTransform, input_divisor: float) -> Preprocessing:
    """Return the `Preprocessing` to export for a network with this evaluation transform and this input divisor."""
    mean_rgb = tuple(transform.mean_rgb if transform.mean == "channel" else (0.0, 0.0, 0.0))
    mean_image, image = transform.mean_image, None
    if mean_image is not None:
        mean_rgb = tuple(mean_image.mean((0, 1), dtype=np.float64).tolist())
        image = {
            "shape": list(mean_image.shape),
            "dtype": "float32",
            "base64": b64encode(mean_image.astype("<f4").tobytes()).decode(),
        }
    settings = transform.settings
    ((top, left),) = eval_offsets(1, settings.side_px - CROP_PX)[0].tolist()
    stored_as = f"jpeg, quality {settings.quality}" if settings.format == "jpeg" else settings.format
    return Preprocessing(
        settings.side_px,
        transform.mean,
        mean_rgb,
        image,
        input_divisor,
        settings.filter,
        stored_as,
        background=settings.background,
        window_rows=(top, top + CROP_PX - 1),
        window_columns=(left, left + CROP_PX - 1),
    )


def export(run_dir: Path, format: str, out: Path, which: str = "last") -> dict[str, Any]:
    """Write a checkpoint of a run to `out` atomically. Returns the JSON object that `alextrain export --json` prints.

    run_dir  a run folder, or a checkpoint file
    format   one of EXPORT_FORMATS (train/config/choices.py)
    which    the checkpoint to export: "last", "best" or a file

    Raises UserError if there is no run, a package is not installed, the network does not fit the format, or `out`
    cannot be written.
    """
    missing = [name for name in _PACKAGES[format] if find_spec(name) is None]
    if missing:
        raise UserError(f"--to {format} needs {' and '.join(missing)}. Install with: {pip_command('export')}")
    run_dir, which = run_and_checkpoint(run_dir, which)
    network, checkpoint = load_trained(run_dir, ("cpu", "cpu"), which)
    recipe = network.recipe
    divisors = {"safetensors": recipe.eval_input_divisor, "onnx": recipe.augmentation.divisor_in_evaluation}
    preprocessing = export_preprocessing(load_eval_transform(run_dir, recipe), divisors.get(format, 1.0))
    if format == "torchvision":
        check_fits(network.architecture, network.recipe)
        mean = [level / 255 for level in preprocessing.mean_rgb]
        normalization = {"mean": mean, "std": IMAGENET_NORMALIZATION.std, "exact": preprocessing.mean_image is None}
        preprocessing = replace(preprocessing, normalise=normalization)
    metadata = {
        "architecture": asdict(network.architecture),
        "recipe": asdict(network.recipe),
        "classes": list(checkpoint.classes),
        "preprocessing": asdict(preprocessing),
    }
    content = _SERIALIZERS[format](network.eval(), {name: json.dumps(value) for name, value in metadata.items()})
    try:
        with atomic_file(out) as file:
            file.write(content)
    except OSError as error:
        raise disk_error(error, f"{out}: cannot be written ({error.strerror or error}). Name another --out.") from error
    printed = {key: value for key, value in asdict(preprocessing).items() if key != "mean_image"}
    return {
        "out": str(out),
        "to": format,
        "step": checkpoint.step,
        "bytes": out.stat().st_size,
        "preprocessing": printed,
    }


def _safetensors(network: AlexNet, metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in network.joined_tensors().items()}
    return save(tensors, metadata)


def _torchvision(network: AlexNet, metadata: dict[str, str]) -> memoryview:
    # With torchvision's std, the exported weights have the same magnitude as the weights that torchvision publishes.
    weights = to_torchvision_weights(network.joined_tensors(), network.recipe, IMAGENET_NORMALIZATION.std)
    state: OrderedDict[str, Tensor] = OrderedDict(weights)
    state._metadata = OrderedDict({"": {"version": 1, **metadata}})  # type: ignore[attr-defined]
    # The file is first made in memory, because torch.save to a file raises no OSError on a full disk.
    content = io.BytesIO()
    torch.save(state, content)
    return content.getbuffer()


def _onnx(network: AlexNet, metadata: dict[str, str]) -> bytes:
    with torch.no_grad(), _exporter_silenced():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, CROP_PX, CROP_PX),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("N")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    content: bytes = program.model_proto.SerializeToString()
    return content


@contextmanager
def _exporter_silenced() -> Iterator[None]:
    """Return a context that silences the ONNX exporter's warnings about unused operators and deprecated functions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


_SERIALIZERS: dict[str, Callable[[AlexNet, dict[str, str]], bytes | memoryview]] = {
    "safetensors": _safetensors,
    "torchvision": _torchvision,
    "onnx": _onnx,
}
