"""HunyuanVideo's two text encoders as the shared loops see them: a language model's states of the prompt, and
CLIP's pooled state.

Names and shapes of the outputs are those of the cache format. Source of templates and lengths: the released
HunyuanVideo.
"""
# Letters: B prompts, L tokens, C = width of the model

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.clip_text import ClipText, load_clip_text
from hunyuan_model.configs import SKIP_LAYERS
from hunyuan_model.llama import Llama, load_llama
from hunyuan_model.text_checkpoints import CLIP_TOKENS, read_clip_text, read_llama
from hunyuan_model.tokenizer import (
    ClipTokenizer,
    LlamaTokenizer,
    clip_tokenizer_identity,
    llama_tokenizer_identity,
    load_clip_tokenizer,
    load_llama_tokenizer,
)
from modules.checkpoints.model_files import inside
from modules.checkpoints.opening import fingerprint, open_checkpoint
from modules.contract.data import Conditions
from modules.contract.generation import Prompt
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.offload.loaded import Loaded

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 256  # kept of the language model's states
PROMPTS_AT_ONCE = 8  # bounds memory when many prompts are given


@dataclass(frozen=True)
class PromptTemplate:
    """What the language model is told: a system text, then the prompt as the user's words.

    crop_start: tokens before the prompt, whose states are cut off; None: as many as the tokenizer in use
    makes of them.
    """

    system: str
    crop_start: int | None = None

    @property
    def before(self) -> str:
        """All that stands before the prompt."""
        system = f"<|start_header_id|>system<|end_header_id|>\n\n{self.system}<|eot_id|>"
        return system + "<|start_header_id|>user<|end_header_id|>\n\n"

    def of(self, prompt: str) -> str:
        """The whole text."""
        return f"{self.before}{prompt}<|eot_id|>"

    @property
    def text(self) -> str:
        """The release's way to write it: `{}` stands for the prompt."""
        return self.of("{}")


VIDEO_TEMPLATE = PromptTemplate(
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:",
    crop_start=95,
)
IMAGE_TEMPLATE = PromptTemplate(
    "Describe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:",
    crop_start=36,
)


