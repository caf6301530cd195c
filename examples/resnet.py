"""Train ResNet-18 with DistributedDataParallel, on GPUs or on a CPU.

    python -m examples.resnet store resnet.pt
    torchrun --nproc-per-node 2 -m examples.resnet store resnet.pt

If the program is interrupted, the same command resumes the training from the checkpoint, with the next batch. On a CPU,
the trained weights then have the same bits as without the interruption.
"""

import os
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.distributed as dist

from examples import checkpoints
from examples.networks import resnet18
from pipeline import Augmentation, EvalLoader, eval_loader, train_loader


def accuracy(net: torch.nn.Module, loader: EvalLoader, device: torch.device) -> float:
    """Return the share of correctly classified images. The images are divided among the ranks."""
    for buffer in net.buffers():
        dist.broadcast(buffer, 0)  # BatchNorm statistics differ between ranks, so all use those of rank 0
    net.eval()
    correct = torch.zeros(1, dtype=torch.int64, device=device)
    for images, labels in loader:  # the last batch can be smaller
        correct += (net(images).argmax(1) == labels).sum()
    net.train()
    dist.all_reduce(correct)
    return correct.item() / loader.records


@click.command(context_settings={"show_default": True})
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--epochs", default=90, help="Number of epochs.")
@click.option("--batch-size", default=256, help="Number of images in a batch of each process.")
@click.option("--size-px", default=224, help="Side of the images in px.")
@click.option("--width", default=64, help="Number of channels in the first stage of the network.")
@click.option("--save-every", default=1000, help="Save a checkpoint after this number of steps, and after each epoch.")
def main(store: str, checkpoint: Path, epochs: int, batch_size: int, size_px: int, width: int, save_every: int) -> None:
    """Train ResNet-18 on STORE, or resume from the file CHECKPOINT."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # from torchrun
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    dist.init_process_group(rank=rank, world_size=ranks, store=None if ranks > 1 else dist.HashStore())
    settings = replace(Augmentation.preset("resnet"), size_px=size_px)
    training = train_loader(store, batch_size, device, augmentation=settings, shard=rank, world_size=ranks)
    validation = eval_loader(store, batch_size, device, augmentation=settings, shard=rank, world_size=ranks)
    torch.manual_seed(0)
    net = resnet18(len(training.classes), width).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1 * batch_size * ranks / 256, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(training))
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule, "loader": training}
    checkpoints.load(checkpoint, parts)
    replica = torch.nn.parallel.DistributedDataParallel(net)
    mixed_precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with training, validation:
        while training.epoch < epochs:
            for images, labels in training:  # one epoch; after a resumption, the rest of the epoch
                with mixed_precision:
                    loss = torch.nn.functional.cross_entropy(replica(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if rank == 0 and training.step % save_every == 0:  # `step` is 0 after the last batch of an epoch
                    checkpoints.save(checkpoint, parts)
            with mixed_precision, torch.no_grad():
                top_1 = accuracy(net, validation, device)
            if rank == 0:
                click.echo(f"epoch {training.epoch}: loss {loss:.3f}, top-1 accuracy {top_1:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
