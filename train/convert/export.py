"""A trained network as one file for other programs, with all that its input depends on.

    safetensors   parameters in the joined shapes under our names, as AlexNet.load_joined_tensors takes them
    torchvision   a state_dict that torchvision.models.alexnet(num_classes=…).load_state_dict takes
    onnx          the graph in test: `images` (N, 3, 224, 224), grey levels minus the mean, to `logits` (N, classes)

Each carries four JSON texts, by name: safetensors and onnx in their metadata, torchvision's state_dict as
`state._metadata[""]`, where PyTorch keeps versions of modules.

    architecture, recipe   as run.json has them
    classes                names, in the order of the logits
    preprocessing          how a picture becomes the input, see `Preprocessing`

In a mean image float32 numbers lie row by row, little end first, in base64.
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

from pipeline.augment import CROP_PX
from pipeline.still_image import EvalTransform
from prep.console import UserError, disk_error
from prep.files import atomic_file
from train.convert.torchvision_weights import TORCHVISIONS, check_fits, to_torchvision
from train.model.alexnet import AlexNet
from train.runs.loading import load_trained, run_and_checkpoint
from train.runs.preprocessing import load_eval_transform

_NEEDED = {"safetensors": ("safetensors",), "torchvision": (), "onnx": ("onnx", "onnxscript")}


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to the input: RGB in 0..255, its shorter side rescaled, its centre cut out, minus a mean.

    What is subtracted from the window at (y, x) of the central square is, by `mean`: `channel`, mean_rgb; `image`, the
    mean image's centre; `aligned`, its part at (y, x); `none`, nothing. mean_rgb of an image is its mean.
    """

    shorter_side_px: int
    mean: str
    mean_rgb: tuple[float, ...]
    mean_image: Mapping[str, Any] | None  # shape (side, side, 3), dtype, base64
    input_divisor: float  # of what is left; the network of onnx does it itself, torchvision's has it in its weights
    window_px: int = CROP_PX
    normalise: Mapping[str, Any] | None = None  # torchvision's: mean and std of Normalize, and whether that is exact


def preprocessing_of(eye: EvalTransform, input_divisor: float) -> Preprocessing:
    """What is subtracted of the pictures that a network was shown, and what they are divided by."""
    mean_rgb, image, whole = tuple(eye.mean_rgb if eye.mean == "channel" else (0.0, 0.0, 0.0)), None, eye.mean_image
    if whole is not None:
        mean_rgb = tuple(whole.mean((0, 1), dtype=np.float64).tolist())
        image = {
            "shape": list(whole.shape),
            "dtype": "float32",
            "base64": b64encode(whole.astype("<f4").tobytes()).decode(),
        }
    return Preprocessing(eye.settings.side_px, eye.mean, mean_rgb, image, input_divisor)


def export(run_dir: Path, to: str, out: Path, checkpoint: str = "last") -> dict[str, Any]:
    """Write a checkpoint of a run as `out`, whole or not at all; returns what is to be said of it.

    run_dir, checkpoint  as train.runs.loading.run_and_checkpoint takes them
    to                   one of EXPORT_FORMATS (train/config/choices.py)

    Raises UserError where there is no run, a package is missing, the network does not fit the format, or `out` cannot
    be written.
    """
    missing = [name for name in _NEEDED[to] if find_spec(name) is None]
    if missing:
        raise UserError(f"--to {to} needs {' and '.join(missing)}. Install with: pip install 'alexnet[export]'")
    run_dir, checkpoint = run_and_checkpoint(run_dir, checkpoint)
    network, state = load_trained(run_dir, ("cpu", "cpu"), checkpoint)
    preprocessing = preprocessing_of(load_eval_transform(run_dir, network.recipe), network.recipe.input_divisor)
    if to == "torchvision":
        check_fits(network.architecture, network.recipe)
        mean = [level / 255 for level in preprocessing.mean_rgb]
        normalise = {"mean": mean, "std": TORCHVISIONS.std, "exact": preprocessing.mean_image is None}
        preprocessing = replace(preprocessing, normalise=normalise)
    told = {
        "architecture": asdict(network.architecture),
        "recipe": asdict(network.recipe),
        "classes": state.classes,
        "preprocessing": asdict(preprocessing),
    }
    written = _WRITERS[to](network.eval(), {name: json.dumps(part) for name, part in told.items()})
    try:
        with atomic_file(out) as file:
            written(file)
    except OSError as error:
        raise disk_error(error, f"{out}: cannot be written ({error.strerror or error}). Name another --out.") from error
    shown = {key: value for key, value in asdict(preprocessing).items() if key != "mean_image"}
    return {"out": str(out), "to": to, "step": state.step, "bytes": out.stat().st_size, "preprocessing": shown}


def _safetensors(network: AlexNet, texts: dict[str, str]) -> Callable[[Any], object]:
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in network.joined_tensors().items()}
    return lambda file: file.write(save(tensors, texts))


def _torchvision(network: AlexNet, texts: dict[str, str]) -> Callable[[Any], object]:
    state: OrderedDict[str, Tensor] = OrderedDict(
        to_torchvision(
            network.joined_tensors(), network.recipe, TORCHVISIONS.std
        )  # theirs, so that weights keep their size
    )
    state._metadata = OrderedDict({"": {"version": 1, **texts}})  # type: ignore[attr-defined]
    content = io.BytesIO()  # for torch.save has an error of its own where a disk is full
    torch.save(state, content)
    return lambda file: file.write(content.getbuffer())


def _onnx(network: AlexNet, texts: dict[str, str]) -> Callable[[Any], object]:
    with torch.no_grad(), _quiet():
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
    program.model.metadata_props.update(texts)
    return lambda file: file.write(program.model_proto.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of torch's own deprecations, and of operators that are not there or used."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(before)


_WRITERS = {"safetensors": _safetensors, "torchvision": _torchvision, "onnx": _onnx}
