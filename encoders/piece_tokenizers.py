"""Tokenizers of SentencePiece and T5 (a file, beside the checkpoint, inside it, on the hub); rows of ids."""

import bisect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import sentencepiece
import torch
from torch import Tensor

from modules.checkpoints.encoders import SPIECE_MODEL
from modules.checkpoints.opening import open_checkpoint
from modules.checkpoints.tokenizers import TokenizerFiles, piece_surfaces, token_places
from modules.contract.rules import CountTokens, Place, TokenCount, kept_characters
from modules.errors import CheckpointError

# Letters: B prompts, L tokens


TOKENS_AT_ONCE = 4096  # bounds memory when many prompts are given


def fill_rows(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, each B L int64, with the rows padded on the right."""
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    mask = torch.tensor([[*[1] * len(row), *[0] * (length - len(row))] for row in rows])
    return ids, mask


def check_ids(rows: Sequence[Sequence[int]], known: int, path: Path, option: str) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than its encoder, in `path`, knows.

    rows: token ids of texts. option: of the tokenizer.
    """
    largest = max((max(row) for row in rows), default=0)
    if largest >= known:
        raise CheckpointError(
            f"{path} knows {known} tokens, but its tokenizer has more (token {largest}). "
            f"Give the tokenizer of this model to {option}.",
            path,
        )


def in_groups(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Yield the prompts in order, in groups of at most TOKENS_AT_ONCE tokens."""
    group: list[list[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerPlace:
    """The tokenizer's source: a file, the bytes inside a checkpoint, or (neither is set) the hub."""

    identity: str  # what distinguishes the tokenizer in cache records
    file: Path | None = None
    inside: Path | None = None


def find_tokenizer(files: TokenizerFiles, path: Path | None, checkpoint_path: Path) -> TokenizerPlace:
    """Find the tokenizer: at `path`, else beside the checkpoint, inside it, on the hub.

    Raises CheckpointError if `path` is given and is not a tokenizer.
    """
    file = files.find(path, checkpoint_path)
    if file is not None:
        return TokenizerPlace(files.identity(file), file)
    with open_checkpoint(checkpoint_path) as checkpoint:
        has_own = any(name.endswith(SPIECE_MODEL) for name in checkpoint.tensors)
    if has_own:
        return TokenizerPlace("inside the checkpoint", inside=checkpoint_path)
    return TokenizerPlace(files.identity(None))


def load_tokenizer(
    files: TokenizerFiles,
    path: Path | None,
    checkpoint_path: Path,
    from_json: Callable[[Path], T],
    from_pieces: Callable[[bytes, Path], T],
    may_download: bool = True,
) -> T:
    """Load the tokenizer that `find_tokenizer` finds, by one of the functions.

    from_json: given a tokenizer.json. from_pieces: given a SentencePiece model and the file it is from.
    Raises CheckpointError if there is none, it cannot be read, or the hub cannot be reached.
    """
    place = find_tokenizer(files, path, checkpoint_path)
    if place.inside is not None:
        logger.info("tokenizer: the one inside %s", place.inside)
        return from_pieces(_read_embedded(place.inside), place.inside)
    find = files.download if may_download else files.require_local
    file = place.file or find(checkpoint_path)
    logger.info("tokenizer: %s", file)
    return from_json(file) if file.suffix == ".json" else from_pieces(files.read_bytes(file), file)


def read_pieces(files: TokenizerFiles, model: bytes, origin: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a SentencePiece model. Raises CheckpointError if it is damaged."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise files.unreadable(origin, error) from error
    files.check_sentencepiece(model, origin)
    return processor


def piece_places(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[tuple[int, int]]:
    """Return where each piece of a text starts and ends in it, in characters."""
    surfaces = piece_surfaces(processor.encode(text, out_type="serialized_proto"))
    # they follow one another; white space that is dropped can only stand in front of them
    ends = itertools.accumulate(map(len, surfaces), initial=len(text) - sum(map(len, surfaces)))
    return list(itertools.pairwise(ends))


def _read_embedded(checkpoint_path: Path) -> bytes:
    with open_checkpoint(checkpoint_path) as checkpoint:
        name = next(name for name in checkpoint.tensors if name.endswith(SPIECE_MODEL))
        return checkpoint.read(name).numpy().tobytes()


def no_token(files: TokenizerFiles, origin: Path, token: str, encoder: str) -> CheckpointError:
    """Return the error for a SentencePiece model without a token that the encoder needs."""
    return CheckpointError(
        f"{origin}: the tokenizer has no {token}. Give the tokenizer of {encoder} to {files.option}.", origin
    )


LONGEST_PIECE = 64  # characters of a token, at most
END = "</s>"


@dataclass(frozen=True)
class T5Tokenizer:
    """Turn text into a limited number of token ids, the end token last."""

    tokenize: Callable[[str], list[int]]
    places: Callable[[str], list[Place]]  # of the same tokens

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.tokenize(text)


@dataclass(frozen=True)
class T5Tokenizers:
    """Where the tokenizer of one kind of T5 may be, and how many tokens the encoder reads."""

    files: TokenizerFiles
    max_tokens: int  # with the end token

    def find(self, path: Path | None, checkpoint_path: Path) -> TokenizerPlace:
        """Find the tokenizer, as `find_tokenizer` does."""
        return find_tokenizer(self.files, path, checkpoint_path)

    def load(self, path: Path | None, checkpoint_path: Path) -> T5Tokenizer:
        """Load the tokenizer. path: as for `find`.

        Raises CheckpointError if there is none, it cannot be read, or the hub cannot be reached.
        """
        return load_tokenizer(self.files, path, checkpoint_path, self._from_json, self._from_sentencepiece)

    def load_counter(self, path: Path | None, checkpoint_path: Path) -> CountTokens:
        """Load the tokenizer to count tokens. path: as for `find`. Nothing is downloaded.

        Raises CheckpointError if there is none here or it cannot be read.
        """
        return load_tokenizer(
            self.files,
            path,
            checkpoint_path,
            self._count_json,
            lambda model, origin: self._count_pieces(read_pieces(self.files, model, origin)),
            may_download=False,
        )

    def _count_json(self, file: Path) -> CountTokens:
        tokenizer, most = self.files.read(file), self.max_tokens

        def count(text: str) -> TokenCount:
            ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
            return TokenCount(text, len(ends) + 1, most, kept_characters(ends, most - 1, len(text)))

        return count

    def _count_pieces(self, processor: sentencepiece.SentencePieceProcessor) -> CountTokens:
        """Count the tokens of a SentencePiece model, which gives no places of pieces in the text."""

        def fits(text: str) -> bool:
            return len(processor.encode(text)) < self.max_tokens

        def count(text: str) -> TokenCount:
            tokens, kept = len(processor.encode(text)) + 1, len(text)
            if tokens > self.max_tokens:  # the longest beginning that fits
                most = range(min(len(text), LONGEST_PIECE * self.max_tokens))
                kept = bisect.bisect_left(most, True, key=lambda length: not fits(text[: length + 1]))
            return TokenCount(text, tokens, self.max_tokens, kept)

        return count

    def _from_json(self, file: Path) -> T5Tokenizer:
        """Load tokenizer.json as it is (normalisation, special tokens), and truncate to that length."""
        tokenizer = self.files.read(file)
        tokenizer.enable_truncation(self.max_tokens)
        end = tokenizer.token_to_id(END)
        if tokenizer.encode("").ids[-1:] != [end]:
            logger.warning(
                "tokenizer %s does not end texts with %s, but the encoder was trained with it", file, END
            )

        def tokenize(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text).ids
            return ids

        return T5Tokenizer(tokenize, lambda text: token_places(tokenizer.encode(text)))

    def _from_sentencepiece(self, model: bytes, origin: Path) -> T5Tokenizer:
        processor = read_pieces(self.files, model, origin)
        end = processor.eos_id()
        if end < 0:
            raise no_token(self.files, origin, f"end token {END}", "this encoder")

        def tokenize(text: str) -> list[int]:
            ids: list[int] = processor.encode(text)
            return [*ids[: self.max_tokens - 1], end]

        def places(text: str) -> list[Place]:
            return [*piece_places(processor, text)[: self.max_tokens - 1], None]

        return T5Tokenizer(tokenize, places)
