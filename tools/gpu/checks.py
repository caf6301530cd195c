"""Is what a GPU computes what the CPU computes? Each check has what was found and what was wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.augment import CROP_PX, Augmentation
from pipeline.loader import Batch, train_loader
from prep.store.manifest import Store
from tools.gpu.machine import Plan
from train.config.recipes import PAPER
from train.model.alexnet import AlexNet
from train.model.lrn import local_response_norm
from train.model.precision import autocast, set_precision
from train.optim.paper_sgd import make_optimizer
from train.trainer.step import TrainingStep

# Grey levels. nvJPEG and libjpeg-turbo may round the cosine transform apart by one or two, and enlarge chroma by other
# filters, which at coloured edges is more; a window, a flip, a mean or a noise gone wrong is 3 or more on average.
JPEG_MEAN, JPEG_MAX = 1.0, 64.0
PPM_MAX = 4 * 2.0**-15  # four times the distance of float32 numbers above 256

# ‖found − wanted‖ / ‖wanted‖, wanted being float64 on the CPU: of the logits, and of the worst parameter's gradient. A
# maximum or a ReLU that falls to the other side by rounding sends a gradient elsewhere, hence the wide second column.
# Measured on a CPU, with 4 photographs and the paper's widths: 9e-7 and 1e-6 in fp32, 5e-3 and 0.2 in bf16.
TOLERANCES = {"fp32": (1e-4, 1e-2), "tf32": (1e-2, 0.3), "bf16": (5e-2, 0.6)}
LRN_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
SAME_RUN = 1e-2  # two runs of three steps on a GPU, whose sums of gradients come in any order


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    found: str
    wanted: str


def all_checks(plan: Plan) -> Iterator[Check]:
    """Every check, as it is done. One that raises has failed; the others go on."""
    parts: dict[str, Callable[[], Iterator[Check]]] = {}
    for format, store in plan.stores().items():
        parts[f"stream of {format} records"] = lambda store=store, format=format: stream_checks(plan, store, format)
    parts["network"] = lambda: network_checks(plan)
    parts["local response normalisation"] = lambda: lrn_checks(plan)
    parts["two runs"] = lambda: repeat_checks(plan)
    if plan.on_gpu:
        parts["a step waits for no GPU"] = lambda: waiting_checks(plan)
    for name, part in parts.items():
        try:
            yield from part()
        except Exception as error:  # of a driver, a library, a kernel: the report says which, and what else is well
            yield Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0][:300], "no error")


# ---- the stream


def served(
    store: Path, device: str, batch: int, steps: int, layout: str, mean: str, state: Mapping[str, Any] | None = None
) -> tuple[list[Batch], dict[str, Any]]:
    """Batches of the training stream, copied to the CPU, and the state after them."""
    how = Augmentation(mean=mean)
    with train_loader(store, batch, device, seed=2012, augmentation=how, layout=layout) as loader:
        if state is not None:
            loader.load_state_dict(state)
        taken: list[Batch] = []
        while len(taken) < steps:
            for images, labels in loader:
                taken.append(Batch(images.cpu().clone(), labels.cpu().clone()))
                if len(taken) == steps:
                    break
        return taken, loader.state_dict()


def stream_checks(plan: Plan, store: Path, format: str) -> Iterator[Check]:
    """The same records with the same draws on device and CPU; a state continued, to the bit."""
    device, batch = plan.devices[0], min(plan.compared, Store.open(store).split("train").records)
    for layout, mean in (("NCHW", "channel"), ("NHWC", "channel"), ("NCHW", "image"), ("NCHW", "aligned")):
        wanted, _ = served(store, "cpu", batch, 2, layout, mean)
        found, _ = served(store, device, batch, 2, layout, mean)
        apart = torch.stack([(a.images - b.images).abs() for a, b in zip(found, wanted, strict=True)])
        most, average = float(apart.max()), float(apart.mean())
        labels = all(torch.equal(a.labels, b.labels) for a, b in zip(found, wanted, strict=True))
        jpeg = format == "jpeg"
        ok = labels and (average <= JPEG_MEAN and most <= JPEG_MAX if jpeg else most <= PPM_MAX)
        yield Check(
            f"stream of {format} records, {layout}, mean {mean}: {device} against cpu",
            ok,
            f"apart by {average:.3g} grey levels on average, {most:.3g} at most; labels {_same(labels)}",
            f"{JPEG_MEAN} on average, {JPEG_MAX} at most" if jpeg else f"{PPM_MAX:.3g} at most",
        )
    _, state = served(store, device, batch, 1, "NCHW", "channel")
    whole, _ = served(store, device, batch, 3, "NCHW", "channel")
    resumed, _ = served(store, device, batch, 2, "NCHW", "channel", state)
    same = [torch.equal(a.images, b.images) for a, b in zip(whole[1:], resumed, strict=True)]
    yield Check(
        f"stream of {format} records continued from a state on {device}",
        all(same),
        f"{sum(same)} of {len(same)} batches equal to the bit",
        f"{len(same)}",
    )


# ---- the network


def network(plan: Plan, classes: int, devices: tuple[str, str]) -> AlexNet:
    """The paper's, with the same parameters wherever it is, but initialized after He: from the paper's own values the
    gradients are so small beside what they are sums of that those of float32 and float64 can part by a tenth.
    """
    torch.manual_seed(0)
    return AlexNet(classes, replace(PAPER, init="he"), devices, plan.model)


def outcome(model: AlexNet, images: Tensor, labels: Tensor, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of the loss, float64 on the CPU; without dropout, whose draws differ between devices."""
    set_precision(precision, model.devices)
    model.eval().zero_grad()
    with autocast(precision, model.devices[0]):
        logits = model(images)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        loss = F.cross_entropy(logits, labels.to(logits.device))
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    gradients = model.joined_tensors(lambda p: p.grad if p.grad is not None else torch.zeros_like(p))
    return logits.detach().double().cpu(), {name: gradient.double() for name, gradient in gradients.items()}


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())


