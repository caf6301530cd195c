"""Train ResNet-18 with Hugging Face accelerate, in one process or in several.

    python -m examples.accelerate_resnet store checkpoints
    accelerate launch -m examples.accelerate_resnet store checkpoints

If the program is interrupted, the same command resumes the training from the newest checkpoint, with the next batch.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import click
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from examples.networks import resnet18
from pipeline import Augmentation, EvalLoader, eval_loader, train_loader


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Save a checkpoint in FOLDER/STEP, then remove older checkpoints. A kill never leaves FOLDER without a checkpoint.

    A checkpoint is complete when its folder has the name STEP.
    """
    accelerator.save_state(str(folder / "partial"))
    accelerator.wait_for_everyone()  # each process has saved the states of its random generators
    if accelerator.is_main_process:
        (folder / "partial").rename(folder / f"{step:08d}")
        for older in sorted(folder.glob("[0-9]*"))[:-1]:
            shutil.rmtree(older)


@torch.no_grad()
def accuracy(accelerator: Accelerator, net: nn.Module, loader: EvalLoader) -> float:
    """Return the share of correctly classified images. The images are divided among the processes."""
    broadcast(list(net.buffers()))  # BatchNorm statistics differ between processes, so all use those of process 0
    net.eval()
    correct = torch.zeros(1, dtype=torch.int64, device=accelerator.device)
    for images, labels in loader:  # the last batch can be smaller
        correct += (net(images).argmax(1) == labels).sum()
    net.train()
    return float(accelerator.reduce(correct, "sum")) / loader.records


@click.command(context_settings={"show_default": True})
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--epochs", default=90, help="Number of epochs.")
@click.option("--batch-size", default=256, help="Number of images in a batch of each process.")
@click.option(
    "--lr", default=0.1, help="Initial learning rate; 0.1 suits a total of 256 images in the batches of all processes."
)
@click.option("--size-px", default=224, help="Side of the images in px.")
@click.option("--width", default=64, help="Number of channels in the first stage of the network.")
@click.option("--save-every", default=1000, help="Save a checkpoint after this number of steps, and after each epoch.")
def main(
    store: str, folder: Path, epochs: int, batch_size: int, lr: float, size_px: int, width: int, save_every: int
) -> None:
    """Train ResNet-18 on STORE, or resume from the newest checkpoint in FOLDER."""
    has_gpu = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not has_gpu, mixed_precision="bf16" if has_gpu else "no")
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    settings = replace(Augmentation.preset("resnet"), size_px=size_px)
    # The loaders are not passed to `prepare`: `shard` already divides the records, and the tensors are on the device.
    training = train_loader(store, batch_size, device, augmentation=settings, shard=rank, world_size=ranks)
    validation = eval_loader(store, batch_size, device, augmentation=settings, shard=rank, world_size=ranks)
    torch.manual_seed(0)
    net = resnet18(len(training.classes), width)
    sgd = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    # The schedule is not passed to `prepare`, which would advance the schedule once for each process.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs * len(training))
    replica, optimizer = accelerator.prepare(net, sgd)
    accelerator.register_for_checkpointing(schedule, training)
    if saved := sorted(folder.glob("[0-9]*")):
        accelerator.load_state(str(saved[-1]))
    with training, validation:
        while training.epoch < epochs:
            for images, labels in training:  # one epoch; after a resumption, the rest of the epoch
                with accelerator.autocast():
                    loss = nn.functional.cross_entropy(replica(images), labels)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                if training.step % save_every == 0:  # `step` is 0 after the last batch of an epoch
                    save(accelerator, folder, training.epoch * len(training) + training.step)
            with accelerator.autocast():
                top_1 = accuracy(accelerator, net, validation)
            accelerator.print(f"epoch {training.epoch}: loss {loss:.3f}, top-1 accuracy {top_1:.1%}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
