"""Lumina-Image-2.0's text encoder, as the shared loops use it: Gemma 2, behind the words of a system prompt.

Names and shapes of the outputs are those of the known caches. Source: the released model, Qin et al. 2025,
arXiv 2503.21758.
"""
# Letters: B prompts, L tokens, C = width of the model

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from encoders.piece_tokenizers import (
    check_ids,
    fill_rows,
    find_tokenizer,
    load_tokenizer,
    no_token,
    piece_places,
    read_pieces,
)
from lumina.configs import PROMPT_START
from lumina.gemma import gemma_states, load_gemma, read_gemma, require_transformers
from lumina.options import MAX_TOKENS
from modules.checkpoints.model_files import inside
from modules.checkpoints.opening import fingerprint, open_checkpoint
from modules.checkpoints.tokenizers import TokenizerFiles, token_places
from modules.contract.data import Conditions, weigh_rows
from modules.contract.requests import Prompt
from modules.contract.rules import CountTokens, Place, TokenCount, kept_characters, token_weights
from modules.devices import dtype_name
from modules.offload.host_memory import LoadedNetwork

logger = logging.getLogger(__name__)

BEGIN = "<bos>"
GEMMA_FILES = TokenizerFiles(
    option="--gemma2_tokenizer",
    names=("tokenizer.json", "tokenizer.model"),
    folder="tokenizer",
    repository="Alpha-VLLM/Lumina-Image-2.0",
    # beside a single file; diffusers pipelines, with text_encoder and tokenizer side by side; google's folder
    beside=("tokenizer", "../tokenizer", "."),
    token="<start_of_turn>",
)


@dataclass(frozen=True)
class GemmaTokenizer:
    """Turn text into token ids of any length, the begin token first, each with its place in the text."""

    read: Callable[[str], tuple[list[int], list[Place]]]


def gemma_tokenizer_identity(path: Path | None, checkpoint_path: Path) -> str:
    """Return the tokenizer's identity for cache records. path: of --gemma2_tokenizer, or None.

    Raises CheckpointError if `path` is given and is not a tokenizer.
    """
    return find_tokenizer(GEMMA_FILES, path, checkpoint_path).identity


def load_gemma_tokenizer(
    path: Path | None, checkpoint_path: Path, may_download: bool = True
) -> GemmaTokenizer:
    """Load the tokenizer. path: of --gemma2_tokenizer; None looks for it.

    Raises CheckpointError if there is none, it cannot be read, or the hub cannot be reached.
    """
    return load_tokenizer(GEMMA_FILES, path, checkpoint_path, _from_json, _from_sentencepiece, may_download)


def _from_json(file: Path) -> GemmaTokenizer:
    tokenizer = GEMMA_FILES.read(file)
    begin = tokenizer.token_to_id(BEGIN)
    if begin is None:
        raise GEMMA_FILES.unreadable(file, ValueError(f"it has no {BEGIN}"))
    added = [] if tokenizer.encode("").ids[:1] == [begin] else [begin]

    def read(text: str) -> tuple[list[int], list[Place]]:
        encoded = tokenizer.encode(text)
        return [*added, *encoded.ids], [*(None for _ in added), *token_places(encoded)]

    return GemmaTokenizer(read)


def _from_sentencepiece(model: bytes, origin: Path) -> GemmaTokenizer:
    processor = read_pieces(GEMMA_FILES, model, origin)
    begin = processor.bos_id()
    if begin < 0:
        raise no_token(GEMMA_FILES, origin, f"begin token {BEGIN}", "Gemma 2")

    def read(text: str) -> tuple[list[int], list[Place]]:
        ids: list[int] = processor.encode(text)
        return [begin, *ids], [None, *piece_places(processor, text)]

    return GemmaTokenizer(read)


TOKEN_STEP = 8  # of the padded length
PAD = 0
PROMPTS_AT_ONCE = 8  # bounds memory when many prompts are given


