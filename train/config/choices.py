"""Values that the options of `alextrain` accept. This module imports nothing, so that --help stays fast.

Options that name a recipe, an architecture or an ablation accept the names in RECIPES (train/config/recipes.py),
ARCHITECTURES (train/config/architecture.py) or ABLATIONS (train/config/ablations.py).
"""

ACTIVATIONS = ("relu", "tanh", "sigmoid")  # train/model/alexnet.py implements these activations
POOLS_PX = (2, 3)  # side of a pooling window, in px; the stride is 2
INITS = ("normal", "he")  # `initialize` in train/model/alexnet.py implements these initializations
SCHEDULES = ("plateau", "steps", "cosine", "polynomial")  # train/config/overrides.py implements these schedules
PRECISIONS = ("fp32", "tf32", "bf16")  # train/model/precision.py explains these precisions
EXPORT_FORMATS = ("safetensors", "torchvision", "onnx")  # train/convert/export.py explains these formats

PREDICT_VIEWS = ("1", "10")  # 1: the centre crop; 10: the ten crops of section 4.1
EVAL_VIEWS = (*PREDICT_VIEWS, "dense")  # dense: a crop at every 32 px of the central square, in one forward pass

CHECKPOINTS_KEPT = 2  # default number of newest checkpoints that a run keeps, in addition to the best checkpoint
# Default number of images in the nearest-neighbor index, which takes 0.8 GB for a layer of 4096 units.
INDEX_RECORDS = 50_000
REPLICA_TIMEOUT_S = 600.0  # default time in seconds for which a replica waits for another replica
MAX_THREADS = 4096  # largest number of CPU threads of a process; the largest machines have about 1,000 cores
MAX_COUNT = 2**31  # largest value of a setting that counts images, epochs or steps
