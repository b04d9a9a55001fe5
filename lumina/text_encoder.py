"""Lumina-Image-2.0's text encoder, as the shared loops use it: Gemma 2, after a system prompt.

Names and shapes of the outputs are those of other trainers' caches. Source: the released model, Qin et al.
2025, arXiv 2503.21758.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.dialects import LoadPlan
from checkpoints.model_files import inside
from checkpoints.opening import Checkpoint, open_checkpoint
from checkpoints.tokenizers import TokenizerFiles
from encoders import language_models
from encoders.language_states import language_states
from encoders.text_encoder import FileTextEncoder, TemplatedPrompt, TextTokenizer, TokenizerSource, fill_rows
from lumina.configs import PROMPT_START
from lumina.options import DEFAULT_TOKENS
from modules.devices import dtype_name
from modules.integers import round_up
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.loading import BlockSharder
from protocols.requests import Prompt

GEMMA_OPTION = "--gemma2"
GEMMA_NAMES = (
    "gemma_2_2b_fp16.safetensors, a folder of google/gemma-2-2b, or an all-in-one file of Lumina-Image-2.0"
)
HIDDEN_STATES = (-2,)  # before the last layer; the model was trained with states without the final norm
SCALAR = "query_pre_attn_scalar"  # attention is scaled by its inverse square root


def read_settings(
    settings: Mapping[str, Any], num_layers: int, head_width: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Translate Gemma 2's settings to transformers' Gemma2Config.

    Raises ValueError or TypeError for a value that is not a number.
    """
    return {SCALAR: int(settings.get(SCALAR, head_width))}


