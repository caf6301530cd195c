"""Stream of torchvision: transforms of Pillow images in the workers of torch's DataLoader.

    python -m tools.bench.peers.torchvision_stream FOLDER OUT THREADS RED,GREEN,BLUE resized

The data set and the transforms are those of torchvision's references/classification: ImageFolder, RandomResizedCrop
with the bilinear filter, RandomHorizontalFlip, PILToTensor, ConvertImageDtype and Normalize. RED,GREEN,BLUE is not
used, because the transforms have ImageNet's mean. Each of THREADS worker processes uses one thread. No file is written
to OUT.

The program needs `pip install torch torchvision`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torchvision  # type: ignore[import-not-found]
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder  # type: ignore[import-not-found]

from tools.bench.peers.stream_turn import BATCH, CROP_PX, RATIO, SCALE, parse_arguments, take_turns


def endless_batches(folder: str, threads: int) -> Iterator[Any]:
    """Yield batches of images without end."""
    steps = [
        transforms.RandomResizedCrop(CROP_PX, SCALE, RATIO, transforms.InterpolationMode.BILINEAR),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float32),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    dataset = ImageFolder(folder, transforms.Compose(steps))
    sampler = RandomSampler(dataset, num_samples=1 << 40)  # random permutations of the records without end
    for images, _ in DataLoader(dataset, BATCH, sampler=sampler, num_workers=threads):
        yield images


def main() -> None:
    """Run the stream. Each line on standard input starts a timed run (see stream_turn.py)."""
    _, _, threads, _, _ = parse_arguments()
    versions = f"torchvision {torchvision.__version__}, torch {torch.__version__}"
    take_turns(versions, endless_batches(sys.argv[1], threads), threads)


if __name__ == "__main__":
    main()
