"""The tokenizer of Gemma 2: as a file or folder, beside the checkpoint, inside it, or on the hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from encoders.piece_tokenizers import find_tokenizer, load_tokenizer, no_token, piece_places, read_pieces
from modules.checkpoints.tokenizers import TokenizerFiles, token_places
from modules.contract.tokens import Place

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


def gemma_tokenizer_identity(path: Path | None, checkpoint_path: Path) -> str:
    """Return what distinguishes the tokenizer in cache records. path: of --gemma2_tokenizer, or None.

    Raises CheckpointError if `path` is given and is not a tokenizer.
    """
    return find_tokenizer(GEMMA_FILES, path, checkpoint_path).identity


def load_gemma_tokenizer(
    path: Path | None, checkpoint_path: Path, may_download: bool = True
) -> GemmaTokenizer:
    """Load the tokenizer. path: of --gemma2_tokenizer; None looks for it.

    Raises CheckpointError if there is none, it cannot be read, or the hub cannot be reached.
    """
    return load_tokenizer(GEMMA_FILES, path, checkpoint_path, _from_json, _from_sentencepiece, may_download)


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
    processor = read_pieces(GEMMA_FILES, model, origin)
    begin = processor.bos_id()
    if begin < 0:
        raise no_token(GEMMA_FILES, origin, f"begin token {BEGIN}", "Gemma 2")

    def read(text: str) -> tuple[list[int], list[Place]]:
        ids: list[int] = processor.encode(text)
        return [begin, *ids], [None, *piece_places(processor, text)]

    return GemmaTokenizer(read)
