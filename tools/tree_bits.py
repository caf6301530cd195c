"""Hash the results that the packages of one source tree compute. tools.compare_bits runs this program for two trees.

    cd TREE && PYTHONPATH=TREE python -P tree_bits.py compile
    cd TREE && PYTHONPATH=TREE python -P tree_bits.py command KERNELS.json alextrain run --store STORE …
    cd TREE && PYTHONPATH=TREE python -P tree_bits.py stream JPEG_STORE PPM_STORE BATCHES
    cd TREE && PYTHONPATH=TREE python -P tree_bits.py run RUN_DIR
    cd TREE && PYTHONPATH=TREE python -P tree_bits.py probabilities FILE.npz

The action `command` runs a command of the project, such as alextrain. KERNELS.json then gets the names of the compiled
kernels that the command has loaded. All other actions print one JSON object: {"results": {name: SHA-256}, "kernels":
[loaded libraries]}. The results of `compile` are {source: library, or null if compiling failed}. This program must use
only the parts of the project that exist in both trees: the three commands, `pipeline.loader`,
`pipeline.augment.Augmentation`, and the files that the commands write.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

PACKAGES = ("prep", "pipeline", "train")
COMMANDS = {"alexprep": "prep.cli", "alexstream": "pipeline.cli", "alextrain": "train.cli"}

# Values of metrics.jsonl that depend on the clock or on the machine.
MEASURED = ("images_per_s", "waiting_share", "stream_waiting_share", "memory_mb", "gpu_memory_mb", "unix_time_s")


def check_imports(tree: Path) -> None:
    """Exit with a message if one of the packages would be imported from a folder outside of `tree`."""
    for name in PACKAGES:
        file = import_module(name).__file__
        if file is None or not Path(file).resolve().is_relative_to(tree):
            sys.exit(f"{name} was imported from {file}, not from {tree}")


def loaded_kernels(tree: Path) -> list[str]:
    """Return the compiled C libraries of `tree` that this process has loaded, from /proc/self/maps."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in maps if line.endswith(".so") and str(tree) in line}
    return sorted(str(Path(path).relative_to(tree)) for path in paths)


def compile_kernels(tree: Path) -> dict[str, str | None]:
    """Compile every C source of the packages. Return {source: library, or None if the compiler failed}."""
    compile_native = import_module("tools.compile_native").compile_native
    libraries = {}
    for source in sorted(path for name in PACKAGES for path in (tree / name).rglob("*.c")):
        library = compile_native(source)
        libraries[str(source.relative_to(tree))] = None if library is None else str(library.relative_to(tree))
    return libraries


def run_command(tree: Path, args: list[str]) -> None:
    """Run one of the project's commands in this process. The command ends by raising SystemExit."""
    kernels_file, name, *arguments = args
    try:
        import_module(COMMANDS[name]).main(arguments, prog_name=name)
    finally:
        Path(kernels_file).write_text(json.dumps(loaded_kernels(tree)))


def tensor_bytes(tensor: Any) -> bytes:
    """Return the dtype, the shape and the bytes of the elements of a CPU tensor."""
    import torch

    about = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    elements: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return about + elements


def hash_of(parts: Iterable[bytes]) -> str:
    """Return one SHA-256 of all parts. The length of each part is hashed before the part."""
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def batches_hash(loader: Any, batches: int) -> str:
    """Return the SHA-256 of the first `batches` batches of a loader, over several epochs if needed."""

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    with loader:
        taken = islice(endless(), batches)
        return hash_of(tensor_bytes(tensor) for batch in taken for tensor in (batch.images, batch.labels))


