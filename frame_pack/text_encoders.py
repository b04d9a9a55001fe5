"""FramePack's text encoders, as the shared loops use them: HunyuanVideo's two with outputs in another form.

Names, shapes and dtypes of the outputs are those of the cache format. Source: the released FramePack.
"""
# Letters: C = width of the model

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.configs import SKIP_LAYERS
from hunyuan_model.text_encoders import LlavaTextEncoder, clip_text_encoder, template_of
from modules.contract.data import Conditions
from modules.contract.family import TextEncoder
from modules.contract.requests import Prompt
from modules.contract.rules import CountTokens

TEXT_ROWS = 512  # rows for the language model's states, zeros after those of the prompt
LLAMA_KEYS = frozenset({"llama_vec", "llama_attention_mask"})
CLIP_KEYS = frozenset({"clip_l_pooler"})


@dataclass(frozen=True)
class FramePackTextEncoder:
    """One of HunyuanVideo's text encoders. Made by `framepack_llama` and `framepack_clip`."""

    name: str
    keys: frozenset[str]
    encoder: TextEncoder
    # an output of HunyuanVideo's encoder -> the tensors in FramePack's caches
    output: Callable[[Conditions], Conditions]
    variable_length: frozenset[str] = frozenset()

    @property
    def identity(self) -> Mapping[str, str]:
        """Return the facts that an output depends on besides the prompt. Reads a few MB.

        Raises CheckpointError if the file holds another model.
        """
        return self.encoder.identity

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens; only the tokenizer is loaded.

        Raises CheckpointError if there is no tokenizer here; none is downloaded.
        """
        return self.encoder.token_counter()

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        self.encoder.load(device)

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return the tensors `keys` of each prompt, on the CPU.

        Each prompt is encoded alone and padded to one length, as in the release. Fewer tokens or several
        prompts at once would be faster, but sum in another order, which changes the last bits.
        Raises CheckpointError if the tokenizer has more tokens than the model.
        """
        return [self.output(encoded) for prompt in prompts for encoded in self.encoder.encode([prompt])]

    def free(self) -> None:
        """Release the encoder and its memory."""
        self.encoder.free()


def framepack_llama(
    path: Path,
    dtype: torch.dtype = torch.float16,
    tokenizer: Path | None = None,
    system_prompt: str | None = None,
    skip_layers: int = SKIP_LAYERS,
    final_norm: bool = False,
    in_fp8: bool = False,
) -> FramePackTextEncoder:
    """Make text encoder 1: the language model's states of a prompt's own tokens, at most 256 of them.

    It returns {"llama_vec": 512 C, "llama_attention_mask": 512 bool, true for real tokens}. path: file or
    folder of the model, or a release's folder that holds it as `text_encoder`. dtype: compute dtype.
    system_prompt: replaces the usual description of the model's task. skip_layers, final_norm, in_fp8: as for
    `LlavaTextEncoder`.
    """
    template = template_of(system_prompt)
    llava = LlavaTextEncoder(path, dtype, tokenizer, template, skip_layers, final_norm, in_fp8)
    return FramePackTextEncoder("llama", LLAMA_KEYS, llava, _in_rows)


def framepack_clip(
    path: Path, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None
) -> FramePackTextEncoder:
    """Make text encoder 2: CLIP-L's pooled state, one vector per prompt.

    It returns {"clip_l_pooler": C}. path: file or folder of the model, or a release's folder that holds it as
    `text_encoder_2`. dtype: compute dtype.
    """
    return FramePackTextEncoder("clip_l", CLIP_KEYS, clip_text_encoder(path, dtype, tokenizer), _pool)


def _in_rows(encoded: Conditions) -> Conditions:
    states, mask = encoded["llm"], encoded["llm_mask"]
    assert isinstance(states, Tensor)
    assert isinstance(mask, Tensor)
    count = int(mask.sum())
    rows = states.new_zeros(TEXT_ROWS, states.shape[1])
    rows[:count] = states[:count]
    return {"llama_vec": rows, "llama_attention_mask": torch.arange(TEXT_ROWS) < count}


def _pool(encoded: Conditions) -> Conditions:
    return {"clip_l_pooler": encoded["clipL"]}
