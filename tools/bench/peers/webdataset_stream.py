"""WebDataset over tar archives of the JPEG files, decoded by Pillow ("pil") in the workers of a DataLoader.

    python -m tools.bench.peers.webdataset_stream FOLDER OUT THREADS RED,GREEN,BLUE

As its documentation has it: archives drawn at random without end, a buffer of 1,000 records to mix them, batches made
in the workers.

Needs `pip install webdataset torch pillow`.
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
import webdataset  # type: ignore[import-not-found]
from PIL import Image

from tools.bench.peers.stream_turn import BATCH, Mean, Records, arguments, random_window, take_turns

_ARCHIVES_A_WORKER = 8
_MIXED = 1000


def write_archives(records: Records, out: Path, archives: int) -> list[str]:
    """The records in random order, in about so many archives."""
    out.mkdir()
    pattern, each = str(out / "train-%06d.tar"), -(-len(records) // archives)
    with webdataset.ShardWriter(pattern, maxcount=each, verbose=0) as writer:
        for index, (path, label) in enumerate(random.sample(records, len(records))):
            writer.write({"__key__": f"{index:08d}", "jpg": Path(path).read_bytes(), "cls": label})
    return sorted(str(path) for path in out.glob("*.tar"))


def window(mean: Mean, image: Image.Image) -> torch.Tensor:
    """A random window."""
    return torch.from_numpy(random_window(np.asarray(image), mean))


def batches(archives: list[str], threads: int, mean: Mean) -> Iterator[Any]:
    """Without end."""
    samples = webdataset.WebDataset(archives, resampled=True, shardshuffle=False).shuffle(_MIXED)
    windows = samples.decode("pil").to_tuple("jpg", "cls").map_tuple(partial(window, mean))
    for images, _ in webdataset.WebLoader(windows.batched(BATCH), batch_size=None, num_workers=threads):
        yield images


def main() -> None:
    """Turns."""
    records, out, threads, mean, _ = arguments()
    archives = write_archives(records, out, _ARCHIVES_A_WORKER * threads)
    versions = f"webdataset {version('webdataset')}, torch {torch.__version__}, Pillow {PIL.__version__}"
    take_turns(versions, batches(archives, threads, mean), threads)


if __name__ == "__main__":
    main()
