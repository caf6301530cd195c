"""Captures the state of a training in a checkpoint, and restores it from a checkpoint.

A checkpoint stores parameters and velocity joined over the columns (AlexNet.joined_tensors), so that a run can continue
with any assignment of columns to devices. The state of the stream is restored by TrainLoader.load_state_dict.
"""

from __future__ import annotations

import torch

from pipeline.loader import TrainLoader
from train.config.run_config import RunConfig
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import PaperSGD
from train.optim.schedule import Schedule
from train.runs.checkpoint import Checkpoint
from train.runs.run import Run


def capture_state(
    run: Run,
    step: int,
    network: AlexNet,
    optimizer: PaperSGD,
    schedule: Schedule,
    loader: TrainLoader,
    validation_due: bool,
) -> Checkpoint:
    """Return the checkpoint of a training after `step`. CheckpointKeeper adds the best step and the ancestry.

    validation_due  True if an epoch ended at `step`, and the validation of this epoch has not been computed
    """
    return Checkpoint(
        identity=run.identity,
        **run.training_facts(),
        step=step,
        steps_per_epoch=len(loader),
        validation_due=validation_due,
        parameters=network.joined_tensors(),
        velocity=network.joined_tensors(optimizer.velocity),
        schedule=schedule.state_dict(),
        devices=list(run.config.devices),
        random=torch.get_rng_state(),
        random_cuda=[torch.cuda.get_rng_state(device) for device in network.devices if device.type == "cuda"],
        stream=loader.state_dict(),
    )


def restore_state(
    state: Checkpoint, config: RunConfig, network: AlexNet, optimizer: PaperSGD, schedule: Schedule
) -> None:
    """Load a checkpoint into network, optimizer, schedule and random generators.

    If `config` has other devices than the checkpoint, the generators are seeded anew from seed and step.
    """
    network.load_joined_tensors(state.parameters)
    network.load_joined_tensors(state.velocity, optimizer.velocity)
    schedule.load_state_dict(state.schedule)
    if list(state.devices) != list(config.devices):
        seed_generators(config, state.step)
        return
    torch.set_rng_state(state.random)
    gpus = [device for device in network.devices if device.type == "cuda"]
    for device, generator in zip(gpus, state.random_cuda, strict=True):
        torch.cuda.set_rng_state(generator, device)


def seed_generators(config: RunConfig, step: int) -> None:
    """Seed every random generator.

    If column 1 is on a second GPU, the two GPUs get different seeds. With equal seeds, dropout would select the same
    units in both columns.
    """
    torch.manual_seed(config.seed + step)
    if config.devices[0] != config.devices[1]:
        with torch.cuda.device(config.devices[1]):
            torch.cuda.manual_seed(config.seed + step + (1 << 32))
