"""HunyuanVideo's two text encoders, as the shared loops use them: a language model and CLIP-L.

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

from encoders.clip_checkpoints import ClipUse, clip_tokenizer_files
from encoders.clip_l import ClipTextEncoder
from encoders.piece_tokenizers import check_ids, fill_rows
from hunyuan_model.configs import SKIP_LAYERS
from hunyuan_model.llama import Llama, load_llama
from hunyuan_model.text_checkpoints import read_llama
from hunyuan_model.tokenizer import (
    LlamaTokenizer,
    llama_tokenizer_identity,
    load_llama_ends,
    load_llama_tokenizer,
)
from modules.checkpoints.model_files import inside
from modules.checkpoints.opening import fingerprint, open_checkpoint
from modules.contract.data import Conditions, weigh_rows
from modules.contract.requests import Prompt
from modules.contract.rules import CountTokens, Place, TokenCount, kept_characters, token_weights
from modules.devices import dtype_name
from modules.offload.host_memory import LoadedNetwork

logger = logging.getLogger(__name__)

CLIP = ClipUse(
    name="clipL",
    pooled="clipL",
    mask="clipL_mask",
    what="text encoder 2",
    option="--text_encoder2",
    release="the folder text_encoder_2 of HunyuanVideo, clip-vit-large-patch14 or clip_l.safetensors",
    folder="text_encoder_2",
    tokenizer=clip_tokenizer_files(
        "--text_encoder2_tokenizer", (".", "clip_l", "tokenizer_2", "../tokenizer_2")
    ),
)

PROMPT_TOKENS = 256  # states of the language model that are kept
PROMPTS_AT_ONCE = 8  # bounds memory when many prompts are given


@dataclass(frozen=True)
class PromptTemplate:
    """The chat given to the language model: a system text, then the prompt as the user's words.

    crop_start: number of tokens before the prompt, whose states are cut off; None: count them.
    """

    system: str
    crop_start: int | None = None

    @property
    def before(self) -> str:
        """Return all text before the prompt."""
        system = f"<|start_header_id|>system<|end_header_id|>\n\n{self.system}<|eot_id|>"
        return system + "<|start_header_id|>user<|end_header_id|>\n\n"

    def of(self, prompt: str) -> str:
        """Return the whole text."""
        return f"{self.before}{prompt}<|eot_id|>"

    @property
    def text(self) -> str:
        """Return the template as the release writes it, with `{}` in place of the prompt."""
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


def template_of(system: str | None) -> PromptTemplate:
    """Return the template with a system text of one's own; None: the release's for videos."""
    return VIDEO_TEMPLATE if system is None else PromptTemplate(system)


class LlavaTextEncoder:
    """Text encoder 1: the Llama 3 of LLaVA. Each prompt gives 256 states; those after its end are masked."""

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
        """Set up the encoder; `load` reads the files.

        path: file or folder of the model, or a release's folder that holds it as `text_encoder`. dtype:
        compute dtype. skip_layers: number of layers after the state that is returned; 0 returns the last
        state, always normed. final_norm: norm other states too. in_fp8: keep the linear layers in 8 bits.
        """
        self.path = inside(path, "text_encoder")
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.template = template
        self.skip_layers = skip_layers
        self.final_norm = final_norm or skip_layers == 0
        self.in_fp8 = in_fp8
        # the tokenizer, and the number of tokens before the prompt
        self._loaded = LoadedNetwork[Llama, tuple[LlamaTokenizer, int]]()

    @property
    def identity(self) -> Mapping[str, str]:
        """Return fingerprints of checkpoint and tokenizer, config.json's values and the options used.

        Reads a few MB.
        Raises CheckpointError if the file holds another model.
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

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens with the end token of its turn in the chat.

        Only the tokenizer is loaded. Raises CheckpointError if there is none here; none is downloaded.
        """
        find_ends = load_llama_ends(self.tokenizer, self.path)
        before, known = self.template.before, self.template.crop_start
        start = len(find_ends(before)) if known is None else known

        def count(text: str) -> TokenCount:
            ends = [end - len(before) for end in find_ends(self.template.of(text))]
            kept = kept_characters(ends, start + PROMPT_TOKENS, len(text))
            return TokenCount(text, max(len(ends) - start, 0), PROMPT_TOKENS, min(max(kept, 0), len(text)))

        return count

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[Llama, tuple[LlamaTokenizer, int]]:
        # first, so that a bad tokenizer is reported before gigabytes are read
        tokenizer = load_llama_tokenizer(self.tokenizer, self.path)
        start = self._crop_start(tokenizer)
        llama = load_llama(self.path, device, self.dtype, self.skip_layers, self.final_norm, self.in_fp8)
        logger.info("text encoder 1: %s, computing in %s", self.path, dtype_name(self.dtype))
        return llama, (tokenizer, start)

    def _crop_start(self, tokenizer: LlamaTokenizer) -> int:
        """Return the number of tokens before the prompt."""
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
                "the tokenizer makes %d tokens of the template before the prompt, the model's own makes "
                "%d: prompts will be cut "
                "in the wrong place. Give the tokenizer of this model to --text_encoder1_tokenizer.",
                counted,
                known,
            )
        return known

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return {"llm": 256 C, "llm_mask": 256 int64, 1 for real tokens} on the CPU for each prompt.

        The states of a part's tokens are multiplied by the part's weight.
        Raises CheckpointError if the tokenizer has more tokens than the model.
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
        kept = [row[:length] for row in rows]
        check_ids(
            [*kept, [tokenizer.pad]],
            llama.embed_tokens.num_embeddings,
            self.path,
            "--text_encoder1_tokenizer",
        )
        results: list[Conditions] = []
        for first in range(0, len(rows), PROMPTS_AT_ONCE):
            ids, mask = fill_rows(kept[first : first + PROMPTS_AT_ONCE], length, tokenizer.pad)
            states = llama(ids.to(llama.device), mask.to(llama.device))[:, start:].cpu()
            results += [
                {"llm": state.clone(), "llm_mask": kept.clone()}
                for state, kept in zip(states, mask[:, start:], strict=True)
            ]
        return [
            {**found, "llm": weigh_rows(found["llm"], self._weights(prompt, tokenizer, start))}
            if prompt.spans
            else found
            for prompt, found in zip(prompts, results, strict=True)
        ]

    def _weights(self, prompt: Prompt, tokenizer: LlamaTokenizer, start: int) -> list[float]:
        """Return the weights of the tokens from `start` on, which are all those that are kept."""
        whole = self.template.of(prompt.text)
        places = tokenizer.places(whole)[start : start + PROMPT_TOKENS]
        return weights_within(prompt, whole, len(self.template.before), places)

    def free(self) -> None:
        """Release the encoder and its memory."""
        self._loaded.free()


def weights_within(prompt: Prompt, whole: str, before: int, places: Sequence[Place]) -> list[float]:
    """Return the weights of the tokens of a template with its prompt; those around the prompt have 1.

    whole: the text with the prompt at the character `before`. places: of its tokens.
    """
    end = len(prompt.text)
    own = [None if place is None or not 0 <= place[0] - before < end else place for place in places]
    shifted = [(first + before, last + before, weight) for first, last, weight in prompt.spans]
    return token_weights(whole, own, shifted)


def clip_text_encoder(
    path: Path, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None
) -> ClipTextEncoder:
    """Make text encoder 2: CLIP-L. Arguments as of `ClipTextEncoder`."""
    return ClipTextEncoder(path, dtype, tokenizer, CLIP)
