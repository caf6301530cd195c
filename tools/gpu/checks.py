"""Correctness checks of tools.gpu_check, for the stream, the network, LRN and the training step on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.augment import CROP_PX, Augmentation
from pipeline.loader import Batch, train_loader
from prep.store.manifest import Store
from tools.gpu.settings import Check, GpuCheckSettings
from train.config.recipes import PAPER
from train.model.alexnet import AlexNet
from train.model.lrn import local_response_norm
from train.model.precision import autocast, set_precision
from train.monitor.step_counters import StepCounters
from train.optim.paper_sgd import make_optimizer
from train.trainer.step import TrainingStep
from train.trainer.step_graph import CountedStep, graph_for

# Tolerances in grey levels. The cosine transforms of nvJPEG and libjpeg-turbo may round differently, by one or two
# levels. nvJPEG and libjpeg-turbo also upsample chroma with different filters, which gives larger differences at
# coloured edges. On an H200 the difference was 0.004 on average and 3 at most. A wrong crop, flip, mean or noise gives
# a mean difference of 3 levels or more.
JPEG_MEAN, JPEG_MAX = 0.05, 8.0
PPM_MAX = 4 * 2.0**-15  # four times the distance between neighbouring float32 numbers above 256

# Settings of the checks of windows. A window is the part of a record that becomes an image. With these settings, images
# are whole grey levels, so PPM records must give equal bits. For JPEG records, each setting has two limits in grey
# levels: one for the average difference and one for the largest difference. DALI's filter has other weights than
# Pillow's filter, and jitter enlarges differences. DALI on a CPU differed from the CPU stream by 0.13 on average. The
# largest difference was 1 level without effects and 8 levels with effects.
# The limits leave room for the chroma of nvJPEG.
WINDOWS = {
    "resized windows": (Augmentation("none", "off", window="resized"), (0.6, 16.0)),
    "windows with effects": (replace(Augmentation.preset("simclr"), divisor=1.0, erase=0.5), (0.6, 80.0)),
}

# Limits of the relative error ‖found − wanted‖ / ‖wanted‖: (limit for the logits, limit for the gradient of the
# parameter with the largest error). `wanted` is computed in float64 on the CPU. The limit for gradients is wide, since
# rounding can change the sign of a ReLU's input or the position of a maximum. The gradient then takes another path
# through the network. Errors of the logits on an H200: fp32 1e-6, tf32 7e-4, bf16 6e-3. Errors (logits, gradient) on a
# CPU, with 4 photographs and the paper's widths: fp32 9e-7, 1e-6; bf16 5e-3, 0.2.
TOLERANCES = {"fp32": (1e-5, 5e-3), "tf32": (3e-3, 0.2), "bf16": (2e-2, 0.4)}
LRN_TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}  # the errors on an H200 were 8e-8 and 1.7e-3
# Limit of the relative difference between two runs of three steps. On a GPU, the order of additions in gradients
# varies. The difference on an H200 was 8e-7.
REPEAT_TOLERANCE = 1e-5
STEPS_BEFORE_REPLAY = 5  # number of steps after which a CountedStep replays its CUDA graph
_MOST_STEPS = 10**6  # largest number of steps that the counters can hold; the checks never read the counters


# ---- the stream


def read_batches(
    store: Path,
    device: str,
    batch: int,
    count: int,
    layout: str,
    augmentation: Augmentation,
    state: Mapping[str, Any] | None = None,
) -> tuple[list[Batch], dict[str, Any]]:
    """Return `count` batches of the training stream as CPU tensors, and the state of the stream after these batches.

    The batches are the first batches of the stream, or the first batches after `state`.
    """
    with train_loader(store, batch, device, seed=2012, augmentation=augmentation, layout=layout) as loader:
        if state is not None:
            loader.load_state_dict(state)
        batches: list[Batch] = []
        while len(batches) < count:
            for images, labels in loader:
                batches.append(Batch(images.cpu().clone(), labels.cpu().clone()))
                if len(batches) == count:
                    break
        return batches, loader.state_dict()


def images_of_a_batch(settings: GpuCheckSettings, store: Path) -> int:
    """Return the number of images in a batch of the stream checks."""
    return min(settings.compared_images, Store.open(store).split("train").records)


def compare_with_cpu(
    settings: GpuCheckSettings,
    store: Path,
    name: str,
    layout: str,
    augmentation: Augmentation,
    limits: tuple[float, float],
) -> Check:
    """Compare two batches made on the device with two batches made on the CPU from the same records.

    `limits` are the limits of the average difference and of the largest difference, in grey levels.
    """
    device, batch = settings.devices[0], images_of_a_batch(settings, store)
    wanted, _ = read_batches(store, "cpu", batch, 2, layout, augmentation)
    found, _ = read_batches(store, device, batch, 2, layout, augmentation)
    differences = torch.stack([(a.images - b.images).abs() for a, b in zip(found, wanted, strict=True)])
    largest, average = float(differences.max()), float(differences.mean())
    same_labels = all(torch.equal(a.labels, b.labels) for a, b in zip(found, wanted, strict=True))
    return Check(
        f"{name}: {device} against cpu",
        same_labels and average <= limits[0] and largest <= limits[1],
        f"grey levels differ by {average:.3g} on average, {largest:.3g} at most; "
        f"labels are {'equal' if same_labels else 'different'}",
        f"{limits[0]:.3g} on average, {limits[1]:.3g} at most",
    )


def stream_checks(settings: GpuCheckSettings, store: Path, format: str) -> Iterator[Check]:
    """Compare batches made on the device with batches made on the CPU from the same records. Also check resuming."""
    device, batch = settings.devices[0], images_of_a_batch(settings, store)
    for layout, mean in (("NCHW", "channel"), ("NHWC", "channel"), ("NCHW", "image"), ("NCHW", "aligned")):
        name = f"stream of {format} records, {layout}, mean {mean}"
        limits = (JPEG_MEAN, JPEG_MAX) if format == "jpeg" else (PPM_MAX, PPM_MAX)
        yield compare_with_cpu(settings, store, name, layout, Augmentation(mean=mean), limits)
    _, state = read_batches(store, device, batch, 1, "NCHW", Augmentation())
    uninterrupted, _ = read_batches(store, device, batch, 3, "NCHW", Augmentation())
    resumed, _ = read_batches(store, device, batch, 2, "NCHW", Augmentation(), state)
    same = [torch.equal(a.images, b.images) for a, b in zip(uninterrupted[1:], resumed, strict=True)]
    yield Check(
        f"stream of {format} records resumed from a state on {device}",
        all(same),
        f"{sum(same)} of {len(same)} batches are bit-identical",
        f"{len(same)} of {len(same)}",
    )


def window_checks(settings: GpuCheckSettings, store: Path, format: str) -> Iterator[Check]:
    """Compare windows that the device resizes with windows that the CPU resizes, both with and without effects."""
    for (name, (augmentation, jpeg_limits)), layout in product(WINDOWS.items(), ("NCHW", "NHWC")):
        limits = jpeg_limits if format == "jpeg" else (0.0, 0.0)
        yield compare_with_cpu(settings, store, f"{name} of {format} records, {layout}", layout, augmentation, limits)


# ---- the network


def make_network(settings: GpuCheckSettings, classes: int, devices: tuple[str, str]) -> AlexNet:
    """Return the network with the initialization of He et al., and with the same parameters on every device.

    The paper's initialization is not used. With the paper's initialization, each gradient is a sum of much larger
    terms, and the gradients in float32 and float64 differ by up to 10%.
    """
    torch.manual_seed(0)
    return AlexNet(classes, replace(PAPER, init="he"), devices, settings.architecture)


def logits_and_gradients(
    model: AlexNet, images: Tensor, labels: Tensor, precision: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits, and the gradient of the loss for each parameter, as float64 on the CPU.

    Dropout is off, because its random numbers differ between devices.
    """
    set_precision(precision, model.devices)
    model.eval().zero_grad()
    with autocast(precision, model.devices[0]):
        logits = model(images)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        loss = F.cross_entropy(logits, labels.to(logits.device))
    loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
    gradients = model.joined_tensors(lambda p: p.grad if p.grad is not None else torch.zeros_like(p))
    return logits.detach().double().cpu(), {name: gradient.double() for name, gradient in gradients.items()}