class GemmaTextEncoder:
    """Gemma 2 up to its last but one state. Rows behind a text's end are zeros and masked."""

    name = "gemma2"
    keys = frozenset({"hidden_state", "attention_mask", "input_ids"})
    variable_length: frozenset[str] = frozenset()
    lora_prefix = "lora_te"

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Path | None = None,
        system_prompt: str = "",
        in_negative: bool = False,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """Set up the encoder; `load` reads the files.

        path: file or folder of the model, or a release's folder that holds it as `text_encoder`. dtype:
        compute dtype. system_prompt: words before every prompt; empty: none. in_negative: before negative
        prompts too. max_tokens: rounded up to a multiple of 8.
        """
        self.path = inside(path, "text_encoder")
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.in_negative = in_negative
        self.length = -(-max_tokens // TOKEN_STEP) * TOKEN_STEP
        self.max_tokens = max_tokens
        self._loaded = LoadedNetwork[nn.Module, GemmaTokenizer]()

    @property
    def identity(self) -> Mapping[str, str]:
        """Return fingerprints of checkpoint and tokenizer, config.json's values and the options used.

        Raises CheckpointError if the file holds another model.
        """
        with open_checkpoint(self.path) as checkpoint:
            config = read_gemma(checkpoint).config
        return {
            "gemma2": fingerprint(self.path),
            "gemma2_config": f"{config.num_heads} heads, theta {config.theta}, scaled by {config.scalar}",
            "gemma2_tokenizer": gemma_tokenizer_identity(self.tokenizer, self.path),
            "gemma2_dtype": dtype_name(self.dtype),
            "gemma2_tokens": str(self.max_tokens),
            "system_prompt": self.system_prompt,
        }

    @property
    def network(self) -> nn.Module:
        """Return Gemma 2, into whose layers a LoRA goes. Call `load` first."""
        return self._loaded.get()[0]

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens with those of the system prompt and the begin token.

        Only the tokenizer is loaded. Raises CheckpointError if there is none here; none is downloaded.
        """
        read = load_gemma_tokenizer(self.tokenizer, self.path, may_download=False).read
        before = len(self.text_of(Prompt("")))

        def count(text: str) -> TokenCount:
            whole = self.text_of(Prompt(text))
            ends = [0 if place is None else place[1] for place in read(whole)[1]]
            kept = kept_characters(ends, self.max_tokens, len(whole)) - before
            return TokenCount(text, len(ends), self.max_tokens, min(max(kept, 0), len(text)))

        return count

    def text_of(self, prompt: Prompt) -> str:
        """Return the model's text: the prompt, behind the system prompt if that stands before it."""
        if not self.system_prompt or (prompt.is_negative and not self.in_negative):
            return prompt.text
        return f"{self.system_prompt} {PROMPT_START} {prompt.text}"

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[nn.Module, GemmaTokenizer]:
        require_transformers()
        # first, so that a bad tokenizer is reported before gigabytes are read
        tokenizer = load_gemma_tokenizer(self.tokenizer, self.path)
        gemma = load_gemma(self.path, device, self.dtype)
        logger.info("text encoder: %s, computing in %s", self.path, dtype_name(self.dtype))
        if self.system_prompt:
            logger.info("system prompt: %s", self.system_prompt)
        return gemma, tokenizer

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return {"hidden_state": L C, "attention_mask": L, "input_ids": L} for each prompt.

        They are on the CPU, masks and ids int64; gradients flow to trained parts of the network. The states
        of a part's tokens are multiplied by the part's weight.
        Raises CheckpointError if the tokenizer has more tokens than the model.
        """
        gemma, tokenizer = self._loaded.get()
        embeddings = gemma.get_parameter("embed_tokens.weight")
        known, device = len(embeddings), embeddings.device
        texts = [self.text_of(prompt) for prompt in prompts]
        read = [tokenizer.read(text) for text in texts]
        for (row, _), prompt in zip(read, prompts, strict=True):
            if len(row) > self.max_tokens:
                logger.info(
                    "%d tokens of the prompt are cut off, %d are used: %.60s",
                    len(row) - self.max_tokens,
                    self.max_tokens,
                    prompt.text,
                )
        results: list[Conditions] = []
        for first in range(0, len(read), PROMPTS_AT_ONCE):
            rows = [row[: self.max_tokens] for row, _ in read[first : first + PROMPTS_AT_ONCE]]
            check_ids(rows, known, self.path, GEMMA_FILES.option)
            ids, mask = fill_rows(rows, self.length, PAD)
            states = gemma_states(gemma, ids.to(device), mask.to(device)).cpu() * mask[..., None]
            results += [
                {"hidden_state": state.clone(), "attention_mask": real.clone(), "input_ids": row.clone()}
                for state, real, row in zip(states, mask, ids, strict=True)
            ]
        for index, prompt in enumerate(prompts):
            if prompt.spans:
                before = len(texts[index]) - len(prompt.text)
                spans = [(first + before, last + before, weight) for first, last, weight in prompt.spans]
                places = read[index][1][: self.max_tokens]
                weights = token_weights(texts[index], places, spans)
                weighed = weigh_rows(results[index]["hidden_state"], weights)
                results[index] = {**results[index], "hidden_state": weighed}
        return results

    def free(self) -> None:
        """Release the encoder and its memory."""
        self._loaded.free()