def stream_hashes(jpeg: Path, ppm: Path, batches: int) -> dict[str, str]:
    """Return hashes of training batches (batch size 64) and evaluation batches (batch size 32) of the CPU stream.

    The batches are made with several settings. If the C kernels are switched off, only some of the settings are used.
    """
    augment, loader = import_module("pipeline.augment"), import_module("pipeline.loader")
    make = augment.Augmentation
    training: dict[str, tuple[Path, dict[str, Any]]] = {
        "default": (jpeg, {}),
        "default, ppm": (ppm, {}),
        "seed 2^63, one thread": (jpeg, {"seed": 2**63, "threads": 1}),
        "mean image": (ppm, {"augmentation": make(mean="image")}),
        "mean aligned": (ppm, {"augmentation": make(mean="aligned")}),
        "mean none": (ppm, {"augmentation": make(mean="none")}),
        "colour eigenvalue": (ppm, {"augmentation": make(colour="eigenvalue")}),
        "colour off": (ppm, {"augmentation": make(colour="off")}),
        "as released": (ppm, {"augmentation": make(mean="image", divisor=1.1, shared_by=32)}),
        "NHWC float16": (ppm, {"layout": "NHWC", "dtype": "float16"}),
        "NHWC aligned": (ppm, {"layout": "NHWC", "augmentation": make(mean="aligned")}),
        "bfloat16": (ppm, {"dtype": "bfloat16"}),
        "shard 1 of 2": (ppm, {"shard": 1, "world_size": 2}),
    }
    evaluation: dict[str, tuple[Path, dict[str, Any]]] = {
        "1 view": (jpeg, {}),
        "1 view, aligned": (ppm, {"augmentation": make(mean="aligned")}),
        "10 views": (jpeg, {"views": 10}),
        "10 views, ppm float16": (ppm, {"views": 10, "dtype": "float16"}),
        "square": (ppm, {"views": "square", "augmentation": make(mean="image")}),
    }
    if os.environ.get("ALEXNET_NATIVE") == "0":  # DALI alone takes longer, so fewer settings are used
        training = {name: training[name] for name in ("default", "mean aligned", "as released", "NHWC float16")}
        evaluation = {name: evaluation[name] for name in ("10 views", "square")}
    hashes = {}
    for name, (store, settings) in training.items():
        stream = loader.train_loader(store, 64, **{"seed": 0, **settings})
        batch_count = min(batches, len(stream) + 1)  # at most one epoch, and one batch of the next epoch
        hashes[f"training batches: {name}"] = batches_hash(stream, batch_count)
    for name, (store, settings) in evaluation.items():
        stream = loader.eval_loader(store, 32, **settings)
        hashes[f"evaluation batches: {name}"] = batches_hash(stream, min(batches, len(stream)))
    return hashes


def run_hashes(run_dir: Path) -> dict[str, str]:
    """Return hashes of a run's metrics.jsonl, and of its newest checkpoint: weights, velocity, generator, state."""
    import torch

    newest = max(run_dir.glob("checkpoint-*.pt"))
    state = torch.load(newest, map_location="cpu", weights_only=True)
    position = {name: state[name] for name in ("format", "identity", "step", "steps_per_epoch", "stream", "schedule")}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    unmeasured = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    return {
        f"weights after {state['step']} steps": tensors_hash(state["parameters"]),
        f"velocity after {state['step']} steps": tensors_hash(state["velocity"]),
        "random generator": hash_of([tensor_bytes(state["random"])]),
        "identity and stream state": hash_of([json.dumps(position, sort_keys=True).encode()]),
        "metrics": hash_of(json.dumps(line, sort_keys=True).encode() for line in unmeasured),
    }


def tensors_hash(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of named tensors, in the order of their names."""
    return hash_of(part for name in sorted(tensors) for part in (name.encode(), tensor_bytes(tensors[name])))


def array_hashes(file: Path) -> dict[str, str]:
    """Return {name: hash} of the numeric arrays in a file of saved predictions."""
    import numpy as np

    with np.load(file, allow_pickle=False) as arrays:
        numeric = [name for name in sorted(arrays) if arrays[name].dtype.kind in "fiu"]
        return {name: hash_of([str(arrays[name].shape).encode(), arrays[name].tobytes()]) for name in numeric}


def main() -> None:
    """Run the action that the first argument names. The working directory must be the root of the tree."""
    tree = Path.cwd().resolve()
    check_imports(tree)
    action, *args = sys.argv[1:]
    if action == "command":
        run_command(tree, args)
        return
    results: Mapping[str, str | None]
    if action == "compile":
        results = compile_kernels(tree)
    elif action == "stream":
        results = stream_hashes(Path(args[0]), Path(args[1]), int(args[2]))
    elif action == "run":
        results = run_hashes(Path(args[0]))
    else:
        results = array_hashes(Path(args[0]))
    print(json.dumps({"results": results, "kernels": loaded_kernels(tree)}))  # noqa: T201  # read by compare_bits


if __name__ == "__main__":
    main()
