"""CLIP's tokenizer, exactly as its files describe it.

tokenizer.json is read directly: the classes that transformers choose by name rebuild some tokenizers with
other rules.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from encoders.clip_checkpoints import CLIP_END, CLIP_START, CLIP_TOKENS
from modules.checkpoints.tokenizers import TokenizerFiles

logger = logging.getLogger(__name__)

# how CLIP splits a text before merging, for files other than tokenizer.json, which states it. Source: Radford
# et al. 2021, arXiv 2103.00020
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class ClipTokenizer:
    """Turn text into at most 77 token ids, with a start and an end token."""

    tokenize: Callable[[str], list[int]]
    end: int


def clip_tokenizer_identity(files: TokenizerFiles, path: Path | None, encoder: Path) -> str:
    """Return the tokenizer's identity for cache records.

    files: where it may be. path: of its option; None looks for it.
    """
    file = files.find(path, encoder)
    merges = None if file is None else _merges_of(file)
    return files.identity(file) + ("" if merges is None else files.identity(merges))


def load_clip_ends(files: TokenizerFiles, path: Path | None, encoder: Path) -> Callable[[str], list[int]]:
    """Return a function: text -> the end of each token in it, however many, without those around a text.

    files, path: as for `load_clip_tokenizer`.

    Raises CheckpointError if there is none here or it cannot be read; none is downloaded.
    """
    tokenizer = _read_clip(files, files.find(path, encoder) or files.require_local(encoder))
    return lambda text: [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]


def load_clip_tokenizer(files: TokenizerFiles, path: Path | None, encoder: Path) -> ClipTokenizer:
    """Load CLIP's tokenizer from tokenizer.json, or from vocab.json with merges.txt.

    files: where it may be. path: of its option; None looks for it beside the encoder, then on the hub.
    Raises CheckpointError if there is none or it cannot be read.
    """
    file = files.find(path, encoder) or files.download(encoder)
    logger.info("tokenizer of CLIP-L: %s", file)
    tokenizer = _read_clip(files, file)
    tokenizer.enable_truncation(CLIP_TOKENS)
    around = tokenizer.encode("").ids
    if len(around) != 2 or around[1] != tokenizer.token_to_id(CLIP_END):
        raise files.unreadable(
            file, ValueError(f"it does not put a text between {CLIP_START} and {CLIP_END}")
        )

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return ClipTokenizer(tokenize, around[1])


@dataclass(frozen=True)
class ClipWords:
    """Turn text into token ids, however many, without start and end; and the ids of those."""

    tokenize: Callable[[str], list[int]]
    start: int
    end: int


def load_clip_words(files: TokenizerFiles, file: Path) -> ClipWords:
    """Load CLIP's tokenizer from a file that was found, without truncation.

    Raises CheckpointError if it cannot be read or has no start or end token.
    """
    tokenizer = _read_clip(files, file)
    start, end = (tokenizer.token_to_id(token) for token in (CLIP_START, CLIP_END))
    if start is None or end is None:
        raise files.unreadable(file, ValueError(f"it has no {CLIP_START} or no {CLIP_END}"))

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return ClipWords(tokenize, start, end)


def _read_clip(files: TokenizerFiles, file: Path) -> Tokenizer:
    """Read tokenizer.json, or vocab.json with merges.txt."""
    merges = _merges_of(file)
    return files.read(file) if merges is None else _from_merges(files, file, merges)


def _merges_of(file: Path) -> Path | None:
    """Return the second file of a tokenizer in the form of CLIP's release, or None for a tokenizer.json."""
    return file.with_name("merges.txt") if file.name == "vocab.json" else None


def _from_merges(files: TokenizerFiles, vocabulary: Path, merges: Path) -> Tokenizer:
    for file in (vocabulary, merges):
        files.check_bytes(file)
    try:
        model = models.BPE.from_file(
            str(vocabulary), str(merges), unk_token=CLIP_END, end_of_word_suffix="</w>"
        )
    except Exception as error:  # the library raises nothing more precise
        raise files.unreadable(vocabulary, error) from error
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
        raise files.unreadable(vocabulary, ValueError(f"it has no {CLIP_START} or no {CLIP_END}"))
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, end), (CLIP_START, start), False, False
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer
