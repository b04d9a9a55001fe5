"""ByT5, whose tokens are the bytes of a text: the encoder of the letters that a picture shows.

    network = load_byt5(path, device, torch.float16)
    ids, mask = byte_rows(texts, 128)
    states = network.encode_padded(ids, mask)  # B L C, on the device

The encoder of Glyph-ByT5 has more tokens than bytes (colours and fonts). HunyuanImage-2.1 never uses these.
Source: Xue et al. 2022, arXiv 2105.13626.
"""
# Letters: B texts, L tokens of a text with its padding, C = width of the model

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from encoders.t5_checkpoints import T5Config, T5Kind, read_t5
from encoders.t5_network import T5Network, load_t5
from encoders.token_rows import fill_rows
from modules.checkpoints.model_files import read_once
from modules.checkpoints.opening import Checkpoint

PAD, END = 0, 1
FIRST_BYTE = 3  # the id of byte 0; 2 is for unknown tokens
BYT5 = T5Kind(
    name="ByT5",
    what="a ByT5 encoder",
    option="--byt5",
    release="byt5_small_glyphxl_fp16.safetensors",
    has_own_tables=False,
)


def load_byt5(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> T5Network:
    """Load a ByT5 encoder of any size. dtype: compute dtype; None: the file's, and bfloat16 for fp8.

    Raises CheckpointError if the file is damaged or holds another model.
    """
    return load_t5(path, device, BYT5, dtype)


def read_byt5_header(path: Path) -> T5Config:
    """Return the dimensions of the encoder in a file; only headers are read. Raises as `load_byt5`."""
    return read_once(path, _config)


def _config(checkpoint: Checkpoint) -> T5Config:
    return read_t5(checkpoint, BYT5).config


def byte_rows(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, each B L int64: the bytes of each text, an end token, padding.

    length: L; of a longer text the first bytes are kept, and the end token.
    """
    rows = [[FIRST_BYTE + byte for byte in text.encode()][: length - 1] + [END] for text in texts]
    return fill_rows(rows, length, PAD)
