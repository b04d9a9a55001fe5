"""FramePack's text encoders, as the shared loops use them: HunyuanVideo's two with outputs in another form.

Names, shapes and dtypes of the outputs are those of the cache format. Source: the released FramePack.
"""
# Letters: C = width of the model

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from encoders.clip_l import PooledClip
from hunyuan_model.text_encoders import CLIP, LLAVA_USE, LlavaTextEncoder
from modules.contract.data import Conditions
from modules.contract.requests import Prompt

FRAMEPACK_CLIP = replace(CLIP, pooled="clip_l_pooler", mask=None)
TEXT_ROWS = 512  # rows for the language model's states, zeros after those of the prompt


class FramePackLlama(LlavaTextEncoder):
    """Text encoder 1: the language model's states of a prompt's own tokens, at most 256 of them."""

    usual = replace(LLAVA_USE, name="llama", states_key="llama_vec", mask_key="llama_attention_mask")

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return {"llama_vec": 512 C, "llama_attention_mask": 512 bool, true for real tokens}.

        Each is encoded alone and padded to one length, as in the release. Fewer tokens or several prompts at
        once would be faster, but sum in another order, which changes the last bits.
        """
        read = super().encode
        return [_in_rows(encoded) for prompt in prompts for encoded in read([prompt])]


class FramePackClip(PooledClip):
    """Text encoder 2: CLIP-L's pooled state, one vector for each prompt, each encoded alone."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None) -> None:
        """Set up the encoder. Arguments as of `PooledClip`."""
        super().__init__(path, dtype, tokenizer, FRAMEPACK_CLIP)
        self.name = "clip_l"

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return {"clip_l_pooler": C} for each prompt."""
        read = super().encode
        return [encoded for prompt in prompts for encoded in read([prompt])]


def _in_rows(encoded: Conditions) -> Conditions:
    states, mask = encoded["llama_vec"], encoded["llama_attention_mask"]
    assert isinstance(states, Tensor)
    assert isinstance(mask, Tensor)
    count = int(mask.sum())
    rows = states.new_zeros(TEXT_ROWS, states.shape[1])
    rows[:count] = states[:count]
    return {"llama_vec": rows, "llama_attention_mask": torch.arange(TEXT_ROWS) < count}
