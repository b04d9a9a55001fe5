"""Tokenizers of text encoders: a file, beside the checkpoint, inside it, on the hub; rows of their ids.

tokenizer.json is read directly: the classes that transformers choose by name rebuild some tokenizers with
other rules.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from tokenizers import Tokenizer
from torch import Tensor

from modules.checkpoints.encoders import SPIECE_MODEL
from modules.checkpoints.opening import open_checkpoint
from modules.checkpoints.tokenizers import TokenizerFiles, piece_surfaces, token_places
from modules.contract.rules import Place
from modules.errors import CheckpointError

# Letters: B prompts, L tokens

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 4096  # bounds memory when many prompts are given
END = "</s>"  # of SentencePiece models


class Tokens(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    places: list[Place]  # in the text; one that the tokenizer adds has none

    @property
    def behind(self) -> int:
        """How many tokens the tokenizer adds behind a text."""
        return sum(1 for _ in itertools.takewhile(lambda place: place is None, reversed(self.places)))

    def cut(self, most: int) -> "Tokens":
        """Return at most so many of them; those that are added behind the text stay."""
        if len(self.ids) <= most:
            return self
        end = len(self.ids) - self.behind
        first = most - self.behind
        return Tokens(self.ids[:first] + self.ids[end:], self.places[:first] + self.places[end:])


@dataclass(frozen=True)
class TextTokenizer:
    """Turn text into tokens, however many."""

    read: Callable[[str], Tokens]
    number: Callable[[str], int | None]  # of a token; None: there is none
    file: Path  # that it was read from


@dataclass(frozen=True)
class TokenizerSource:
    """Where the tokenizer of an encoder may be, and what is put around a text."""

    files: TokenizerFiles
    begin: str = ""  # put in front of a text, if the file leaves that to its reader
    end: str = ""  # warn if texts do not end with it, with which the encoder was trained
    adds_own: bool = True  # the tokens that a file puts around a text count; else there are none
    may_be_inside: bool = False  # as a SentencePiece model in the bytes of the checkpoint
    read_file: Callable[[TokenizerFiles, Path], Tokenizer] = TokenizerFiles.read

    def find(self, path: Path | None, checkpoint_path: Path) -> tuple[Path | None, bool]:
        """Return the file: `path`, else beside the checkpoint; None for that of the hub. And if it is inside.

        path: of its option. Raises CheckpointError if `path` is given and is not a tokenizer.
        """
        file = self.files.find(path, checkpoint_path)
        if file is not None or not self.may_be_inside:
            return file, False
        with open_checkpoint(checkpoint_path) as checkpoint:
            is_inside = any(name.endswith(SPIECE_MODEL) for name in checkpoint.tensors)
        return None, is_inside

    def identity(self, path: Path | None, checkpoint_path: Path) -> str:
        """Return what distinguishes the tokenizer in cache records. path: as for `find`."""
        file, is_inside = self.find(path, checkpoint_path)
        if is_inside:
            return "inside the checkpoint"
        merges = merges_of(file)
        return self.files.identity(file) + ("" if merges is None else self.files.identity(merges))

    def load(
        self, path: Path | None, checkpoint_path: Path, what: str, may_download: bool = True
    ) -> TextTokenizer:
        """Load the tokenizer. path: as for `find`. what: the encoder, for the log.

        Raises CheckpointError if there is none, it cannot be read, or the hub cannot be reached.
        """
        file, is_inside = self.find(path, checkpoint_path)
        if is_inside:
            logger.info("tokenizer of %s: the one inside %s", what, checkpoint_path)
            return self._read_pieces(_read_embedded(checkpoint_path), checkpoint_path)
        if file is None:
            file = self.files.download(checkpoint_path, may_download)
        logger.info("tokenizer of %s: %s", what, file)
        return self._read_json(file) if file.suffix == ".json" else self._read_pieces(None, file)

    def _read_json(self, file: Path) -> TextTokenizer:
        tokenizer = self.read_file(self.files, file)
        begin = tokenizer.token_to_id(self.begin) if self.begin else None
        has_own = tokenizer.encode("").ids[:1] == [begin]
        first = [] if begin is None or has_own else [begin]
        if self.end and tokenizer.encode("").ids[-1:] != [tokenizer.token_to_id(self.end)]:
            logger.warning(
                "tokenizer %s does not end texts with %s, but the encoder was trained with it", file, self.end
            )

        def read(text: str) -> Tokens:
            encoded = tokenizer.encode(text, add_special_tokens=self.adds_own)
            return Tokens([*first, *encoded.ids], [*(None for _ in first), *token_places(encoded)])

        return TextTokenizer(read, tokenizer.token_to_id, file)

    def _read_pieces(self, model: bytes | None, origin: Path) -> TextTokenizer:
        """Read a SentencePiece model, which puts nothing around a text. model: None: it is the file."""
        model = self.files.read_bytes(origin) if model is None else model
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise self.files.unreadable(origin, error) from error
        self.files.check_sentencepiece(model, origin)
        first = [processor.bos_id()] if self.begin else []
        last = [processor.eos_id()] if self.end else []
        if min([0, *first, *last]) < 0:
            missing = f"begin token {self.begin}" if self.begin else f"end token {self.end}"
            raise CheckpointError(
                f"{origin}: the tokenizer has no {missing}. Give the tokenizer of this encoder to "
                f"{self.files.option}.",
                origin,
            )

        def read(text: str) -> Tokens:
            ids: list[int] = processor.encode(text)
            places = _piece_places(processor, text)
            return Tokens([*first, *ids, *last], [*(None for _ in first), *places, *(None for _ in last)])

        return TextTokenizer(read, processor.piece_to_id, origin)


def merges_of(file: Path | None) -> Path | None:
    """Return the second file of a tokenizer in the form of CLIP's release, or None for any other."""
    return file.with_name("merges.txt") if file is not None and file.name == "vocab.json" else None


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


def _piece_places(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[tuple[int, int]]:
    """Return where each piece of a text starts and ends in it, in characters."""
    surfaces = piece_surfaces(processor.encode(text, out_type="serialized_proto"))
    # they follow one another; white space that is dropped can only stand in front of them
    ends = itertools.accumulate(map(len, surfaces), initial=len(text) - sum(map(len, surfaces)))
    return list(itertools.pairwise(ends))


def _read_embedded(checkpoint_path: Path) -> bytes:
    with open_checkpoint(checkpoint_path) as checkpoint:
        name = next(name for name in checkpoint.tensors if name.endswith(SPIECE_MODEL))
        return checkpoint.read(name).numpy().tobytes()
