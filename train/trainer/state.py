"""Captures the state of a training in a checkpoint, and restores it from a checkpoint.

A checkpoint holds parameters and velocity joined over the columns (AlexNet.joined_tensors). A run can therefore
continue with any assignment of columns to devices. The state of the stream is restored by TrainLoader.load_state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config.identity import check_identity
from train.config.run_config import RunConfig
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import PaperSGD
from train.optim.schedule import Schedule
from train.replicas.group import ReplicaGroup
from train.runs.checkpoint import Checkpoint, load_latest
from train.runs.run import Run


def capture_state(
    run: Run,
    step: int,
    network: AlexNet,
    optimizer: PaperSGD,
    schedule: Schedule,
    stream: Mapping[str, Any],
    validation_due: bool,
) -> Checkpoint:
    """Return the checkpoint of a training after `step`. CheckpointKeeper adds the best step and the ancestry.

    stream          result of TrainLoader.state_dict after `step`
    validation_due  True if an epoch ended at `step`, and its validation has not been computed
    """
    return Checkpoint(
        identity=run.identity,
        **run.training_facts(),
        step=step,
        steps_per_epoch=run.steps_per_epoch,
        validation_due=validation_due,
        parameters=network.joined_tensors(),
        velocity=network.joined_tensors(optimizer.velocity),
        schedule=schedule.state_dict(),
        devices=list(run.config.devices),
        random=torch.get_rng_state(),
        random_cuda=_cuda_states(network.devices),
        stream=stream,
    )


def restore_state(
    state: Checkpoint, config: RunConfig, network: AlexNet, optimizer: PaperSGD, schedule: Schedule
) -> None:
    """Load a checkpoint into network, optimizer, schedule and random generators.

    If `config` has other devices than the checkpoint, the generators are seeded again from seed and step. With several
    replicas, the devices of rank 0 are compared with those of the checkpoint. All ranks then seed the generators in the
    same way, or restore the same states.
    """
    network.load_joined_tensors(state.parameters)
    network.load_joined_tensors(state.velocity, optimizer.velocity)
    schedule.load_state_dict(state.schedule)
    if list(state.devices) != network.replicas.broadcast_json(list(config.devices)):
        seed_generators(config, state.step)
        return
    _set_states(network.devices, state.random, state.random_cuda)


def seed_generators(config: RunConfig, step: int) -> None:
    """Seed every random generator.

    If column 1 is on a second GPU, the two GPUs get different seeds. With equal seeds, dropout would select the same
    units in both columns.
    """
    torch.manual_seed(config.seed + step)
    if config.devices[0] != config.devices[1]:
        with torch.cuda.device(config.devices[1]):
            torch.cuda.manual_seed(config.seed + step + (1 << 32))


class Generators:
    """Gives each training run of a process its own states of torch's random generators.

    torch has one generator for the CPU and one for each GPU. The initial parameters and the dropout of a training run
    are drawn from torch's generators. While one training run uses the generators, this object keeps the generator
    states of all other training runs. Each run therefore draws the same numbers as if it were alone in the process.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        """`devices` are the devices of the columns, which are the same for every training run."""
        self._devices = [torch.device(device) for device in devices]
        self._states: dict[int, tuple[Tensor, list[Tensor]]] = {}  # id of a training run -> its generator states
        self._training: object = None  # the training run that uses the generators

    def switch_to(self, training: object) -> None:
        """Set the generators to the states of `training`.

        After the first call for a training, the training must seed the generators.
        """
        if training is self._training:
            return
        if self._training is not None:
            self._states[id(self._training)] = torch.get_rng_state(), _cuda_states(self._devices)
        self._training = training
        if id(training) in self._states:
            _set_states(self._devices, *self._states[id(training)])


def _cuda_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"]


def _set_states(devices: Sequence[torch.device], random: Tensor, random_cuda: Sequence[Tensor]) -> None:
    torch.set_rng_state(random)
    gpus = [device for device in devices if device.type == "cuda"]
    for device, state in zip(gpus, random_cuda, strict=True):
        torch.cuda.set_rng_state(state, device)


def load_on_all_ranks(run_dir: Path, identity: Mapping[str, Any], group: ReplicaGroup) -> Checkpoint | None:
    """Return the newest checkpoint of a run on every rank. Only rank 0 reads the run folder.

    Returns None if there is no checkpoint. Raises the errors of load_latest. Also raises UserError if the checkpoint
    does not have the identity of the run.
    """
    state = None
    with group.together():
        if group.is_first:
            state = load_latest(run_dir)
            if state is not None:
                check_identity(state.identity, identity, run_dir)
    if group.size == 1:
        return state
    tensors: dict[str, Any] = {}
    described = None if state is None else _without_tensors(vars(state), tensors, "")
    described, shapes = group.broadcast_json(
        [described, {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}]
    )
    if described is None:
        return None
    for name, (shape, dtype) in shapes.items():
        if not group.is_first:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        group.broadcast(tensors[name].numpy())
    if state is not None:
        return state
    return Checkpoint(**_with_tensors(described, tensors, ""))


def _without_tensors(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Return a copy of the nested `value` with None in place of each tensor, and put the tensors into `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value.contiguous()
        return None
    if isinstance(value, Mapping):
        return {name: _without_tensors(part, tensors, f"{path}/{name}") for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(part, tensors, f"{path}/{index}") for index, part in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor], path: str) -> Any:
    """This function is the inverse of _without_tensors."""
    if path in tensors:
        return tensors[path]
    if isinstance(value, dict):
        return {name: _with_tensors(part, tensors, f"{path}/{name}") for name, part in value.items()}
    if isinstance(value, list):
        return [_with_tensors(part, tensors, f"{path}/{index}") for index, part in enumerate(value)]
    return value