class LlavaTextEncoder:
    """Text encoder 1: the Llama 3 of LLaVA. Every prompt gives 256 states, those behind its end masked."""

    name = "llm"
    keys = frozenset({"llm", "llm_mask"})
    variable_length: frozenset[str] = frozenset()

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float16,
        tokenizer: Path | None = None,
        template: PromptTemplate = VIDEO_TEMPLATE,
        skip_layers: int = SKIP_LAYERS,
        final_norm: bool = False,
        in_fp8: bool = False,
    ) -> None:
        """path: file or folder of the model, or a release's folder that holds it as `text_encoder`. dtype: it
        computes in.

        skip_layers: layers behind the state that is given, 0 for the last, which is normed always.
        final_norm: norm others too. in_fp8: keep the linear layers in 8 bits.
        """
        self.path = inside(path, "text_encoder")
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.template = template
        self.skip_layers = skip_layers
        self.final_norm = final_norm or skip_layers == 0
        self.in_fp8 = in_fp8
        # with the number of tokens before the prompt
        self._loaded = Loaded[Llama, tuple[LlamaTokenizer, int]]()

    @property
    def identity(self) -> Mapping[str, str]:
        """Content of the checkpoint and of the tokenizer, what config.json adds, and what is asked of them.
        Reads a few MB.

        Raises CheckpointError where the file is of another model.
        """
        with open_checkpoint(self.path) as checkpoint:
            config = read_llama(checkpoint, self.skip_layers, self.final_norm).config
        identity = {
            "llm": fingerprint(self.path),
            "llm_config": f"{config.num_heads} heads, theta {config.theta}, eps {config.eps}",
            "llm_tokenizer": llama_tokenizer_identity(self.tokenizer, self.path),
            "llm_dtype": dtype_name(self.dtype),
            "llm_state": f"{self.skip_layers} layers skipped" + (", normed" if self.final_norm else ""),
            "llm_template": hashlib.sha256(self.template.text.encode()).hexdigest()[:16],
        }
        return identity | ({"llm_weights": "fp8"} if self.in_fp8 else {})

    def load(self, device: torch.device) -> None:
        """Read encoder and tokenizer. A loaded encoder moves to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[Llama, tuple[LlamaTokenizer, int]]:
        # first: what is wrong with it shows before gigabytes are read
        tokenizer = load_llama_tokenizer(self.tokenizer, self.path)
        start = self._crop_start(tokenizer)
        llama = load_llama(self.path, device, self.dtype, self.skip_layers, self.final_norm, self.in_fp8)
        logger.info("text encoder 1: %s, computing in %s", self.path, dtype_name(self.dtype))
        return llama, (tokenizer, start)

    def _crop_start(self, tokenizer: LlamaTokenizer) -> int:
        """How many tokens of a text stand before the prompt."""
        counted, known = len(tokenizer.tokenize(self.template.before)), self.template.crop_start
        if known is None:
            logger.info(
                "system prompt: %s (%d tokens before the prompt, which are cut off)",
                self.template.system,
                counted,
            )
            return counted
        if counted != known:
            logger.warning(
                "the tokenizer makes %d tokens of the template before the prompt, that of the model makes "
                "%d: prompts will be cut "
                "in the wrong place. Give --text_encoder1_tokenizer the one that belongs to the model.",
                counted,
                known,
            )
        return known

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """For each prompt {"llm": 256 C, "llm_mask": 256 int64, 1 for real tokens}, on the CPU.

        Raises CheckpointError where the tokenizer knows more tokens than the model.
        """
        llama, (tokenizer, start) = self._loaded.get()
        length = start + PROMPT_TOKENS
        rows = [tokenizer.tokenize(self.template.of(prompt.text)) for prompt in prompts]
        for row, prompt in zip(rows, prompts, strict=True):
            if len(row) > length:
                logger.info(
                    "%d tokens of the prompt are cut off, %d are used: %.60s",
                    len(row) - length,
                    PROMPT_TOKENS,
                    prompt.text,
                )
        results: list[Conditions] = []
        for first in range(0, len(rows), PROMPTS_AT_ONCE):
            ids, mask = _filled(
                [row[:length] for row in rows[first : first + PROMPTS_AT_ONCE]], length, tokenizer.pad
            )
            _check_ids(ids, llama.embed_tokens.num_embeddings, self.path, "--text_encoder1_tokenizer")
            states = llama(ids.to(llama.device), mask.to(llama.device))[:, start:].cpu()
            results += [
                {"llm": state.clone(), "llm_mask": kept.clone()}
                for state, kept in zip(states, mask[:, start:], strict=True)
            ]
        return results

    def free(self) -> None:
        """Give the memory back."""
        self._loaded.free()


class ClipTextEncoder:
    """Text encoder 2: CLIP-L. A prompt gives one vector; its second text is taken where it has one
    (--prompt_2).
    """

    name = "clipL"
    keys = frozenset({"clipL", "clipL_mask"})
    variable_length: frozenset[str] = frozenset()

    def __init__(self, path: Path, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None) -> None:
        """path: file or folder of the model, or a release's folder that holds it as `text_encoder_2`. dtype:
        it computes in.
        """
        self.path = inside(path, "text_encoder_2")
        self.dtype = dtype
        self.tokenizer = tokenizer
        self._loaded = Loaded[ClipText, ClipTokenizer]()

    @property
    def identity(self) -> Mapping[str, str]:
        """Content of the checkpoint and of the tokenizer, what config.json adds, and the dtype. Reads a few
        MB.

        Raises CheckpointError where the file is of another model.
        """
        with open_checkpoint(self.path) as checkpoint:
            config = read_clip_text(checkpoint).config
        return {
            "clipL": fingerprint(self.path),
            "clipL_config": f"{config.num_heads} heads, {config.activation}, eps {config.eps}",
            "clipL_tokenizer": clip_tokenizer_identity(self.tokenizer, self.path),
            "clipL_dtype": dtype_name(self.dtype),
        }

    def load(self, device: torch.device) -> None:
        """Read encoder and tokenizer. A loaded encoder moves to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[ClipText, ClipTokenizer]:
        tokenizer = load_clip_tokenizer(self.tokenizer, self.path)
        clip = load_clip_text(self.path, device, self.dtype)
        logger.info("text encoder 2: %s, computing in %s", self.path, dtype_name(self.dtype))
        return clip, tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """For each prompt {"clipL": C, "clipL_mask": 77 int64, 1 for real tokens}, on the CPU.

        Raises CheckpointError where the tokenizer knows more tokens than the model.
        """
        clip, tokenizer = self._loaded.get()
        rows = [
            tokenizer.tokenize(prompt.text if prompt.second is None else prompt.second) for prompt in prompts
        ]
        if not rows:
            return []
        ids, mask = _filled(rows, CLIP_TOKENS, tokenizer.end)
        _check_ids(
            ids, clip.embeddings.token_embedding.num_embeddings, self.path, "--text_encoder2_tokenizer"
        )
        ends = torch.tensor([row.index(tokenizer.end) for row in rows])
        pooled = clip(ids.to(clip.device), ends.to(clip.device)).cpu()
        return [
            {"clipL": state.clone(), "clipL_mask": real.clone()}
            for state, real in zip(pooled, mask, strict=True)
        ]

    def free(self) -> None:
        """Give the memory back."""
        self._loaded.free()


def _filled(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each B L int64, rows filled up on the right."""
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask = torch.tensor([[*[1] * len(row), *[0] * (length - len(row))] for row in rows])
    return ids, mask


def _check_ids(ids: Tensor, known: int, path: Path, option: str) -> None:
    largest = int(ids.max())
    if largest >= known:
        raise CheckpointError(
            f"{path} knows {known} tokens, its tokenizer has more (token {largest}). Give its own to "
            f"{option}.",
            path,
        )
