"""Values that the options of `alextrain` accept. This module imports nothing, so that --help stays fast.

Options that name a recipe, an architecture or an ablation accept the names in RECIPES (train/config/recipes.py),
ARCHITECTURES (train/config/architecture.py) or ABLATIONS (train/config/ablations.py).
"""

ACTIVATIONS = ("relu", "tanh", "sigmoid")  # train/model/alexnet.py implements these activations
POOLS_PX = (2, 3)  # side of a pooling window, in px; the stride is 2
INITS = ("normal", "he")  # implemented by `initialize` in train/model/alexnet.py
SCHEDULES = ("plateau", "steps", "cosine", "polynomial")  # implemented in train/config/overrides.py
PRECISIONS = ("fp32", "tf32", "bf16")  # explained in train/model/precision.py
EXPORT_FORMATS = ("safetensors", "torchvision", "onnx")  # explained in train/convert/export.py

PREDICT_VIEWS = ("1", "10")  # 1: the centre crop; 10: the ten crops of section 4.1
EVAL_VIEWS = (*PREDICT_VIEWS, "dense")  # dense: a crop at every 32 px of the central square, in one pass

CHECKPOINTS_KEPT = 2  # default number of newest checkpoints that a run keeps, in addition to the best checkpoint
INDEX_RECORDS = 50_000  # default number of images in the nearest-neighbor index: 0.8 GB if the layer has 4096 units
REPLICA_TIMEOUT_S = 600.0  # default time in seconds for which a replica waits for another replica
