"""The text encoder: captions exactly as they are written, and 13 states of Qwen3-VL side by side."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from encoders.language_encoder import (
    LanguageEncoderSettings,
    LanguageModelEncoder,
    qwen3_chat,
    qwen_tokenizer,
)
from encoders.language_models import QWEN3_VL
from ideogram4.captions import find_caption_errors
from ideogram4.configs import STATES
from ideogram4.options import BFLOAT16, FLOAT32, FP8
from modules.control_codes import shorten
from modules.errors import CaptionError
from modules.text_files import looks_like_object
from protocols.data import Conditions
from protocols.requests import Prompt

logger = logging.getLogger(__name__)

KEY = "i4_llm_features"  # as in caches of musubi-tuner
MAX_TOKENS = 2048  # of a prompt with its template, as released
CACHE_DTYPES = {BFLOAT16: torch.bfloat16, FP8: torch.float8_e4m3fn, FLOAT32: torch.float32}
_SOURCE = qwen_tokenizer("--text_encoder_tokenizer", "Qwen/Qwen3-VL-8B-Instruct")
# inside the encoder's folder; next to a single file; next to text_encoder (diffusers)
_FOLDERS = (".", "qwen3_vl_8b", "tokenizer", "../tokenizer")
_PREFIX, _SUFFIX = qwen3_chat(thinks=True)
ENCODER_SETTINGS = LanguageEncoderSettings(
    name="qwen3_vl",
    states_key=KEY,
    model=replace(
        QWEN3_VL,
        files="qwen3vl_8b_fp8_scaled.safetensors of Comfy-Org, or the folder of Qwen/Qwen3-VL-8B-Instruct,",
        word_key="qwen3vl_8b",
    ),
    source=replace(_SOURCE, files=replace(_SOURCE.files, folder="qwen3_vl_8b", folders=_FOLDERS)),
    max_length=MAX_TOKENS,
    template_prefix=_PREFIX,
    template_suffix=_SUFFIX,
    states=STATES,
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
)


class Ideogram4TextEncoder(LanguageModelEncoder):
    """Qwen3-VL for captions that are JSON objects, which are encoded to the character as they are.

    Of each token, the 13 states of a channel stand side by side, channel after channel.
    """

    cache_dtype: torch.dtype | None = None  # dtype of the states that are returned; None: the encoder's
    stops_at_errors: bool | None = None  # at a caption with errors; False: it is warned of; None: not checked

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return each prompt's states.

        Raises:
            CaptionError: If a prompt is too long, or if captions are checked and one has errors.
        """
        _, tokenizer = self._loaded.get()
        for prompt in prompts:
            num_tokens = len(tokenizer.read(self.apply_template(prompt).text).ids)
            if num_tokens > MAX_TOKENS:
                raise CaptionError(
                    f"the caption {shorten(prompt.text, 60)}: {num_tokens} tokens with its template, "
                    f"the model takes {MAX_TOKENS}. Shorten it: a JSON object that is cut off says "
                    "something else"
                )
            if self.stops_at_errors is not None and prompt.text.strip():
                self._check(prompt.text)
        return super().encode(prompts)

    def _check(self, text: str) -> None:
        """Raise CaptionError for a caption that differs from those of the training, or warn of it."""
        errors = ["it is no JSON object"]
        if looks_like_object(text):
            errors = find_caption_errors(text)
        if not errors:
            return
        message = f"the caption {shorten(text, 60)}: {'; '.join(errors)}"
        if self.stops_at_errors:
            raise CaptionError(f"{message}. Correct it, or omit --validate_caption_structure")
        logger.warning("%s", message)

    def compute(self, *inputs: Any, **named_inputs: Any) -> list[Conditions]:
        """Return each prompt's states, L times (width * number of states), ordered by channel."""
        results: list[Conditions] = []
        for conditions in super().compute(*inputs, **named_inputs):
            states: Sequence[Tensor] = conditions[KEY]  # type: ignore[assignment]
            ordered = [join_by_channel(one) for one in states]
            results.append({**conditions, KEY: [self._round(one) for one in ordered]})
        return results

    def _round(self, states: Tensor) -> Tensor:
        return states if self.cache_dtype is None else states.to(self.cache_dtype)


def join_by_channel(states: Tensor) -> Tensor:
    """Reorder states that are joined layer by layer, L n*W, to channel by channel: L W*n."""
    return states.unflatten(-1, (len(STATES), -1)).transpose(-1, -2).flatten(-2)
