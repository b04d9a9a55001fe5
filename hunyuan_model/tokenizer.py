"""The tokenizer of HunyuanVideo's language model, exactly as its file describes it.

tokenizer.json is read directly: the classes that transformers choose by name rebuild some of these tokenizers
with other rules.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from modules.checkpoints.tokenizers import TokenizerFiles, token_places
from modules.contract.rules import Place
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)

BEGIN = "<|begin_of_text|>"

LLAMA_FILES = TokenizerFiles(
    option="--text_encoder1_tokenizer",
    names=("tokenizer.json",),
    folder="tokenizer",
    repository="hunyuanvideo-community/HunyuanVideo",
    # inside the encoder's folder (official); beside a single file; beside text_encoder (diffusers)
    beside=(".", "llava_llama3", "tokenizer", "../tokenizer"),
    token=BEGIN,
)


@dataclass(frozen=True)
class LlamaTokenizer:
    """Turn text into token ids, the begin token first. `pad`: the id to pad rows with."""

    tokenize: Callable[[str], list[int]]  # of any length
    pad: int
    places: Callable[[str], list[Place]]  # of the same tokens; one that the tokenizer adds has none


def llama_tokenizer_identity(path: Path | None, encoder: Path) -> str:
    """Return the tokenizer's identity for cache records.

    path: of --text_encoder1_tokenizer; None looks for it.
    """
    return LLAMA_FILES.identity(LLAMA_FILES.find(path, encoder))


def load_llama_tokenizer(path: Path | None, encoder: Path) -> LlamaTokenizer:
    """Load the language model's tokenizer.

    path: of --text_encoder1_tokenizer; None looks for it beside the encoder, then on the hub.
    Raises CheckpointError if there is none or it cannot be read.
    """
    file = LLAMA_FILES.find(path, encoder) or LLAMA_FILES.download(encoder)
    logger.info("tokenizer of text encoder 1: %s", file)
    tokenizer, first = _read_llama(file)

    def tokenize(text: str) -> list[int]:
        return [*first, *tokenizer.encode(text).ids]

    def places(text: str) -> list[Place]:
        return [*(None for _ in first), *token_places(tokenizer.encode(text))]

    return LlamaTokenizer(tokenize, _pad(tokenizer, file), places)


def load_llama_ends(path: Path | None, encoder: Path) -> Callable[[str], list[int]]:
    """Return a function: text -> the end of each token in it, however many there are.

    path: as for `load_llama_tokenizer`.

    Raises CheckpointError if there is none here or it cannot be read; none is downloaded.
    """
    tokenizer, first = _read_llama(LLAMA_FILES.find(path, encoder) or LLAMA_FILES.require_local(encoder))
    return lambda text: [*(0 for _ in first), *(end for _, end in tokenizer.encode(text).offsets)]


def _read_llama(file: Path) -> tuple[Tokenizer, list[int]]:
    """Return the tokenizer, and the begin token if it does not add that itself.

    Some files leave it to transformers to add the begin token.
    """
    tokenizer = LLAMA_FILES.read(file)
    begin = tokenizer.token_to_id(BEGIN)
    has_own = tokenizer.encode("").ids[:1] == [begin]
    return tokenizer, [] if begin is None or has_own else [begin]


def _pad(tokenizer: Tokenizer, file: Path) -> int:
    """Return the id to pad rows with. Padding is masked, so results do not depend on it."""
    try:
        told = parse_json(read_text(file.with_name("tokenizer_config.json"))).get("pad_token")
    except (OSError, ValueError, AttributeError):
        told = None  # the file is optional
    name = told.get("content") if isinstance(told, dict) else told
    candidates = (name, "<pad>", "<|end_of_text|>")
    ids = (tokenizer.token_to_id(token) for token in candidates if isinstance(token, str))
    return next((number for number in ids if number is not None), 0)
