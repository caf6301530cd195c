"""Streams with effects: images of every engine, ranks, states and views."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augment import Augmentation, Augmenter, Crops
from pipeline.device import Placement
from pipeline.effects.batch import apply_effects, effect_steps
from pipeline.effects.parameters import effect_parameters
from pipeline.engines import kernels
from pipeline.engines.cpu_engine import CpuEngine
from pipeline.engines.dali_engine import OutputFormat, build_pipeline
from pipeline.engines.dali_window_engine import DaliWindowEngine
from pipeline.engines.raw_gpu_engine import RawGpuEngine
from pipeline.loader import TrainLoader, eval_loader, train_loader
from pipeline.records import RecordBatch, Records
from pipeline.sampling import draw_effects, draw_params, draw_step
from prep.console import UserError
from prep.store.manifest import Store
from tests.pipeline.augment_formula import formula_shift
from tests.pipeline.engines.deferred_stream import DeferredStream
from tests.pipeline.streaming import batches_equal, concatenate_ranks, needs_kernel, take_batches

EFFECTS: dict[str, Any] = {
    "jitter": (0.8, 0.8, 0.8, 0.2),
    "jitter_share": 0.8,
    "grey": 0.2,
    "blur": 0.5,
    "blur_sigma": (0.5, 2.0),
    "erase": 0.5,
}
SIZE_PX, SEED = 96, 5
SETTINGS = Augmentation(size_px=SIZE_PX, mean="channel", divisor=2.0, **EFFECTS)


def loader(path: Path, settings: Augmentation = SETTINGS, batch_size: int = 8, **options: Any) -> TrainLoader:
    return train_loader(path, batch_size, seed=SEED, augmentation=settings, threads=2, **options)


def batch_of(path: Path, settings: Augmentation, count: int) -> tuple[Augmenter, tuple[RecordBatch, Crops]]:
    store = Store.open(path)
    augmenter, records = Augmenter(store, settings), Records(store, "train").batch(np.arange(count))
    draws = draw_step(settings, SEED, 0, 0, count, augmenter.max_offset_px)
    return augmenter, (records, augmenter.random_crops(records, *draws))


@pytest.mark.parametrize("window", ["random", "resized"])
@pytest.mark.parametrize("kind", ["jpeg", "ppm"])
def test_images_are_windows_with_effects_flip_colour_mean_and_erase_in_this_order(
    stores: dict[str, Path], kind: str, window: str
) -> None:
    settings, store = replace(SETTINGS, window=window), Store.open(stores[kind])
    plain = Augmentation(size_px=SIZE_PX, window=window, mean="none", colour="off", flip=0.0)
    with loader(stores[kind], plain) as windows, loader(stores[kind], settings) as images:
        for step, (before, after) in enumerate(zip(take_batches(windows, 2), take_batches(images, 2), strict=True)):
            pixels = before.images.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
            effects = effect_parameters(draw_effects(SEED, 0, step, 8), settings, SIZE_PX)
            apply_effects(pixels, effect_steps(effects, lambda values: values))
            draws = draw_params(SEED, 0, step, 8, store.settings.side_px - SIZE_PX)
            for k, image in enumerate(pixels.numpy()):
                expected = image[:, :: -1 if draws.flip[k] else 1].astype(np.float64)
                expected += formula_shift(store, settings, draws.normal[k]) - store.color_stats().mean_rgb
                top, left, height, width = effects.box[k]
                expected[top : top + height, left : left + width] = 0
                assert np.allclose(after.images[k].permute(1, 2, 0), expected / 2, atol=1e-4)
            assert effects.change_pixels and effects.box.any()


@needs_kernel
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_raw_records_on_a_gpu_have_the_bits_of_the_c_kernel(stores: dict[str, Path], layout: str) -> None:
    assert kernels.native is not None
    augmenter, batch = batch_of(stores["ppm"], SETTINGS, 9)
    output = OutputFormat(1, layout, 2.0, torch.float16, SIZE_PX, has_effects=True)
    stream = DeferredStream()
    on_gpu = RawGpuEngine(augmenter, stream, output, threads=2)
    on_cpu = CpuEngine(augmenter, kernels.native, output, threads=2)
    images = on_gpu.finish(on_gpu.start(*batch), *batch)
    assert images.isnan().all()
    stream.record().order(images)
    assert torch.equal(images, on_cpu.finish(on_cpu.start(*batch), *batch))
    on_gpu.close()
    on_cpu.close()


def test_jpeg_records_on_a_gpu_get_their_effects_after_dali(stores: dict[str, Path]) -> None:
    """DALI runs on the CPU, and a DeferredStream replaces the GPU. The expected windows also come from DALI."""
    augmenter, (records, crops) = batch_of(stores["jpeg"], replace(SETTINGS, window="resized"), 6)
    placement, stream = Placement.parse("cpu"), DeferredStream()
    output = OutputFormat(1, "NHWC", 2.0, torch.float32, SIZE_PX, is_resized=True, has_effects=True)
    engine = DaliWindowEngine(augmenter, placement, output, stream)
    pipe = build_pipeline(engine.define_graph, 6, placement, 1)
    for name, values in engine.graph_inputs(records, crops).items():
        pipe.feed_input(name, values)
    outputs = pipe.run()
    images = engine.finish(outputs, records, crops)
    assert images.isnan().all()
    stream.record().order(images)
    windows, effects = placement.tensor_from_dali(outputs[0]).clone(), crops.effects
    assert effects is not None
    apply_effects(windows, effect_steps(effects, lambda values: values))
    for image, pixels, flip, shift, (top, left, height, width) in zip(
        images, windows, crops.flip[:, 0], crops.shift, effects.box, strict=True
    ):
        expected = (pixels.numpy()[:, :: -1 if flip else 1] + shift) * np.float32(0.5)
        expected[top : top + height, left : left + width] = 0
        assert np.array_equal(image, expected)


def test_without_the_c_kernel_the_images_have_the_same_bits(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with loader(stores["jpeg"]) as first:
        expected = take_batches(first, 1)
    monkeypatch.setattr(kernels, "native", None)
    with loader(stores["jpeg"]) as second:
        assert batches_equal(take_batches(second, 1), expected)


def test_ranks_together_serve_the_images_of_one_loader(stores: dict[str, Path]) -> None:
    with loader(stores["ppm"]) as one:
        expected = take_batches(one, 2)
    ranks = []
    for shard in range(2):
        with loader(stores["ppm"], batch_size=4, shard=shard, world_size=2) as rank:
            ranks.append(take_batches(rank, 2))
    assert batches_equal(concatenate_ranks(ranks), expected)


def test_a_state_keeps_the_settings_of_the_effects_and_resumes(stores: dict[str, Path]) -> None:
    with loader(stores["ppm"]) as first:
        take_batches(first, 1)
        state = json.loads(json.dumps(first.state_dict()))
        expected = take_batches(first, 2)
    assert {name: state["augmentation"][name] for name in EFFECTS} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in EFFECTS.items()
    }
    with loader(stores["ppm"]) as second:
        second.load_state_dict(state)
        assert batches_equal(take_batches(second, 2), expected)
    with loader(stores["ppm"], replace(SETTINGS, grey=0.3)) as third, pytest.raises(UserError, match="augmentation"):
        third.load_state_dict(state)


def test_each_view_of_a_record_has_its_own_effects(stores: dict[str, Path]) -> None:
    """View v of image n in a batch of two views has the parameters of image 2n + v in a batch of one view."""
    settings = replace(SETTINGS, colour="off", mean="none", divisor=1.0, flip=0.0, erase=0.0)
    plain = Augmentation(size_px=SIZE_PX, mean="none", colour="off", flip=0.0)
    with (
        loader(stores["ppm"], plain, 4, views=2) as windows,
        loader(stores["ppm"], settings, 4, views=2) as images,
    ):
        pixels = take_batches(windows, 1)[0].images.flatten(0, 1).permute(0, 2, 3, 1).to(torch.uint8).contiguous()
        effects = effect_parameters(draw_effects(SEED, 0, 0, 8), settings, SIZE_PX)
        apply_effects(pixels, effect_steps(effects, lambda values: values))
        assert torch.equal(take_batches(images, 1)[0].images.flatten(0, 1).permute(0, 2, 3, 1), pixels.float())


def test_evaluation_images_have_no_effects(stores: dict[str, Path]) -> None:
    plain = Augmentation(size_px=SIZE_PX, mean="channel", divisor=2.0)
    with (
        eval_loader(stores["ppm"], 8, augmentation=SETTINGS) as with_settings,
        eval_loader(stores["ppm"], 8, augmentation=plain) as without,
    ):
        assert batches_equal(list(with_settings), list(without))
