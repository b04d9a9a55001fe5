"""The tokenizers of HunyuanVideo's text encoders, exactly as their files describe them.

tokenizer.json is read directly: the classes that transformers choose by name rebuild some of these tokenizers
with other rules.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from hunyuan_model.text_checkpoints import CLIP_TOKENS
from modules.checkpoints.tokenizers import TokenizerFiles, token_places
from modules.contract.tokens import Place
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)

BEGIN = "<|begin_of_text|>"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# how CLIP splits a text before merging, for files other than tokenizer.json, which states it. Source: Radford
# et al. 2021, arXiv 2103.00020
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

LLAMA_FILES = TokenizerFiles(
    option="--text_encoder1_tokenizer",
    names=("tokenizer.json",),
    folder="tokenizer",
    repository="hunyuanvideo-community/HunyuanVideo",
    # inside the encoder's folder (official); beside a single file; beside text_encoder (diffusers)
    beside=(".", "llava_llama3", "tokenizer", "../tokenizer"),
    token=BEGIN,
)
CLIP_FILES = TokenizerFiles(
    option="--text_encoder2_tokenizer",
    names=("tokenizer.json", "vocab.json"),
    folder="",
    repository="openai/clip-vit-large-patch14",
    beside=(".", "clip_l", "tokenizer_2", "../tokenizer_2"),
    token=CLIP_START,
)


# text -> the end of each token in it, however many; of CLIP's without the tokens around a text
TokenEnds = Callable[[str], list[int]]


@dataclass(frozen=True)
class LlamaTokenizer:
    """Turn text into token ids, the begin token first. `pad`: the id to pad rows with."""

    tokenize: Callable[[str], list[int]]  # of any length
    pad: int
    places: Callable[[str], list[Place]]  # of the same tokens; one that the tokenizer adds has none


@dataclass(frozen=True)
class ClipTokenizer:
    """Turn text into at most 77 token ids, with a start and an end token."""

    tokenize: Callable[[str], list[int]]
    end: int


def llama_tokenizer_identity(path: Path | None, encoder: Path) -> str:
    """Return what distinguishes the tokenizer in cache records.

    path: of --text_encoder1_tokenizer; None looks for it.
    """
    return LLAMA_FILES.identity(LLAMA_FILES.find(path, encoder))


def clip_tokenizer_identity(path: Path | None, encoder: Path) -> str:
    """Return what distinguishes the tokenizer in cache records.

    path: of --text_encoder2_tokenizer; None looks for it.
    """
    file = CLIP_FILES.find(path, encoder)
    merges = None if file is None else _merges_of(file)
    return CLIP_FILES.identity(file) + ("" if merges is None else CLIP_FILES.identity(merges))


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


def load_llama_ends(path: Path | None, encoder: Path) -> TokenEnds:
    """Load the language model's tokenizer to count tokens. path: as for `load_llama_tokenizer`.

    Raises CheckpointError if there is none here or it cannot be read; none is downloaded.
    """
    tokenizer, first = _read_llama(LLAMA_FILES.find(path, encoder) or LLAMA_FILES.require_local(encoder))
    return lambda text: [*(0 for _ in first), *(end for _, end in tokenizer.encode(text).offsets)]


def load_clip_ends(path: Path | None, encoder: Path) -> TokenEnds:
    """Load CLIP's tokenizer to count tokens. path: as for `load_clip_tokenizer`.

    Raises CheckpointError if there is none here or it cannot be read; none is downloaded.
    """
    tokenizer = _read_clip(CLIP_FILES.find(path, encoder) or CLIP_FILES.require_local(encoder))
    return lambda text: [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]


def load_clip_tokenizer(path: Path | None, encoder: Path) -> ClipTokenizer:
    """Load CLIP's tokenizer from tokenizer.json, or from vocab.json with merges.txt.

    path: of --text_encoder2_tokenizer; None looks for it beside the encoder, then on the hub.
    Raises CheckpointError if there is none or it cannot be read.
    """
    file = CLIP_FILES.find(path, encoder) or CLIP_FILES.download(encoder)
    logger.info("tokenizer of text encoder 2: %s", file)
    tokenizer = _read_clip(file)
    tokenizer.enable_truncation(CLIP_TOKENS)
    around = tokenizer.encode("").ids
    if len(around) != 2 or around[1] != tokenizer.token_to_id(CLIP_END):
        raise CLIP_FILES.unreadable(
            file, ValueError(f"it does not put a text between {CLIP_START} and {CLIP_END}")
        )

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return ClipTokenizer(tokenize, around[1])


def _read_llama(file: Path) -> tuple[Tokenizer, list[int]]:
    """Return the tokenizer, and the begin token if it does not add that itself.

    Some files leave it to transformers to add the begin token.
    """
    tokenizer = LLAMA_FILES.read(file)
    begin = tokenizer.token_to_id(BEGIN)
    has_own = tokenizer.encode("").ids[:1] == [begin]
    return tokenizer, [] if begin is None or has_own else [begin]


def _read_clip(file: Path) -> Tokenizer:
    """Read tokenizer.json, or vocab.json with merges.txt."""
    merges = _merges_of(file)
    return CLIP_FILES.read(file) if merges is None else _from_merges(file, merges)


def _merges_of(file: Path) -> Path | None:
    """Return the second file of a tokenizer in the form of CLIP's release, or None for a tokenizer.json."""
    return file.with_name("merges.txt") if file.name == "vocab.json" else None


def _from_merges(vocabulary: Path, merges: Path) -> Tokenizer:
    for file in (vocabulary, merges):
        CLIP_FILES.check_bytes(file)
    try:
        model = models.BPE.from_file(
            str(vocabulary), str(merges), unk_token=CLIP_END, end_of_word_suffix="</w>"
        )
    except Exception as error:  # the library raises nothing more precise
        raise CLIP_FILES.unreadable(vocabulary, error) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    start, end = (tokenizer.token_to_id(token) for token in (CLIP_START, CLIP_END))
    if start is None or end is None:
        raise CLIP_FILES.unreadable(vocabulary, ValueError(f"it has no {CLIP_START} or no {CLIP_END}"))
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, end), (CLIP_START, start), False, False
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer


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
