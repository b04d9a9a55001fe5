"""The tokenizer of Gemma 2: as a file or folder, beside the checkpoint, inside it, or on the hub."""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from lumina.gemma import SPIECE_MODEL
from modules.checkpoints.opening import open_checkpoint
from modules.checkpoints.tokenizer_growth import piece_surfaces
from modules.checkpoints.tokenizers import TokenizerFiles, token_places
from modules.contract.tokens import Place
from modules.errors import CheckpointError

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


@dataclass(frozen=True)
class TokenizerPlace:
    """The tokenizer's source: a file, the bytes inside a checkpoint, or (neither is set) the hub."""

    file: Path | None = None
    inside: Path | None = None

    @property
    def identity(self) -> str:
        """Return what distinguishes the tokenizer in cache records."""
        return "inside the checkpoint" if self.inside is not None else GEMMA_FILES.identity(self.file)


def find_tokenizer(path: Path | None, checkpoint_path: Path) -> TokenizerPlace:
    """Find the tokenizer: the one that --gemma2_tokenizer names, else beside the checkpoint, inside it, or on
    the hub.

    Raises CheckpointError if `path` is given and is not a tokenizer.
    """
    file = GEMMA_FILES.find(path, checkpoint_path)
    if file is not None:
        return TokenizerPlace(file)
    return TokenizerPlace(inside=checkpoint_path if _inside(checkpoint_path) is not None else None)


def load_tokenizer(path: Path | None, checkpoint_path: Path, may_download: bool = True) -> GemmaTokenizer:
    """Load the tokenizer. path: of --gemma2_tokenizer; None looks for it with `find_tokenizer`.

    Raises CheckpointError if there is none, it cannot be read, or the hub cannot be reached.
    """
    place = find_tokenizer(path, checkpoint_path)
    if place.inside is not None:
        logger.info("tokenizer: the one inside %s", place.inside)
        return _from_sentencepiece(_read_embedded(place.inside), place.inside)
    find = GEMMA_FILES.download if may_download else GEMMA_FILES.require_local
    file = place.file or find(checkpoint_path)
    logger.info("tokenizer: %s", file)
    if file.suffix == ".json":
        return _from_json(file)
    return _from_sentencepiece(GEMMA_FILES.read_bytes(file), file)


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
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise GEMMA_FILES.unreadable(origin, error) from error
    GEMMA_FILES.check_sentencepiece(model, origin)
    begin = processor.bos_id()
    if begin < 0:
        raise CheckpointError(
            f"{origin}: the tokenizer has no begin token {BEGIN}. Give the tokenizer of Gemma 2 to "
            f"{GEMMA_FILES.option}.",
            origin,
        )

    def read(text: str) -> tuple[list[int], list[Place]]:
        ids: list[int] = processor.encode(text)
        surfaces = piece_surfaces(processor.encode(text, out_type="serialized_proto"))
        # they follow one another; white space that is dropped can only stand in front of them
        ends = itertools.accumulate(map(len, surfaces), initial=len(text) - sum(map(len, surfaces)))
        return [begin, *ids], [None, *itertools.pairwise(ends)]

    return GemmaTokenizer(read)


def _inside(checkpoint_path: Path) -> str | None:
    """Return the name of the tokenizer's bytes in a checkpoint, if it has them."""
    with open_checkpoint(checkpoint_path) as checkpoint:
        return next((name for name in checkpoint.tensors if name.endswith(SPIECE_MODEL)), None)


def _read_embedded(checkpoint_path: Path) -> bytes:
    name = _inside(checkpoint_path)
    assert name is not None
    with open_checkpoint(checkpoint_path) as checkpoint:
        return checkpoint.read(name).numpy().tobytes()
