"""Recipes that `--recipe` offers: the value and the source of every hyperparameter.

paper     the values that the text of the paper gives
released  the values in the code and parameter files that gave the paper's results: net #145 of AlexNet-Source-Code
          (layers/layers-145.cfg and layers/layer-params-145.cfg, cited below as L145 and P145). If the paper has
          another value, the entry in `sources` mentions the paper's value.
caffe     the values of models/bvlc_alexnet in BVLC's Caffe (train_val.prototxt, solver.prototxt, readme.md)
modern    the same network with present-day initialization and schedule
short     settings for a training that takes a few minutes on a CPU, with small batches
large     batches of 1,024 to 8,192 images, with LARS; not yet tried on ImageNet by this project
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prep.console import WrongArgument, did_you_mean
from train.config.architecture import LAYERS
from train.config.recipe import AlexNetAugmentation, Cosine, Lrn, Plateau, Polynomial, Recipe, ScheduleChange

_BIASED = ("conv2", "conv4", "conv5", "fc6", "fc7")  # layers whose biases do not start at 0


def _recipe(name: str, **hyperparameters: tuple[Any, str]) -> Recipe:
    """Return a recipe. Each keyword argument gives the (value, source) of one field."""
    return Recipe(
        name=name,
        sources={field: source for field, (_, source) in hyperparameters.items()},
        **{field: value for field, (value, _) in hyperparameters.items()},
    )


def _variant(base: Recipe, name: str, **hyperparameters: tuple[Any, str]) -> Recipe:
    """Return a copy of `base` with a new (value, source) for some fields."""
    sources = {field: source for field, (_, source) in hyperparameters.items()}
    values = {field: value for field, (value, _) in hyperparameters.items()}
    return replace(base, name=name, sources={**base.sources, **sources}, **values)


PAPER = _recipe(
    "paper",
    batch_size=(128, "section 5"),
    epochs=(90, "section 5: 'roughly 90 cycles'"),
    input_divisor=(1.0, "section 2: raw RGB values, only the mean subtracted"),
    augmentation=(
        AlexNetAugmentation(mean="image", colour="eigenvalue", strength=0.1),
        "section 2: the mean image, here its centre crop, as in the authors' code; section 4.1: random crop and flip "
        "for each image, and colour noise: eigenvalues times N(0, 0.1). The eigenvalues are those of "
        "pixels in [0, 1], because with pixels in 0..255 the shift would exceed a thousand grey levels",
    ),
    activation=("relu", "section 3.1"),
    lrn=(Lrn(5, 1e-4, 0.75, 2.0), "section 3.3: k = 2, n = 5, α = 1e-4, β = 0.75"),
    norm_before_relu=(False, "section 3.3: 'after applying the ReLU nonlinearity'"),
    within_map=(None, "not in the text"),
    pool_px=(3, "section 3.4: s = 2, z = 3"),
    crossing=(True, "figure 2: before conv3, fc6, fc7 and fc8"),
    dropout=(0.5, "section 4.2: the first two fully-connected layers"),
    dropout_scales_training=(False, "section 4.2: 'at test time ... multiply their outputs by 0.5'"),
    init=("normal", "section 5: zero-mean Gaussian"),
    init_std=(dict.fromkeys(LAYERS, 0.01), "section 5: 'each layer'"),
    init_bias=(
        dict.fromkeys(_BIASED, 1.0),
        "section 5: second, fourth and fifth convolutional and the fully-connected hidden layers",
    ),
    label_smoothing=(0.0, "section 3.5: the multinomial logistic regression objective"),
    lr=(0.01, "section 5"),
    lr_batch=(None, "ours: none, lr does not depend on --batch"),
    lr_bias=(None, "section 5: 'an equal learning rate for all layers'"),
    lr_bias_factor=(1.0, "section 5: 'an equal learning rate for all layers'"),
    momentum=(0.9, "section 5"),
    weight_decay=(0.0005, "section 5"),
    decay_biases=(True, "section 5 makes no exception for biases"),
    lars_trust=(None, "ours: none, because LARS was published in 2017"),
    schedule=(
        Plateau(factor=0.1, patience_epochs=5, drops=3),
        "section 5: divided by 10 when the validation error stopped improving, three times; ours: the patience",
    ),
)

RELEASED = _variant(
    PAPER,
    "released",
    batch_size=(128, "convnet.py:177"),
    epochs=(91, "P145:169-182: stopped at epoch 91"),
    input_divisor=(1.0, "convdata_jpeg.py: only the mean subtracted"),
    augmentation=(
        AlexNetAugmentation(mean="image", colour="stdev", strength=0.1, divisor=1.1, shared_by=32, eval_divisor=1.0),
        "convdata_jpeg.py: centre of the mean image (line 95); in training only, noise by standard deviation and "
        "division by 1.1 (155-179); one crop for 32 images (77)",
    ),
    activation=("relu", "L145:54, 77, 227 and the others: ReLU"),
    lrn=(
        Lrn(5, 1e-4 / 5, 0.75, 2.0),
        "P145:137-155: scale, which layer.py:1183 divides by size; the paper's α is 5 times as large",
    ),
    norm_before_relu=(
        True,
        "L145:35-63: rnorm1 on conv1's linear outputs, ReLU after pool1; the paper has ReLU first",
    ),
    within_map=(Lrn(5, 1e-3 / 25, 0.75, 1.0), "L145:107-117, P145:157-163: cnorm2; not in the paper"),
    pool_px=(3, "L145:47-63, 119-133, 220-236"),
    crossing=(True, "L145:135-161 (conv3), 238-254 (fc6), 266-282 (fc7), 294-299 (fc8)"),
    dropout=(0.5, "L145:256-292: hs, keep 0.5"),
    dropout_scales_training=(False, "layer.cu:1126-1135"),
    init=("normal", "layer.py:807"),
    init_std=(
        {**dict.fromkeys(LAYERS, 0.01), "conv3": 0.03, "conv4": 0.03, "conv5": 0.03},
        "L145: initW; the paper has 0.01 in every layer",
    ),
    init_bias=(dict.fromkeys(_BIASED, 1.0), "L145: initB"),
    label_smoothing=(0.0, "L145:294-299: softmax and logistic regression"),
    lr=(0.01, "P145:169"),
    lr_bias=(0.02, "P145: epsB, constant; the paper has one learning rate; net #145 of 2010 had 0.002"),
    lr_bias_factor=(1.0, "not used, as lr_bias is a number"),
    momentum=(0.9, "P145"),
    weight_decay=(0.0005, "P145: wc of all weights"),
    decay_biases=(False, "layer.cu:565; the paper makes no exception for biases"),
    schedule=(
        (
            ScheduleChange(25, lr=1e-3),
            ScheduleChange(51, lr=1e-4),
            ScheduleChange(67, lr_conv1=1e-5, colour="off"),
            ScheduleChange(72, lr_conv1=0.0),
            ScheduleChange(79, lr=1e-5),
        ),
        "P145:169-182; the paper has three drops of lr, for all layers",
    ),
)

CAFFE = _variant(
    PAPER,
    "caffe",
    batch_size=(256, "train_val.prototxt"),
    epochs=(90, "solver.prototxt: 450,000 batches of 256 are 89.9 epochs"),
    input_divisor=(1.0, "train_val.prototxt: only the mean subtracted"),
    augmentation=(
        AlexNetAugmentation(mean="aligned", colour="off", strength=0.0),
        "data_transformer.cpp:113: subtracts the part of the mean image at the position of the crop; random crop and "
        "flip, no colour noise. Caffe's crops are of 227 px; conv1 has 55 × 55 positions, as with our crops of 224 px",
    ),
    activation=("relu", "train_val.prototxt"),
    lrn=(
        Lrn(5, 1e-4 / 5, 0.75, 1.0),
        "train_val.prototxt; lrn_layer.cpp:120 divides alpha by size; caffe.proto:888 has k = 1. Caffe normalizes "
        "across all 96 or 256 maps of a layer, our network across the maps of a column",
    ),
    norm_before_relu=(False, "train_val.prototxt: relu1, norm1, pool1"),
    within_map=(None, "not in train_val.prototxt"),
    pool_px=(3, "train_val.prototxt: kernel 3, stride 2"),
    crossing=(True, "train_val.prototxt: group 2 in conv2, conv4 and conv5 only"),
    dropout=(0.5, "train_val.prototxt: drop6, drop7"),
    dropout_scales_training=(True, "dropout_layer.cpp"),
    init=("normal", "train_val.prototxt: gaussian"),
    init_std=(
        {**dict.fromkeys(LAYERS, 0.01), "fc6": 0.005, "fc7": 0.005},
        "train_val.prototxt; the paper has 0.01 in every layer",
    ),
    init_bias=(
        dict.fromkeys(_BIASED, 0.1),
        "train_val.prototxt; readme.md:14: with the paper's value 1 the loss did not fall",
    ),
    label_smoothing=(0.0, "train_val.prototxt: softmax loss"),
    lr=(0.01, "solver.prototxt"),
    lr_bias=(None, "train_val.prototxt: a multiple of lr"),
    lr_bias_factor=(2.0, "train_val.prototxt: lr_mult 2"),
    momentum=(0.9, "solver.prototxt"),
    weight_decay=(0.0005, "solver.prototxt"),
    decay_biases=(False, "train_val.prototxt: decay_mult 0"),
    schedule=(
        tuple(ScheduleChange(20 * drop, lr=float(f"1e-{2 + drop}")) for drop in (1, 2, 3, 4)),
        "solver.prototxt: lr divided by 10 after each 100,000 batches of 256, which are 19.98 epochs",
    ),
)

MODERN = _variant(
    PAPER,
    "modern",
    batch_size=(512, "ours: fits easily into the memory of a present-day GPU"),
    epochs=(90, "ours: as in the paper"),
    input_divisor=(64.0, "ours: pixels of about unit variance, which initialization 'he' assumes"),
    augmentation=(
        AlexNetAugmentation(mean="channel", colour="stdev", strength=0.1),
        "ours: a mean for each channel; noise as in the released code, without the division by 1.1",
    ),
    dropout_scales_training=(True, "ours: no scaling in evaluation"),
    init=("he", "He et al. 2015 (arXiv 1502.01852), eq. 10: keeps the variance of the activations from layer to layer"),
    init_std=(PAPER.init_std, "not used by initialization 'he'"),
    init_bias=({}, "He et al. 2015: all biases start at 0"),
    label_smoothing=(
        0.0,
        "ours: none, because the value 0.1 (Szegedy et al. 2016, arXiv 1512.00567, section 7) slowed learning in our "
        "measurements (docs/measurements.md)",
    ),
    lr=(
        0.04,
        "Goyal et al. 2017 (arXiv 1706.02677), section 2.1: proportional to the batch size, from the paper's 0.01 at "
        "128; the authors' code also has twice the rate at 256: 0.02 (layer-params-170-256-double.cfg)",
    ),
    decay_biases=(False, "ours: as in the released code"),
    schedule=(
        Cosine(warmup_epochs=5, start=0.1, end=0.001),
        "Goyal et al. 2017, section 2.2: warm-up over 5 epochs; Loshchilov and Hutter 2017 (arXiv 1608.03983), eq. 5: "
        "half a cosine; ours: the values of start and end",
    ),
)

SHORT = _variant(
    PAPER,
    "short",
    batch_size=(16, "ours: in a few minutes, many small steps learn more than few large steps (docs/measurements.md)"),
    epochs=(3, "ours: about four minutes on two cores for 1,500 images"),
    input_divisor=(64.0, "ours: pixels of about unit variance, which initialization 'he' assumes"),
    augmentation=(
        AlexNetAugmentation(mean="channel", colour="stdev", strength=0.1),
        "ours: a mean for each channel; noise as in the released code, without the division by 1.1",
    ),
    init=("he", "He et al. 2015 (arXiv 1502.01852), eq. 10"),
    init_std=(PAPER.init_std, "not used by initialization 'he'"),
    init_bias=({}, "He et al. 2015: all biases start at 0"),
    dropout=(0.0, "ours: none. Section 4.2: dropout 'roughly doubles the number of iterations required to converge'"),
    lr=(0.004, "ours: the paper's 0.01 at batches of 128, reduced for small batches (docs/measurements.md)"),
    decay_biases=(False, "ours: as in the released code"),
    schedule=((ScheduleChange(2, lr=0.001),), "ours: one drop of lr, for the last third of the epochs"),
)

# The published settings for AlexNet with local response normalization and LARS. The sources are You, Gitman and
# Ginsburg 2017 (arXiv 1708.03888), and models/ in borisgin/nvcaffe, Ginsburg's fork of NVIDIA's Caffe.
LARGE = _variant(
    CAFFE,
    "large",
    batch_size=(
        8192,
        "borisgin/nvcaffe, models/bvlc_alexnet/solver_8K.prototxt; ours: --batch may be 1,024 to 8,192. This project "
        "has not tried this recipe on ImageNet",
    ),
    epochs=(100, "bvlc_alexnet/solver_8K.prototxt: 15,600 batches of 8,192 are 99.7 epochs"),
    lr=(10.0, "arXiv 1708.03888; bvlc_alexnet/solver_8K.prototxt"),
    lr_batch=(
        8192,
        "Goyal et al. 2017 (arXiv 1706.02677), section 2.1: all learning rates are proportional to --batch; here lr is "
        "10 at 8,192. alexnet_bn/solver_16k.prototxt: 2 at 1,024, 10 at 8K, 24 at 16K",
    ),
    lr_bias_factor=(1.0, "bvlc_alexnet/train_val.prototxt: no lr_mult"),
    momentum=(0.9, "bvlc_alexnet/solver_8K.prototxt"),
    weight_decay=(0.0005, "bvlc_alexnet/solver_8K.prototxt"),
    decay_biases=(True, "bvlc_alexnet/train_val.prototxt: no decay_mult"),
    lars_trust=(0.001, "arXiv 1708.03888, η; bvlc_alexnet/solver.prototxt: local_gw_ratio"),
    schedule=(
        Polynomial(warmup_epochs=5, start=0.1, power=2, end=1e-6),
        "arXiv 1708.03888, algorithm 1: power 2; alexnet_bn/solver_16k.prototxt: 5 epochs of warm-up "
        "(bvlc_alexnet/solver.prototxt has 4), here from lr 1 (rampup_lr 1) to 10; ours: end, so that lr is never 0",
    ),
)

# {name of a recipe: a note for users, printed by `alextrain recipe` and `alextrain run`}
NOTES = {"large": "Recipe large is unproven on ImageNet: this project has tried it only on small data."}
RECIPES = {recipe.name: recipe for recipe in (PAPER, RELEASED, CAFFE, MODERN, SHORT, LARGE)}


def recipe_note(name: str) -> str | None:
    """Return the note for users of a recipe.

    Returns None if there is no note. `name` may also be the name of a recipe with overrides, such as `large, lr=5.0`.
    """
    return NOTES.get(name.partition(",")[0])


def recipe_named(name: str) -> Recipe:
    """Return the recipe with this name. Raises UserError for an unknown name."""
    if name not in RECIPES:
        raise WrongArgument(
            f"--recipe {name}: expected one of {', '.join(RECIPES)}.{did_you_mean(name, list(RECIPES))}"
        )
    return RECIPES[name]
