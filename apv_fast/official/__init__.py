"""What the official implementation of APV (TensorFlow) wrote: its weights, by name, order and layout."""

from apv_fast.official.checkpoint import CHECKPOINT, OfficialModel, read_checkpoint, read_model
from apv_fast.official.pickles import read_arrays
from apv_fast.official.settings import read_settings
from apv_fast.official.weights import our_layout, our_name

__all__ = [
    "CHECKPOINT",
    "OfficialModel",
    "our_layout",
    "our_name",
    "read_arrays",
    "read_checkpoint",
    "read_model",
    "read_settings",
]
