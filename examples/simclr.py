"""Train ResNet-18 without labels by SimCLR (Chen et al. 2020), in one process.

    python -m examples.simclr store simclr.pt

If the program is interrupted, the same command resumes the training from the checkpoint, with the next batch.
"""

from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from examples import checkpoints
from examples.networks import resnet18
from pipeline import Augmentation, train_loader


def nt_xent(projections: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the NT-Xent loss (equation 1) of the projections (N, 2, D) of N images with two views each.

    Each view is classified among the other 2 N − 1 views. The right class is the other view of the same image.
    """
    z = nn.functional.normalize(projections.flatten(0, 1), dim=1)  # (2 N, D); rows 2 n and 2 n + 1 belong to image n
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    other_view = torch.arange(len(z), device=z.device) ^ 1  # 1, 0, 3, 2, …
    return nn.functional.cross_entropy(similarity, other_view)


@click.command(context_settings={"show_default": True})
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--epochs", default=100, help="Number of epochs.")
@click.option("--batch-size", default=256, help="Number of images in a batch. Each image has two views.")
@click.option("--lr", default=3e-4, help="Initial learning rate of Adam.")
@click.option("--size-px", default=224, help="Side of the views in px.")
@click.option("--width", default=64, help="Number of channels in the first stage of the network.")
@click.option("--save-every", default=1000, help="Save a checkpoint after this number of steps, and after each epoch.")
def main(
    store: str, checkpoint: Path, epochs: int, batch_size: int, lr: float, size_px: int, width: int, save_every: int
) -> None:
    """Train ResNet-18 on the photographs of STORE, or resume from the file CHECKPOINT."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = replace(Augmentation.preset("simclr"), size_px=size_px)
    loader = train_loader(store, batch_size, device, augmentation=settings, views=2)
    torch.manual_seed(0)
    net, features = resnet18(1, width), 8 * width
    net.fc = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 128))  # the projection head
    net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr, weight_decay=1e-6)  # the paper uses LARS and batches of 4,096
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule, "loader": loader}
    checkpoints.load(checkpoint, parts)
    mixed_precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with loader:
        while loader.epoch < epochs:
            for images, _ in loader:  # images (N, 2, 3, size_px, size_px)
                with mixed_precision:
                    projections = net(images.flatten(0, 1)).unflatten(0, (-1, 2))  # (N, 2, 128)
                loss = nt_xent(projections.float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if loader.step % save_every == 0:  # `step` is 0 after the last batch of an epoch
                    checkpoints.save(checkpoint, parts)
            click.echo(f"epoch {loader.epoch}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
