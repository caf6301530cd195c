"""Stream of WebDataset: tar archives of the JPEG files, decoded by Pillow ("pil") in the workers of a DataLoader.

    python -m tools.bench.peers.webdataset_stream FOLDER OUT THREADS RED,GREEN,BLUE

The settings follow WebDataset's documentation: archives are drawn at random without end, a shuffle buffer holds 1,000
records, and the workers make the batches.

The program needs `pip install webdataset torch pillow`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import webdataset
from PIL import Image

from tools.bench.peers.stream_turn import BATCH, Mean, Records, parse_arguments, random_crop, take_turns

_ARCHIVES_PER_WORKER = 8
_SHUFFLE_BUFFER = 1000


def write_archives(records: Records, out: Path, archives: int) -> list[str]:
    """Write the records in random order to about `archives` tar files, and return the paths of these files."""
    out.mkdir()
    pattern, archive_size = str(out / "train-%06d.tar"), -(-len(records) // archives)
    with webdataset.ShardWriter(pattern, maxcount=archive_size, verbose=0) as writer:
        for index, (path, label) in enumerate(random.sample(records, len(records))):
            writer.write({"__key__": f"{index:08d}", "jpg": Path(path).read_bytes(), "cls": label})
    return sorted(str(path) for path in out.glob("*.tar"))


def crop_image(mean: Mean, image: Image.Image) -> torch.Tensor:
    """Return a random crop as a tensor, float32 (3, 224, 224)."""
    return torch.from_numpy(random_crop(np.asarray(image), mean))


def endless_batches(archives: list[str], threads: int, mean: Mean) -> Iterator[Any]:
    """Yield batches of images without end."""
    samples = webdataset.WebDataset(archives, resampled=True, shardshuffle=False).shuffle(_SHUFFLE_BUFFER)
    crops = samples.decode("pil").to_tuple("jpg", "cls").map_tuple(partial(crop_image, mean))
    for images, _ in webdataset.WebLoader(crops.batched(BATCH), batch_size=None, num_workers=threads):
        yield images


def main() -> None:
    """Run the stream. Each line on standard input starts a timed run (see stream_turn.py)."""
    records, out, threads, mean, _ = parse_arguments()
    archives = write_archives(records, out, _ARCHIVES_PER_WORKER * threads)
    versions = f"webdataset {version('webdataset')}, torch {torch.__version__}, Pillow {PIL.__version__}"
    take_turns(versions, endless_batches(archives, threads, mean), threads)


if __name__ == "__main__":
    main()