def relative_distance(found: Tensor, wanted: Tensor) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())


def network_checks(settings: GpuCheckSettings) -> Iterator[Check]:
    """Compare logits and gradients in each precision with logits and gradients in float64 on the CPU.

    Both columns of the network run on the first device. If the settings name two devices, the check is repeated with
    one column on each device.
    """
    store = Store.open(settings.store)
    classes, images = len(store.classes), max(2, settings.compared_images // 8)
    (batch,), _ = read_batches(settings.store, "cpu", images, 1, "NCHW", Augmentation())
    reference = make_network(settings, classes, ("cpu", "cpu")).double()
    wanted_logits, wanted_gradients = logits_and_gradients(reference, batch.images.double(), batch.labels, "fp32")
    one_device = (settings.devices[0],) * 2
    for devices in dict.fromkeys((one_device, settings.devices)):
        model = make_network(settings, classes, devices)
        for precision in settings.precisions:
            logits, gradients = logits_and_gradients(model, batch.images.to(devices[0]), batch.labels, precision)
            distances = {name: relative_distance(value, wanted_gradients[name]) for name, value in gradients.items()}
            worst = max(distances, key=lambda name: _nan_as_inf(distances[name]))
            distance, limits = relative_distance(logits, wanted_logits), TOLERANCES[precision]
            yield Check(
                f"network in {precision} on {_device_names(devices)} against float64",
                distance <= limits[0] and distances[worst] <= limits[1],
                f"logits differ by {distance:.2g}, gradients by {distances[worst]:.2g} ({worst})",
                f"{limits[0]:g}, {limits[1]:g}",
            )


def _device_names(devices: tuple[str, str]) -> str:
    return " and ".join(dict.fromkeys(devices))


def _nan_as_inf(distance: float) -> float:
    return distance if distance == distance else float("inf")


def lrn_checks(settings: GpuCheckSettings) -> Iterator[Check]:
    """Compare this device's implementation of LRN (train.model.lrn) with torch's LRN in float64 on the CPU."""
    lrn, images = PAPER.lrn, 2 if settings.quick else 8
    assert lrn is not None
    # Torch divides alpha by size, so alpha is multiplied by size.
    torch_lrn = nn.LocalResponseNorm(lrn.size, lrn.size * lrn.alpha, lrn.beta, lrn.k)
    dtypes = (torch.float32, torch.bfloat16) if "bf16" in settings.precisions else (torch.float32,)
    widths = settings.architecture.widths
    for maps, side_px in ((widths.conv1 // 2, 55), (widths.conv2 // 2, 27)):
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(maps)
            shape = (images, maps, side_px, side_px)
            x, upstream = (scale * torch.randn(shape, generator=generator) for scale in (50.0, 1.0))
            x, upstream = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, upstream))
            exact_x = x.double().requires_grad_()
            exact_y = torch_lrn(exact_x)
            wanted = (exact_y, *torch.autograd.grad(exact_y, exact_x, upstream.double()))
            device_x = x.to(settings.device).requires_grad_()
            y = local_response_norm(device_x, **vars(lrn))
            found = (y, *torch.autograd.grad(y, device_x, upstream.to(settings.device, y.dtype)))
            distances = [
                relative_distance(f.detach().double().cpu(), w.detach()) for f, w in zip(found, wanted, strict=True)
            ]
            limit = LRN_TOLERANCES[dtype]
            type_name = str(dtype).removeprefix("torch.")
            yield Check(
                f"normalization of {maps} maps of {side_px}×{side_px}, {type_name}, on {settings.device}",
                max(distances) <= limit,
                f"outputs differ by {distances[0]:.2g}, gradients by {distances[1]:.2g}",
                f"{limit:.2g}",
            )


# ---- the training step


def make_step(
    settings: GpuCheckSettings, precision: str, devices: tuple[str, str] | None = None, batch: int | None = None
) -> tuple[TrainingStep, Tensor, Tensor]:
    """Return a training step with a network of 1,000 classes, and random images and labels on the device of column 0.

    The learning rate is so small that the parameters stay finite, however many steps are made.
    """
    devices, batch = devices or settings.devices, batch or settings.batch
    model = make_network(settings, 1000, devices).train()
    optimizer = make_optimizer(model, PAPER)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    generator = torch.Generator().manual_seed(1)
    images = 60 * torch.randn(batch, 3, CROP_PX, CROP_PX, generator=generator)
    labels = torch.randint(1000, (batch,), generator=generator)
    return TrainingStep(model, optimizer, precision), images.to(devices[0]), labels.to(devices[0])


def make_counted_step(
    settings: GpuCheckSettings, precision: str, devices: tuple[str, str] | None = None, batch: int | None = None
) -> tuple[CountedStep, Tensor, Tensor]:
    """Return a step as `alextrain run` makes it, with counters, and the images and labels of make_step.

    On one GPU, the step has a CUDA graph.
    """
    step, images, labels = make_step(settings, precision, devices, batch)
    device = step.network.devices[0]
    return CountedStep(step, StepCounters(device, _MOST_STEPS), graph_for(step.network.devices)), images, labels


def repeat_checks(settings: GpuCheckSettings) -> Iterator[Check]:
    """Compare the velocities (sums of gradients) of two runs of three steps, with dropout and the same seed."""
    velocities = []
    for _ in range(2):
        step, images, labels = make_step(settings, "fp32", batch=settings.compared_images)
        torch.manual_seed(7)
        for _ in range(3):
            step(images, labels)
        velocities.append([v.flatten() for v in step.network.joined_tensors(step.optimizer.velocity).values()])
    distance = relative_distance(torch.cat(velocities[0]), torch.cat(velocities[1]))
    limit = REPEAT_TOLERANCE if settings.on_gpu else 0.0
    yield Check(
        f"three steps run twice on {_device_names(settings.devices)}",
        distance <= limit,
        "bit-identical" if distance == 0 else f"velocities differ by {distance:.2g}",
        f"{limit:g}",
    )


def synchronization_checks(settings: GpuCheckSettings) -> Iterator[Check]:
    """Check that a step never makes the host wait for the GPU. During the check, torch raises an error for a wait."""
    for precision in settings.precisions:
        batch = settings.compared_images
        steps: dict[str, tuple[Callable[..., object], Tensor, Tensor]] = {
            f"a {precision} step": make_step(settings, precision, batch=batch),
            f"a {precision} step of `alextrain run`": make_counted_step(settings, precision, batch=batch),
        }
        for name, (step, images, labels) in steps.items():
            for _ in range(STEPS_BEFORE_REPLAY):
                step(images, labels)
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(images, labels)
                found = "none"
            except RuntimeError as error:
                found = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            yield Check(f"synchronization with the GPU in {name}", found == "none", found, "none")
