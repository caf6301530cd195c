"""Network architectures: columns, layer widths, padding and dropout of each network that `--model` offers.

All other hyperparameters, such as learning rates, colour noise, activation and normalization, are fields of a recipe
(train/config/recipe.py). `crossing` is the only field of a recipe that changes the shapes of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = 2  # number of columns of the paper's network; a network can also have one column
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


@dataclass(frozen=True)
class Widths:
    """Number of maps or units of each layer, summed over the columns. The defaults are those of the paper's network."""

    conv1: int = 96
    conv2: int = 256
    conv3: int = 384
    conv4: int = 384
    conv5: int = 256
    fc6: int = 4096
    fc7: int = 4096


@dataclass(frozen=True)
class Architecture:
    """One network architecture. The defaults are those of the paper's network."""

    name: str
    source: str
    columns: int = COLUMNS  # number of columns, 1 or 2
    widths: Widths = Widths()
    # Zero padding of conv1's input, in px, on every side. None: zeros only at the right and at the bottom, as far
    # as the last position of the 11 × 11 kernel reaches beyond the image.
    conv1_padding: int | None = None
    normalised: bool = True  # False: no normalization, even if the recipe sets `lrn` or `within_map`
    dropout_before: tuple[str, ...] = ("fc7", "fc8")  # layers whose inputs have dropout
    # True: fc6 to fc8 are convolutions, so that an image larger than 224 px gives a map of logits.
    convolutional: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError if the number of columns is not 1 or 2, or does not divide the width of every layer."""
        if self.columns not in (1, COLUMNS):
            raise ValueError(f"{self.columns} columns: expected 1 or {COLUMNS}")
        odd_widths = [f"{name} = {n}" for name, n in vars(self.widths).items() if n % self.columns]
        if odd_widths:
            raise ValueError(
                f"{', '.join(odd_widths)}: expected even numbers, because {self.columns} columns share every layer"
            )

    def padding_px(self, side_px: int) -> tuple[int, int]:
        """Return the zero padding of conv1's input along one axis, in px: (left or top, right or bottom).

        side_px  width or height of the image

        The authors' code rounds the number of kernel positions up: 1 + ceil((224 − 11) / 4) = 55 (layer.py:1004). The
        authors' CUDA kernels read zeros beyond the edge of the image. For an image of 224 px, the zeros fill three rows
        at the bottom and three columns at the right. A zero means the mean colour, because the mean has been subtracted
        from the image.
        """
        if self.conv1_padding is None:
            return 0, (11 - side_px) % 4
        return self.conv1_padding, self.conv1_padding


ALEXNET = Architecture(
    "alexnet",
    "sections 3.2 and 3.5, figure 2; net #145 of the authors' code",  # 60,965,224 parameters for 1000 classes
)
JOINED = Architecture(
    "joined",
    "ours: the paper's widths in one column, so that every layer sees all maps",
    columns=1,
)
HALF = Architecture(
    "half",
    "ours: one of the two columns alone, with a third of the multiply-adds of alexnet",
    columns=1,
    widths=Widths(48, 128, 192, 192, 128, 2048, 2048),
)
ONE_GPU = Architecture(
    "one-gpu",
    "section 3.2: 'a net with half as many kernels in each convolutional layer trained on one GPU'; its footnote and "
    "net #145-half (layer-params-145-half.cfg:100) leave conv5 at 256 maps, fc6 and fc7 at 4096 units, so that the "
    "network has about as many parameters as the network on two GPUs",
    columns=1,
    widths=Widths(48, 128, 192, 192, 256, 4096, 4096),
)
TORCHVISION = Architecture(
    "torchvision",
    "torchvision.models.alexnet, after Krizhevsky 2014 (arXiv 1404.5997)",
    columns=1,
    widths=Widths(64, 192, 384, 256, 256, 4096, 4096),
    conv1_padding=2,
    normalised=False,
    dropout_before=("fc6", "fc7"),
)
CONVOLUTIONAL = Architecture(
    "convolutional",
    "alexnet with fc6 as a 6×6 convolution, and fc7 and fc8 as 1×1 convolutions (Sermanet et al. 2014, arXiv "
    "1312.6229, section 3.5); the parameters are the same, so each of the two networks can load the checkpoints of the "
    "other",
    convolutional=True,
)

ARCHITECTURES = {a.name: a for a in (ALEXNET, JOINED, HALF, ONE_GPU, TORCHVISION, CONVOLUTIONAL)}

# {name of a layer in torchvision's state_dict: name of the same layer in this package}. torchvision's network expects
# the input (RGB / 255 − mean) / std, with the mean and std of torchvision.
TORCHVISION_LAYERS = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}


def architecture_from_json(data: Mapping[str, Any]) -> Architecture:
    """Convert the result of asdict back to an Architecture. Raises TypeError, KeyError or ValueError for other data."""
    converted = {"widths": Widths(**data["widths"]), "dropout_before": tuple(data["dropout_before"])}
    return Architecture(**{**data, **converted})


def architecture_values(architecture: Architecture) -> dict[str, Any]:
    """Return the fields of an architecture by name. `source` is left out, because it does not affect the network."""
    return {name: value for name, value in asdict(architecture).items() if name != "source"}
