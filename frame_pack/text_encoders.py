"""FramePack's text encoders as the shared loops see them: HunyuanVideo's two, their outputs in another form.

Names, shapes and dtypes of the outputs are those of the cache format. Source: the released FramePack.
"""
# Letters: C = width of the model

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.text_encoders import VIDEO_TEMPLATE, ClipTextEncoder, LlavaTextEncoder, PromptTemplate
from modules.records import Conditions, Prompt

TEXT_ROWS = 512  # of the language model's states, zeros behind those of the prompt


class FramePackLlama:
    """Text encoder 1: the states that HunyuanVideo's language model has for a prompt's own tokens, at most 256 of them."""

    name = "llama"
    keys = frozenset({"llama_vec", "llama_attention_mask"})
    variable_length: frozenset[str] = frozenset()

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float16,
        tokenizer: Path | None = None,
        system_prompt: str | None = None,
        in_fp8: bool = False,
    ) -> None:
        """path: file or folder of the model, or a release's folder that holds it as `text_encoder`. dtype: it computes in.

        system_prompt: what the model is told in place of the usual description of its task. in_fp8: keep the linear layers in
        8 bits.
        """
        template = VIDEO_TEMPLATE if system_prompt is None else PromptTemplate(system_prompt)
        self._llava = LlavaTextEncoder(path, dtype, tokenizer, template, in_fp8=in_fp8)

    @property
    def path(self) -> Path:
        """Where the model is."""
        return self._llava.path

    @property
    def identity(self) -> Mapping[str, str]:
        """What an output depends on beside the prompt. Reads a few MB.

        Raises CheckpointError where the file is of another model.
        """
        return self._llava.identity

    def load(self, device: torch.device) -> None:
        """Read encoder and tokenizer. A loaded encoder moves to the device."""
        self._llava.load(device)

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """For each prompt {"llama_vec": 512 C, "llama_attention_mask": 512 bool, true for real tokens}, on the CPU.

        As the release: each prompt alone, filled up to 351 tokens. Fewer tokens, or several prompts at once, are quicker but sum in
        another order, which shows in the last bits.
        Raises CheckpointError where the tokenizer knows more tokens than the model.
        """
        return [self._in_rows(*self._llava.encode([prompt])) for prompt in prompts]

    def _in_rows(self, encoded: Conditions) -> Conditions:
        states, mask = encoded["llm"], encoded["llm_mask"]
        assert isinstance(states, Tensor)
        assert isinstance(mask, Tensor)
        count = int(mask.sum())
        rows = states.new_zeros(TEXT_ROWS, states.shape[1])
        rows[:count] = states[:count]
        return {"llama_vec": rows, "llama_attention_mask": torch.arange(TEXT_ROWS) < count}

    def free(self) -> None:
        """Give the memory back."""
        self._llava.free()


class FramePackClip:
    """Text encoder 2: CLIP-L's pooled state, one vector for a prompt."""

    name = "clip_l"
    keys = frozenset({"clip_l_pooler"})
    variable_length: frozenset[str] = frozenset()

    def __init__(self, path: Path, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None) -> None:
        """path: file or folder of the model, or a release's folder that holds it as `text_encoder_2`. dtype: it computes in."""
        self._clip = ClipTextEncoder(path, dtype, tokenizer)

    @property
    def path(self) -> Path:
        """Where the model is."""
        return self._clip.path

    @property
    def identity(self) -> Mapping[str, str]:
        """What an output depends on beside the prompt. Reads a few MB.

        Raises CheckpointError where the file is of another model.
        """
        return self._clip.identity

    def load(self, device: torch.device) -> None:
        """Read encoder and tokenizer. A loaded encoder moves to the device."""
        self._clip.load(device)

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """For each prompt {"clip_l_pooler": C}, on the CPU, each prompt alone as in the release.

        Raises CheckpointError where the tokenizer knows more tokens than the model.
        """
        return [{"clip_l_pooler": encoded["clipL"]} for prompt in prompts for encoded in self._clip.encode([prompt])]

    def free(self) -> None:
        """Give the memory back."""
        self._clip.free()
