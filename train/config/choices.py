"""Choices that the options of `alextrain` offer, each list in one place. Imports nothing, so that --help stays fast.

Choices that stand for an object are the keys of its table: RECIPES (train/config/recipes.py), ARCHITECTURES
(train/config/architecture.py), ABLATIONS (train/config/ablations.py).
"""

ACTIVATIONS = ("relu", "tanh", "sigmoid")  # the functions: train/model/alexnet.py
POOLS_PX = (2, 3)  # side of a pooling window; its stride is 2
INITS = ("normal", "he")  # the distributions: train/model/alexnet.py, initialize
SCHEDULES = ("plateau", "steps", "cosine")  # the schedules: train/config/overrides.py
PRECISIONS = ("fp32", "tf32", "bf16")  # what they mean: train/model/precision.py
EXPORT_FORMATS = ("safetensors", "torchvision", "onnx")  # what is in them: train/convert/export.py

PREDICT_VIEWS = ("1", "10")  # the centre crop; the ten crops of section 4.1
EVAL_VIEWS = (*PREDICT_VIEWS, "dense")  # dense: a crop every 32 px of the whole square, in one pass

CHECKPOINTS_KEPT = 2  # default number of newest checkpoints in a run folder, beside the best
INDEX_RECORDS = 50_000  # default number of training images in the index of nearest neighbors: 0.8 GB of 4096 units
