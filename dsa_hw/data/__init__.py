"""Data sets: the generated ``glyphs``, the usual public ones, and the user's own."""

from dsa_hw.data.glyphs import GlyphsDataset, make_glyphs
from dsa_hw.data.registry import DATASET_NAMES, DataSplits, load_data
from dsa_hw.data.tensors import ImageTensors, TensorBatches, batches

__all__ = [
    "DATASET_NAMES",
    "DataSplits",
    "GlyphsDataset",
    "ImageTensors",
    "TensorBatches",
    "batches",
    "load_data",
    "make_glyphs",
]
