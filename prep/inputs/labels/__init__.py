"""Label files, which give the labels of images without class folders, in many text formats.

This package also reads the class numbers of ILSVRC's devkit.
"""

from prep.inputs.labels.numbers import LABEL_ORDERS
from prep.inputs.labels.read import read_labels

__all__ = ["LABEL_ORDERS", "read_labels"]
