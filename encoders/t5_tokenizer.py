"""T5's tokenizer, found as a folder or file, beside the checkpoint, inside it, or on the hub."""

import bisect
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from encoders.t5_checkpoints import SPIECE_MODEL
from modules.checkpoints.opening import open_checkpoint
from modules.checkpoints.tokenizer_growth import piece_surfaces
from modules.checkpoints.tokenizers import TokenizerFiles, token_places
from modules.contract.tokens import CountTokens, Place, TokenCount, kept_characters
from modules.errors import CheckpointError

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
class TokenizerPlace:
    """The tokenizer's source: a file, the bytes inside a checkpoint, or (neither is set) the hub."""

    identity: str  # what distinguishes the tokenizer in cache records
    file: Path | None = None
    inside: Path | None = None


@dataclass(frozen=True)
class T5Tokenizers:
    """Where the tokenizer of one kind of T5 may be, and how many tokens the encoder reads."""

    files: TokenizerFiles
    max_tokens: int  # with the end token

    def find(self, path: Path | None, checkpoint_path: Path) -> TokenizerPlace:
        """Find it: the one that the option names (`path`), else beside the checkpoint, inside it, on the hub.

        Raises CheckpointError if `path` is given and is not a tokenizer.
        """
        file = self.files.find(path, checkpoint_path)
        if file is not None:
            return TokenizerPlace(self.files.identity(file), file)
        with open_checkpoint(checkpoint_path) as checkpoint:
            has_own = any(name.endswith(SPIECE_MODEL) for name in checkpoint.tensors)
        if has_own:
            return TokenizerPlace("inside the checkpoint", inside=checkpoint_path)
        return TokenizerPlace(self.files.identity(None))

    def load(self, path: Path | None, checkpoint_path: Path) -> T5Tokenizer:
        """Load the tokenizer. path: as for `find`.

        Raises CheckpointError if there is none, it cannot be read, or the hub cannot be reached.
        """
        place = self.find(path, checkpoint_path)
        if place.inside is not None:
            logger.info("tokenizer: the one inside %s", place.inside)
            return self._from_sentencepiece(_read_embedded(place.inside), place.inside)
        file = place.file or self.files.download(checkpoint_path)
        logger.info("tokenizer: %s", file)
        if file.suffix == ".json":
            return self._from_json(file)
        return self._from_sentencepiece(self.files.read_bytes(file), file)

    def load_counter(self, path: Path | None, checkpoint_path: Path) -> CountTokens:
        """Load the tokenizer to count tokens. path: as for `find`. Nothing is downloaded.

        Raises CheckpointError if there is none here or it cannot be read.
        """
        place, most = self.find(path, checkpoint_path), self.max_tokens
        if place.inside is not None:
            return self._count_pieces(self._sentencepiece(_read_embedded(place.inside), place.inside))
        file = place.file or self.files.require_local(checkpoint_path)
        if file.suffix != ".json":
            return self._count_pieces(self._sentencepiece(self.files.read_bytes(file), file))
        tokenizer = self.files.read(file)

        def count(text: str) -> TokenCount:
            ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
            return TokenCount(text, len(ends) + 1, most, kept_characters(ends, most - 1, len(text)))

        return count

    def _count_pieces(self, processor: sentencepiece.SentencePieceProcessor) -> CountTokens:
        """Count the tokens of a SentencePiece model, which does not tell where a piece stands in the text."""

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

    def _sentencepiece(self, model: bytes, origin: Path) -> sentencepiece.SentencePieceProcessor:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise self.files.unreadable(origin, error) from error
        self.files.check_sentencepiece(model, origin)
        return processor

    def _from_sentencepiece(self, model: bytes, origin: Path) -> T5Tokenizer:
        processor = self._sentencepiece(model, origin)
        end = processor.eos_id()
        if end < 0:
            raise CheckpointError(
                f"{origin}: the tokenizer has no end token {END}. Give the tokenizer of this encoder to "
                f"{self.files.option}.",
                origin,
            )

        def tokenize(text: str) -> list[int]:
            ids: list[int] = processor.encode(text)
            return [*ids[: self.max_tokens - 1], end]

        def places(text: str) -> list[Place]:
            surfaces = piece_surfaces(processor.encode(text, out_type="serialized_proto"))
            # they follow one another; white space that is dropped can only stand in front of them
            ends = itertools.accumulate(map(len, surfaces), initial=len(text) - sum(map(len, surfaces)))
            return [*itertools.islice(itertools.pairwise(ends), self.max_tokens - 1), None]

        return T5Tokenizer(tokenize, places)


def _read_embedded(checkpoint_path: Path) -> bytes:
    with open_checkpoint(checkpoint_path) as checkpoint:
        name = next(name for name in checkpoint.tensors if name.endswith(SPIECE_MODEL))
        return checkpoint.read(name).numpy().tobytes()
