"""Values that the options of `alextrain` accept, each list in one place. Imports nothing, so that --help stays fast.

Options whose values name an object accept the keys of a table: RECIPES (train/config/recipes.py), ARCHITECTURES
(train/config/architecture.py) or ABLATIONS (train/config/ablations.py).
"""

ACTIVATIONS = ("relu", "tanh", "sigmoid")  # implemented in train/model/alexnet.py
POOLS_PX = (2, 3)  # side of a pooling window; its stride is 2
INITS = ("normal", "he")  # implemented in train/model/alexnet.py, initialize
SCHEDULES = ("plateau", "steps", "cosine")  # implemented in train/config/overrides.py
PRECISIONS = ("fp32", "tf32", "bf16")  # explained in train/model/precision.py
EXPORT_FORMATS = ("safetensors", "torchvision", "onnx")  # explained in train/convert/export.py

PREDICT_VIEWS = ("1", "10")  # 1: the centre crop; 10: the ten crops of section 4.1
EVAL_VIEWS = (*PREDICT_VIEWS, "dense")  # dense: a crop every 32 px of the central square, in one pass

CHECKPOINTS_KEPT = 2  # default number of newest checkpoints in a run folder, in addition to the best
INDEX_RECORDS = 50_000  # default number of images in the nearest-neighbor index: 0.8 GB at 4096 units per image
