"""The tokenizer of umT5, found as a folder or file, beside the checkpoint, inside it, or on the hub."""

import bisect
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from modules.checkpoints.opening import open_checkpoint
from modules.checkpoints.tokenizer_growth import piece_surfaces
from modules.checkpoints.tokenizers import TokenizerFiles, token_places
from modules.contract.tokens import CountTokens, Place, TokenCount, kept_characters
from modules.errors import CheckpointError
from wan.encoder_checkpoints import SPIECE_MODEL

logger = logging.getLogger(__name__)

LONGEST_PIECE = 64  # characters of a token, at most
MAX_TOKENS = 512  # with the end token, as trained
END = "</s>"
FILES = TokenizerFiles(
    option="--t5_tokenizer",
    names=("tokenizer.json", "spiece.model", "tokenizer.model"),
    folder="google/umt5-xxl",  # in the released repositories of Wan2.1
    repository="Wan-AI/Wan2.1-T2V-14B",
    # official repositories; diffusers pipelines, with text_encoder and tokenizer side by side; a tokenizer
    # saved in the text encoder's folder
    beside=("google/umt5-xxl", "tokenizer", "../tokenizer", "."),
)


@dataclass(frozen=True)
class T5Tokenizer:
    """Turn text into at most MAX_TOKENS token ids, the end token last."""

    tokenize: Callable[[str], list[int]]
    places: Callable[[str], list[Place]]  # of the same tokens

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.tokenize(text)


@dataclass(frozen=True)
class TokenizerPlace:
    """The tokenizer's source: a file, the bytes inside a checkpoint, or (neither is set) the hub."""

    file: Path | None = None
    inside: Path | None = None

    @property
    def identity(self) -> str:
        """Return what distinguishes the tokenizer in cache records."""
        return "inside the checkpoint" if self.inside is not None else FILES.identity(self.file)


def find_tokenizer(path: Path | None, checkpoint_path: Path) -> TokenizerPlace:
    """Find the tokenizer: the one --t5_tokenizer names, else beside the checkpoint, inside it, or on the hub.

    Raises CheckpointError if `path` is given and is not a tokenizer.
    """
    file = FILES.find(path, checkpoint_path)
    if file is not None:
        return TokenizerPlace(file)
    with open_checkpoint(checkpoint_path) as checkpoint:
        has_own = any(name.endswith(SPIECE_MODEL) for name in checkpoint.tensors)
    return TokenizerPlace(inside=checkpoint_path) if has_own else TokenizerPlace()


def load_tokenizer(path: Path | None, checkpoint_path: Path) -> T5Tokenizer:
    """Load the tokenizer. path: of --t5_tokenizer; None looks for it with `find_tokenizer`.

    Raises CheckpointError if there is none, it cannot be read, or the hub cannot be reached.
    """
    place = find_tokenizer(path, checkpoint_path)
    if place.inside is not None:
        logger.info("tokenizer: the one inside %s", place.inside)
        return _from_sentencepiece(_read_embedded(place.inside), place.inside)
    file = place.file or FILES.download(checkpoint_path)
    logger.info("tokenizer: %s", file)
    if file.suffix == ".json":
        return _from_json(file)
    return _from_sentencepiece(FILES.read_bytes(file), file)


def load_token_counter(path: Path | None, checkpoint_path: Path) -> CountTokens:
    """Load the tokenizer to count tokens. path: as for `load_tokenizer`. Nothing is downloaded.

    Raises CheckpointError if there is none here or it cannot be read.
    """
    place = find_tokenizer(path, checkpoint_path)
    if place.inside is not None:
        return _count_pieces(_sentencepiece(_read_embedded(place.inside), place.inside))
    file = place.file or FILES.require_local(checkpoint_path)
    if file.suffix != ".json":
        return _count_pieces(_sentencepiece(FILES.read_bytes(file), file))
    tokenizer = FILES.read(file)

    def count(text: str) -> TokenCount:
        ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
        return TokenCount(text, len(ends) + 1, MAX_TOKENS, kept_characters(ends, MAX_TOKENS - 1, len(text)))

    return count


def _count_pieces(processor: sentencepiece.SentencePieceProcessor) -> CountTokens:
    """Count the tokens of a SentencePiece model, which does not tell where a piece stands in the text."""

    def fits(text: str) -> bool:
        return len(processor.encode(text)) < MAX_TOKENS

    def count(text: str) -> TokenCount:
        tokens, kept = len(processor.encode(text)) + 1, len(text)
        if tokens > MAX_TOKENS:  # the longest beginning that fits
            most = range(min(len(text), LONGEST_PIECE * MAX_TOKENS))
            kept = bisect.bisect_left(most, True, key=lambda length: not fits(text[: length + 1]))
        return TokenCount(text, tokens, MAX_TOKENS, kept)

    return count


def _read_embedded(checkpoint_path: Path) -> bytes:
    with open_checkpoint(checkpoint_path) as checkpoint:
        name = next(name for name in checkpoint.tensors if name.endswith(SPIECE_MODEL))
        return checkpoint.read(name).numpy().tobytes()


def _from_json(file: Path) -> T5Tokenizer:
    """Load tokenizer.json as it is (normalisation, special tokens), and truncate to the trained length."""
    tokenizer = FILES.read(file)
    tokenizer.enable_truncation(MAX_TOKENS)
    end = tokenizer.token_to_id(END)
    if tokenizer.encode("").ids[-1:] != [end]:
        logger.warning("tokenizer %s does not end texts with %s, but umT5 was trained with it", file, END)

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return T5Tokenizer(tokenize, lambda text: token_places(tokenizer.encode(text)))


def _sentencepiece(model: bytes, origin: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise FILES.unreadable(origin, error) from error
    FILES.check_sentencepiece(model, origin)
    return processor


def _from_sentencepiece(model: bytes, origin: Path) -> T5Tokenizer:
    processor = _sentencepiece(model, origin)
    end = processor.eos_id()
    if end < 0:
        raise CheckpointError(
            f"{origin}: the tokenizer has no end token {END}. Give the tokenizer of umT5 to --t5_tokenizer.",
            origin,
        )

    def tokenize(text: str) -> list[int]:
        ids: list[int] = processor.encode(text)
        return [*ids[: MAX_TOKENS - 1], end]

    def places(text: str) -> list[Place]:
        surfaces = piece_surfaces(processor.encode(text, out_type="serialized_proto"))
        # they follow one another; white space that is dropped can only stand in front of them
        ends = itertools.accumulate(map(len, surfaces), initial=len(text) - sum(map(len, surfaces)))
        return [*itertools.islice(itertools.pairwise(ends), MAX_TOKENS - 1), None]

    return T5Tokenizer(tokenize, places)
