"""Train ResNet-18 with Lightning, on one device or on several.

    python -m examples.lightning_resnet store checkpoints

If the program is interrupted, the same command resumes the training from the newest checkpoint, with the next batch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from examples.networks import resnet18
from pipeline import Augmentation, Batch, EvalLoader, TrainLoader, eval_loader, train_loader
from prep.store.manifest import Store


class Stream(LightningDataModule):
    """The loaders of a store. Each process makes its own loaders. Checkpoints hold the state of the training loader.

    This class restores the state of the training loader, because Lightning itself does so only from a checkpoint that
    was saved within an epoch (FitLoop.restarting).
    """

    def __init__(self, store: str, batch_size: int, size_px: int) -> None:
        super().__init__()
        self.store, self.batch_size = store, batch_size
        self.augmentation = replace(Augmentation.preset("resnet"), size_px=size_px)
        self.state: dict[str, Any] | None = None  # training loader's state from a checkpoint; None: no checkpoint

    def train_dataloader(self) -> TrainLoader:
        self.loader = train_loader(self.store, self.batch_size, **self.options())
        if self.state is not None:
            self.loader.load_state_dict(self.state)
        return self.loader

    def val_dataloader(self) -> EvalLoader:
        return eval_loader(self.store, self.batch_size, **self.options())

    def options(self) -> dict[str, Any]:
        """Return the arguments of both loaders. The loaders serve tensors on the device of this process."""
        trainer = self.trainer
        assert trainer is not None  # Trainer.fit sets the attribute
        ranks = {"shard": trainer.global_rank, "world_size": trainer.world_size}
        return {"device": trainer.strategy.root_device, "augmentation": self.augmentation, **ranks}

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Classifier(LightningModule):
    """A network with its loss, accuracy, optimizer and schedule."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Batch, number: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch.images), batch.labels)

    def validation_step(self, batch: Batch, number: int) -> None:
        correct = (self.net(batch.images).argmax(1) == batch.labels).float().mean()
        self.log("top_1", correct, batch_size=len(batch.labels), sync_dist=True, prog_bar=True)  # mean over all images

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@click.command(context_settings={"show_default": True})
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--epochs", default=90, help="Number of epochs.")
@click.option("--batches", type=int, help="Number of training batches in an epoch of Lightning; all by default.")
@click.option("--batch-size", default=256, help="Number of images in a batch of each process.")
@click.option("--size-px", default=224, help="Side of the images in px.")
@click.option("--width", default=64, help="Number of channels in the first stage of the network.")
@click.option("--save-every", default=1000, help="Number of steps between two checkpoints.")
def main(
    store: str,
    folder: Path,
    epochs: int,
    batches: int | None,
    batch_size: int,
    size_px: int,
    width: int,
    save_every: int,
) -> None:
    """Train ResNet-18 on STORE, or resume from the newest checkpoint in FOLDER."""
    torch.manual_seed(0)
    model = Classifier(resnet18(len(Store.open(store).classes), width), 0.1 * batch_size / 256)
    newest = ModelCheckpoint(folder, "{step:08d}", every_n_train_steps=save_every)
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=batches,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        use_distributed_sampler=False,  # `shard` already divides the records among the loaders
        callbacks=[newest],
        logger=False,
    )
    saved = sorted(folder.glob("*.ckpt"))
    trainer.fit(model, Stream(store, batch_size, size_px), ckpt_path=saved[-1] if saved else None)


if __name__ == "__main__":
    main()
