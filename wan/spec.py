"""Latents of Wan2.1 and Wan2.2, names inside the transformers, and block inputs other than video tokens.

Names are for code that acts on a transformer from outside; inputs are texts, times and positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from modules.layers.rope import select_rotations
from modules.speed_options import SDPA, AttentionChoice
from protocols.data import LatentSpec
from protocols.family import DitSpec
from runtime.offload.context import TokenShard
from wan.configs import BERNINI, VACE

SENTENCE_KEY = "t5_sentence"  # in records of text caches: Bernini's, in front of the caption
TEXT_KEYS = frozenset({"t5"})  # keys of the cache entries that the text encoder writes
# Least squares fit of latents in model space to colors (R, G, B), which all known tools use
PREVIEW_FACTORS = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)
PREVIEW_BIAS = (-0.1835, -0.0868, -0.3360)

LATENT = LatentSpec(
    channels=16,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
)

LATENT_VACE = replace(LATENT, references_first=True)

# of TI2V-5B, whose VAE folds 2 x 2 pixels more into each latent
LATENT_5B = LatentSpec(channels=48, stride=(4, 16, 16), pixel_step=32, frame_step=4)


# by the kind of a task
LATENT_SPECS = {
    **dict.fromkeys(("t2v", "i2v", "flf2v", BERNINI), LATENT),
    VACE: LATENT_VACE,
    "ti2v": LATENT_5B,
}


DIT = DitSpec(
    block_lists=("blocks",),
    shared_inputs=(
        ("self_attn.q", "self_attn.k", "self_attn.v"),
        ("cross_attn.k", "cross_attn.v"),
        ("cross_attn.k_img", "cross_attn.v_img"),
    ),
    fp8_exclude=(
        "norm",
        "patch_embedding",
        "text_embedding",
        "time_embedding",
        "time_projection",
        "head",
        "modulation",
        "img_emb",
    ),
    input_layers=("patch_embedding", "text_embedding", "img_emb"),
    token_wise_methods=("feed_forward",),
    modulated_input="modulated_input",
    # they compute in float32; under 1 % of the model
    keep_float32=("time_embedding.", "time_projection.", "head.head."),
)


VACE_DIT = replace(
    DIT,
    block_lists=("blocks", "vace_blocks"),
    side_list="vace_blocks",
    # the released sizes have 5 or 2 blocks for one of VACE
    swap_counts=lambda blocks: (blocks - blocks // 6, blocks // 6),
    input_layers=(*DIT.input_layers, "vace_patch_embedding"),
    # only VACE's blocks are trained: the LoRA is small, and can be combined with LoRAs of T2V
    lora_exclude=(".blocks.", "before_proj", "after_proj"),
)


# Letters: B batch, L video tokens, S segments of them, T text tokens, I image tokens, C width


class SourceLatents(NamedTuple):
    """A clip or an image that stands, clean, in front of the noisy latents: an input of Bernini."""

    latents: Tensor  # B C f h w, or of one sample for all; its size is its own
    number: float  # what it is told apart by, from 1; the noisy latents are 0


@dataclass(frozen=True)
class WanTokens:
    """Inputs of the blocks in addition to video tokens; built once per forward pass by `WanModel.embed`."""

    grid: tuple[int, int, int]  # tokens along frames, rows, columns; L is their product, and the sources'
    rotary: Tensor  # rotations by position, L 1 D/2 2 in the model's `precision`
    # (B T C, T float32) for each text, usually one. The second counts the equal rows that a row represents;
    # None: one each
    text_tokens: tuple[tuple[Tensor, Tensor | None], ...]
    image_tokens: Tensor | None  # B I C
    time: Tensor  # B S C in the model's `precision`
    modulation: Tensor  # B S 6 C in the model's `precision`
    num_clean_tokens: int  # number of tokens of clean frames, which come first; S is 2 if there are any
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    # merges the attentions to two texts, B L N D each; None: there is one text
    combine_attention: Callable[..., Tensor] | None
    shard: TokenShard | None = None  # the tokens that this process has; None: all
    num_source_tokens: int = 0  # number of tokens of Bernini's sources, which come before those of `grid`

    def cut(self, shard: TokenShard) -> "WanTokens":
        """Return the inputs for the tokens of one process."""
        return replace(
            self,
            rotary=shard.slice_rotary(self.rotary),
            num_clean_tokens=shard.count_among_first(self.num_clean_tokens),
            shard=shard,
        )

    @property
    def first_noisy_token(self) -> int:
        """Index of the first token of the noisy latents, which is the first token of `grid`."""
        return self.num_source_tokens

    def select(self, kept: Tensor, num_left_out: int) -> "WanTokens":
        """Return the inputs for a subset of the tokens; only tokens of the noisy latents may be missing.

        `kept` are the ascending indices of the kept tokens, B K; `num_left_out` tokens are missing.
        """
        return replace(self, rotary=select_rotations(self.rotary, kept, num_left_out))


def pad_texts(
    text: Sequence[Tensor] | Tensor, length: int, attention: AttentionChoice | None
) -> tuple[Tensor, Tensor | None]:
    """Pad texts with zeros and stack them to B T text_dim; the padding is not masked, as in training.

    On a CPU, if `attention` can weight repeated keys, the rows that are zero in every sample are merged into
    one; the second result, T numbers, then says how many rows each row stands for (else None). Layers before
    attention treat each row separately, so the output is the same, and a small model saves most of its work.
    On a GPU 512 rows cost next to nothing, and kernels take key weights in 16 bits, too coarse for such
    counts.
    """
    longest = max(len(rows) for rows in text)
    if longest > length:
        raise ValueError(f"a text has {longest} tokens, the model takes {length}")
    can_merge = attention is not None and attention.mode == SDPA.mode
    num_rows = length
    if can_merge and text[0].device.type == "cpu":
        num_rows = min(longest + 1, length)  # one more row, which represents all padding
    padded = [functional.pad(rows, (0, 0, 0, num_rows - len(rows))) for rows in text]
    # autocast in float16 rejects cached texts in bfloat16 here, and changes nothing for equal dtypes
    with torch.autocast(text[0].device.type, enabled=False):
        stacked = torch.stack(padded)
    if num_rows == length:
        return stacked, None
    repeats = torch.ones(num_rows, device=stacked.device)
    repeats[-1] = length - longest
    return stacked, repeats