def network_checks(plan: Plan) -> Iterator[Check]:
    """Logits and gradients against float64 on the CPU, in each precision; on two GPUs, where the plan has two."""
    store = Store.open(plan.store)
    classes, images = len(store.classes), max(2, plan.compared // 8)
    (batch,), _ = served(plan.store, "cpu", images, 1, "NCHW", "channel")
    reference = network(plan, classes, ("cpu", "cpu")).double()
    wanted = outcome(reference, batch.images.double(), batch.labels, "fp32")
    one = (plan.devices[0],) * 2
    for devices in dict.fromkeys((one, plan.devices)):
        model = network(plan, classes, devices)
        where = devices[0] if devices[0] == devices[1] else f"{devices[0]} and {devices[1]}"
        for precision in plan.precisions:
            logits, gradients = outcome(model, batch.images.to(devices[0]), batch.labels, precision)
            apart = {name: relative(gradient, wanted[1][name]) for name, gradient in gradients.items()}
            worst = max(apart, key=lambda name: apart[name] if apart[name] == apart[name] else float("inf"))
            found, limits = (relative(logits, wanted[0]), apart[worst]), TOLERANCES[precision]
            yield Check(
                f"network in {precision} on {where} against float64",
                found[0] <= limits[0] and found[1] <= limits[1],
                f"logits apart by {found[0]:.2g}, gradients by {found[1]:.2g} ({worst})",
                f"{limits[0]:g}, {limits[1]:g}",
            )


def lrn_checks(plan: Plan) -> Iterator[Check]:
    """Whatever train.model.lrn does on this device, against torch's own normalization in float64 on the CPU."""
    lrn, images = PAPER.lrn, 2 if plan.quick else 8
    theirs = nn.LocalResponseNorm(lrn.size, lrn.size * lrn.alpha, lrn.beta, lrn.k)  # torch divides alpha by the maps
    types = (torch.float32, torch.bfloat16) if "bf16" in plan.precisions else (torch.float32,)
    for maps, side in ((plan.model.widths.conv1 // 2, 55), (plan.model.widths.conv2 // 2, 27)):
        for dtype in types:
            draw = torch.Generator().manual_seed(maps)
            x, upstream = (scale * torch.randn(images, maps, side, side, generator=draw) for scale in (50.0, 1.0))
            x, upstream = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, upstream))
            exact = x.double().requires_grad_()
            y = theirs(exact)
            wanted = (y, *torch.autograd.grad(y, exact, upstream.double()))
            here = x.to(plan.device).requires_grad_()
            z = local_response_norm(here, **vars(lrn))
            found = (z, *torch.autograd.grad(z, here, upstream.to(plan.device, z.dtype)))
            apart = [relative(f.detach().double().cpu(), w.detach()) for f, w in zip(found, wanted, strict=True)]
            limit = LRN_TOLERANCES[dtype]
            yield Check(
                f"normalisation of {maps} maps of {side}×{side}, {str(dtype).removeprefix('torch.')}, on {plan.device}",
                max(apart) <= limit,
                f"apart by {apart[0]:.2g}, gradient by {apart[1]:.2g}",
                f"{limit:.2g}",
            )


# ---- the step


def prepared(
    plan: Plan, precision: str, devices: tuple[str, str] | None = None, batch: int | None = None
) -> tuple[TrainingStep, Tensor, Tensor]:
    """A step with a network of 1,000 classes, and a batch that lies where column 0 is. The rate is small: parameters
    stay numbers, however long it runs.
    """
    devices, batch = devices or plan.devices, batch or plan.batch
    model = network(plan, 1000, devices).train()
    optimizer = make_optimizer(model, PAPER)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    draw = torch.Generator().manual_seed(1)
    images = 60 * torch.randn(batch, 3, CROP_PX, CROP_PX, generator=draw)
    labels = torch.randint(1000, (batch,), generator=draw)
    return TrainingStep(model, optimizer, precision), images.to(devices[0]), labels.to(devices[0])


def repeat_checks(plan: Plan) -> Iterator[Check]:
    """Three steps with dropout, twice from the same seed: how far apart the velocities are, sums of gradients."""
    ends = []
    for _ in range(2):
        step, images, labels = prepared(plan, "fp32", batch=plan.compared)
        torch.manual_seed(7)
        for _ in range(3):
            step(images, labels)
        ends.append([v.flatten() for v in step.model.joined_tensors(step.optimizer.velocity).values()])
    apart, limit = relative(torch.cat(ends[0]), torch.cat(ends[1])), SAME_RUN if plan.on_gpu else 0.0
    yield Check(
        f"three steps on {plan.devices[0]} and {plan.devices[1]}, twice",
        apart <= limit,
        "equal to the bit" if apart == 0 else f"apart by {apart:.2g}",
        f"{limit:g}",
    )


def waiting_checks(plan: Plan) -> Iterator[Check]:
    """Torch raises where one of its operations makes the host wait."""
    for precision in plan.precisions:
        step, images, labels = prepared(plan, precision, batch=plan.compared)
        step(images, labels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(images, labels)
            found = "no wait"
        except RuntimeError as error:
            found = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield Check(f"a step in {precision} waits for no GPU", found == "no wait", found, "no wait")


def _same(equal: bool) -> str:
    return "equal" if equal else "different"
