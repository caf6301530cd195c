"""Reads label files in many text formats. A label file gives the labels of images without class folders.

This package also reads the class numbers of ILSVRC's devkit.
"""

from prep.inputs.labels.numbers import LABEL_ORDERS
from prep.inputs.labels.read import read_labels

__all__ = ["LABEL_ORDERS", "read_labels"]
