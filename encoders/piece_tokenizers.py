"""SentencePiece tokenizers of text encoders: as a file, beside the checkpoint, inside it, or on the hub."""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import sentencepiece

from modules.checkpoints.encoders import SPIECE_MODEL
from modules.checkpoints.opening import open_checkpoint
from modules.checkpoints.tokenizer_growth import piece_surfaces
from modules.checkpoints.tokenizers import TokenizerFiles
from modules.errors import CheckpointError

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