GEMMA_2 = language_models.LanguageModel(
    description="a Gemma 2 language model",
    option=GEMMA_OPTION,
    files=GEMMA_NAMES,
    class_prefix="Gemma2",
    kind="gemma2",
    word_key="gemma2_2b",
    # defaults of transformers, which it does not write
    defaults={"head_dim": 256, SCALAR: 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    theta=10000.0,
    eps=1e-6,
    head_width=256,
    distinguishing_tensors=(language_models.FEED_NORM,),
    # attention is spelled out, as soft-capping needs; every other layer looks back so many tokens
    settings={"attn_implementation": "eager", "attn_logit_softcapping": 50.0, "sliding_window": 4096},
    read_settings=read_settings,
)


def read_gemma(checkpoint: Checkpoint) -> LoadPlan[language_models.LanguageConfig]:
    """Plan how to load Gemma 2, also from fp8; raise CheckpointError for any other file."""
    return language_models.read_language_model(checkpoint, GEMMA_2, HIDDEN_STATES)


def load_gemma(
    path: Path, device: torch.device, dtype: torch.dtype, blocks: BlockSharder | None = None
) -> nn.Module:
    """Load Gemma 2, with fp8 weights dequantized; `blocks` manages where its layers are kept.

    Raises CheckpointError if the file contains another model.
    """
    return language_models.load_language_model(
        path, GEMMA_2, device, dtype, states=HIDDEN_STATES, blocks=blocks
    )


logger = logging.getLogger(__name__)

BEGIN_TOKEN = "<bos>"
GEMMA_FILES = TokenizerFiles(
    option="--gemma2_tokenizer",
    names=("tokenizer.json", "tokenizer.model"),
    folder="tokenizer",
    repository="Alpha-VLLM/Lumina-Image-2.0",
    # next to a single file; diffusers pipelines: text_encoder and tokenizer side by side; google's folder
    folders=("tokenizer", "../tokenizer", "."),
    unique_token="<start_of_turn>",
)


LENGTH_MULTIPLE = 8  # the padded length is a multiple of this
PAD_TOKEN_ID = 0
BATCH_SIZE = 8  # number of prompts encoded at once, which limits memory


class GemmaTextEncoder(FileTextEncoder[nn.Module]):
    """Gemma 2 up to its second-to-last layer; states after the text's end are zeros and masked."""

    abilities = EncoderAbilities(trainable=True, shardable=True, accepts_new_words=True)
    name = "gemma2"
    keys = frozenset({"hidden_state", "attention_mask", "input_ids"})
    lora_prefix = "lora_te"
    source = TokenizerSource(GEMMA_FILES, begin=BEGIN_TOKEN, may_be_inside=True)
    weighted_states_key = "hidden_state"
    word_keys = ("gemma2_2b",)
    logs_truncation = True
    blocks: BlockSharder | None = None  # splits the network over processes

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Path | None = None,
        system_prompt: str = "",
        in_negative: bool = False,
        max_tokens: int = DEFAULT_TOKENS,
    ) -> None:
        """Set up Lumina's text encoder; `load` reads its files later.

        Args:
            path: File or folder of the model, or a release's folder that holds it as `text_encoder`.
            dtype: Compute dtype.
            tokenizer: Folder or file of the tokenizer.
            system_prompt: Text before every prompt; "" for none.
            in_negative: Whether the system prompt also precedes negative prompts.
            max_tokens: Maximum length of a prompt, rounded up to a multiple of 8.
        """
        super().__init__(inside(path, "text_encoder"), tokenizer)
        self.dtype = dtype
        self.system_prompt = system_prompt
        self.in_negative = in_negative
        self.padded_length = round_up(max_tokens, LENGTH_MULTIPLE)
        self.max_length = max_tokens

    @property
    def identity(self) -> Mapping[str, str]:
        """Return what the text states depend on besides the text; reads no weights."""
        with open_checkpoint(self.path) as checkpoint:
            config = read_gemma(checkpoint).config
        words = f"{config.num_heads} heads, theta {config.theta}, scaled by {config.settings[SCALAR]}"
        identity = self.identify(
            "gemma2", config=words, dtype=dtype_name(self.dtype), tokens=str(self.max_length)
        )
        return {**identity, "system_prompt": self.system_prompt}

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Put the system prompt before the prompt; negative prompts get none unless the options say so."""
        has_system = self.system_prompt and (self.in_negative or not prompt.is_negative)
        before = f"{self.system_prompt} {PROMPT_START} " if has_system else ""
        return TemplatedPrompt(before + prompt.text, prompt.text, prompt.weighted_spans, len(before))

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise CheckpointError if the tokenizer has no begin token."""
        if tokenizer.token_to_id(BEGIN_TOKEN) is None:
            raise GEMMA_FILES.unreadable(tokenizer.file, ValueError(f"it has no {BEGIN_TOKEN}"))

    def load_network(self, device: torch.device) -> nn.Module:
        """Load Gemma 2, and log its dtype and the system prompt."""
        gemma = load_gemma(self.path, device, self.dtype, self.blocks)
        logger.info("text encoder: %s, computing in %s", self.path, dtype_name(self.dtype))
        if self.system_prompt:
            logger.info("system prompt: %s", self.system_prompt)
        return gemma

    def compute(
        self,
        network: nn.Module,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
    ) -> list[Conditions]:
        """Return {"hidden_state": L C, "attention_mask": L, "input_ids": L int64} for each prompt.

        Args:
            network: Gemma 2.
            tokenizer: Not used.
            token_ids: Token ids of each prompt, not padded.
            num_template_tokens: Not used, because the states of the system prompt are inputs of the model
                too.
        """
        device = network.get_parameter(self.embedding).device
        results: list[Conditions] = []
        for first in range(0, len(token_ids), BATCH_SIZE):
            # B L, padded to `padded_length`
            input_ids, mask = fill_rows(
                token_ids[first : first + BATCH_SIZE], self.padded_length, PAD_TOKEN_ID
            )
            embeds = network.get_submodule("embed_tokens")(input_ids.to(device))
            states = language_states(network, embeds, mask.to(device), HIDDEN_STATES).cpu()  # B L C
            states = states * mask[..., None]  # 0 for padding
            for index in range(len(input_ids)):
                results.append(
                    {
                        "hidden_state": states[index].clone(),
                        "attention_mask": mask[index].clone(),
                        "input_ids": input_ids[index].clone(),
                    }
                )
        return results
