"""T5's tokenizer, found as a folder or file, beside the checkpoint, inside it, or on the hub."""

import bisect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from encoders.piece_tokenizers import (
    TokenizerPlace,
    find_tokenizer,
    load_tokenizer,
    no_token,
    piece_places,
    read_pieces,
)
from modules.checkpoints.tokenizers import TokenizerFiles, token_places
from modules.contract.rules import CountTokens, Place, TokenCount, kept_characters

logger = logging.getLogger(__name__)

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
