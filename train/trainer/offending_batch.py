"""If a training diverges, writes the batch of the diverged step into the run folder, for inspection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.augment import Augmentation
from pipeline.diagnostics.preview import save_image_grid
from pipeline.loader import train_loader
from pipeline.records import Records
from pipeline.sampling import epoch_permutation
from prep.files import write_atomic
from train.runs.run import Run


def write_offending_batch(
    folder: Path, run: Run, step: int, augmentation: Augmentation, diagnosis: Mapping[str, Any]
) -> None:
    """Write the batch of `step` into `folder`, as batch.json and pictures.png. The first step of a run is step 1.

    augmentation  the stream's augmentation at that step
    diagnosis     keys that are added to batch.json: the checked steps, their losses, all norms

    A new stream reads the batch again. The images are the same as in training, because a batch depends only on store,
    batch size, augmentation, seed, epoch and step. batch.json has the range of the pixels, and the shard, key, source
    and label of each record. For pictures.png, the pixels are multiplied by the divisor and the mean colour is added
    again. NaN and infinite pixels are white. Raises OSError. Also raises the errors of train_loader.
    """
    config, store, size = run.config, run.store, run.config.batch_size
    epoch, step_of_epoch = divmod(step - 1, run.steps_per_epoch)
    with train_loader(
        config.store,
        size,
        config.devices[0],
        config.seed_of_stream,
        augmentation=augmentation,
        threads=config.threads,
    ) as loader:
        loader.seek(epoch, step_of_epoch)
        images, labels = next(iter(loader))
        permutation = epoch_permutation(loader.records, config.seed_of_stream, epoch)
    indices = permutation[step_of_epoch * size : (step_of_epoch + 1) * size].tolist()
    pixels = images.float().cpu().numpy()
    finite = np.isfinite(pixels)
    records = Records(store, "train")
    content = {
        "step": step,
        "epoch": epoch,
        **diagnosis,
        "pixels": {
            "smallest": float(pixels[finite].min(initial=np.inf)),
            "largest": float(pixels[finite].max(initial=-np.inf)),
            "no_numbers": int((~finite).sum()),
        },
        "augmentation": {**augmentation.for_state(), "eval_divisor": augmentation.eval_divisor},
        "records": [
            {
                "number": index,
                "label": label,
                "class": store.classes[label],
                "record": records.location(index),
                "no_numbers": int(not_finite),
            }
            for index, label, not_finite in zip(indices, labels.tolist(), (~finite).sum((1, 2, 3)), strict=True)
        ],
    }
    records.close()
    mean = 0.0 if augmentation.mean == "none" else np.array(store.color_stats().mean_rgb)[:, None, None]
    visible = np.nan_to_num(pixels * augmentation.divisor + mean, nan=255.0, posinf=255.0, neginf=255.0)
    folder.mkdir(exist_ok=True)
    save_image_grid(np.rint(visible.clip(0, 255)).astype(np.uint8).transpose(0, 2, 3, 1), folder / "pictures.png")
    write_atomic(folder / "batch.json", json.dumps(content, indent=1).encode())
