"""Anima's text encoder, as the shared loops use it: Qwen3's states, and T5's tokens for the adapter.

Captions are read without a template or a system prompt. Names and shapes of the outputs are those of other
trainers' caches. Source: the released model, as diffusers runs it.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from checkpoints.tokenizers import TokenizerFiles
from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder, qwen_tokenizer
from encoders.language_models import QWEN3
from encoders.text_encoder import END, TextTokenizer, TokenizerSource, compute_token_weights, fill_rows
from modules.errors import CheckpointError
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.requests import Prompt

STATES, MASK, IDS, WEIGHTS = "prompt_embeds", "attn_mask", "t5_input_ids", "t5_attn_mask"
QWEN3_SMALL = replace(
    QWEN3,
    option="--qwen3",
    word_key="qwen3_06b",
    files=(
        "qwen_3_06b_base.safetensors of circlestone-labs/Anima, or the folder text_encoder of its diffusers "
        "release,"
    ),
)
T5_FILES = TokenizerFiles(
    option="--t5_tokenizer_path",
    names=("tokenizer.json", "spiece.model", "tokenizer.model"),
    folder="",
    repository="google/t5-v1_1-xxl",
    # next to a file; diffusers: next to text_encoder
    folders=("t5_tokenizer", "../t5_tokenizer", "t5-v1_1-xxl", "google_t5-v1_1-xxl", "t5xxl"),
    unique_token=END,
    hub_filename="spiece.model",
)
T5_SOURCE = TokenizerSource(T5_FILES, end=END)
PAD = 0  # padding id of both tokenizers
logger = logging.getLogger(__name__)


@functools.cache  # one object for each length
def make_encoder_settings(max_tokens: int) -> LanguageEncoderSettings:
    """Return the Qwen3 encoder settings, with prompts of at most `max_tokens` tokens."""
    return LanguageEncoderSettings(
        name="qwen3",
        states_key=STATES,
        model=QWEN3_SMALL,
        source=qwen_tokenizer("--qwen3_tokenizer", "Qwen/Qwen3-0.6B-Base"),
        max_length=max_tokens,
        batch_size=1,  # so that a state does not depend on other prompts, to the last bit
    )


class AnimaTextEncoder(LanguageModelEncoder):
    """Qwen3 with its final norm; states of padding are zeros. T5 is only used as a tokenizer."""

    abilities = EncoderAbilities(trainable=True, offloads_layers=True, shardable=True, accepts_new_words=True)
    lora_prefix = "lora_te"

    def __init__(
        self, *args: Any, t5_tokenizer: Path | None = None, t5_max_tokens: int, **settings: Any
    ) -> None:
        """Set up the encoder; T5 prompts are truncated to `t5_max_tokens` tokens, including the end token.

        `t5_tokenizer` is the value of its option; the other arguments are those of `LanguageModelEncoder`.
        """
        super().__init__(*args, **settings)
        self.t5_tokenizer = t5_tokenizer
        self.t5_max_tokens = t5_max_tokens
        self.keys = frozenset({STATES, MASK, IDS, WEIGHTS})
        self.variable_length = frozenset()
        self.weighted_states_key = ""  # weights of words multiply the adapter's rows
        self._read_t5: TextTokenizer | None = None

    @property
    def identity(self) -> Mapping[str, str]:
        """Return everything that the text states depend on except the text; reads no weights."""
        lengths = {"tokens": str(self.max_length), "t5_tokens": str(self.t5_max_tokens)}
        return {**super().identity, "t5": T5_SOURCE.identity(self.t5_tokenizer, self.path), **lengths}

    def load(self, device: torch.device) -> None:
        """Load Qwen3 and, if not yet loaded, T5's tokenizer."""
        if self._read_t5 is None:
            self._read_t5 = T5_SOURCE.load(self.t5_tokenizer, self.path, "the adapter")
        super().load(device)

    def compute(
        self,
        network: nn.Module,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
        *_: Any,
    ) -> list[Conditions]:
        """Return each prompt's states, `max_length` x C, and their int64 mask; both are 0 after its tokens.

        A prompt without tokens is not run: all of its states are zeros.
        """
        width = network.get_parameter(self.embedding).shape[1]
        conditions: list[Conditions] = []
        for ids in token_ids:
            states = torch.zeros(0, width, dtype=self.dtype)
            if ids:
                (encoded,) = super().compute(network, tokenizer, [ids], num_template_tokens)
                (states,) = encoded[STATES]
            mask = (torch.arange(self.max_length) < len(ids)).to(torch.int64)
            conditions.append({STATES: pad(states, (0, 0, 0, self.max_length - len(ids))), MASK: mask})
        return conditions

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Encode prompts with Qwen3, and add T5's token ids and mask; all four tensors are on the CPU.

        Gradients flow to the trained parts of Qwen3. If parts of a prompt have weights, T5's mask contains
        them in float32. Raises CheckpointError if a tokenizer has more tokens than the network.
        """
        tokenizer = self._read_t5
        assert tokenizer is not None  # call `load` first
        encoded: list[Conditions] = []
        for prompt, conditions in zip(prompts, super().encode(prompts), strict=True):
            templated = self.apply_template(prompt)
            tokens = tokenizer.read(templated.text)
            cut_tokens = tokens.cut(self.t5_max_tokens)
            if len(cut_tokens.ids) < len(tokens.ids):
                left_out = len(tokens.ids) - len(cut_tokens.ids)
                text = "%d of T5's tokens of the prompt are cut off; %d are used: %.60s"
                logger.info(text, left_out, self.t5_max_tokens, prompt.text)
            ids, mask = (
                rows[0].to(torch.int32) for rows in fill_rows([cut_tokens.ids], self.t5_max_tokens, PAD)
            )
            if prompt.weighted_spans:
                mask = mask.float()
                mask[: len(cut_tokens.ids)] *= torch.tensor(
                    compute_token_weights(templated, cut_tokens.char_spans)
                )
            encoded.append({**conditions, IDS: ids, WEIGHTS: mask})
        return encoded


def check_tokens(ids: Tensor, vocabulary: int, path: Path) -> None:
    """Raise CheckpointError if T5's tokenizer has ids beyond the embeddings of the adapter in `path`."""
    largest = int(ids.max())
    if largest >= vocabulary or int(ids.min()) < 0:
        raise CheckpointError(
            f"{path} knows {vocabulary} of T5's tokens, but a text has token {largest}. Pass the tokenizer "
            f"of google/t5-v1_1-xxl to {T5_FILES.option}, and cache texts again.",
            path,
        )
