"""The tokenizer of umT5: found as a folder or file, beside the checkpoint, inside it, or on the hub."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer

from modules.checkpoint import fingerprint, open_checkpoint
from modules.errors import CheckpointError
from wan.encoder_checkpoints import SPIECE_MODEL

logger = logging.getLogger(__name__)

MAX_TOKENS = 512  # with the end token, as trained
END = "</s>"
FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
OFFICIAL_FOLDER = "google/umt5-xxl"  # in the released repositories of Wan2.1
HUB_REPOSITORY = "Wan-AI/Wan2.1-T2V-14B"

Tokenize = Callable[[str], list[int]]  # text -> token ids, at most MAX_TOKENS, the end token last


@dataclass(frozen=True)
class TokenizerPlace:
    """Where the tokenizer comes from: a file, the bytes inside a checkpoint, or (neither) the hub."""

    file: Path | None = None
    inside: Path | None = None

    @property
    def identity(self) -> str:
        """What distinguishes it in cache records."""
        if self.file is not None:
            return fingerprint(self.file)
        return "inside the checkpoint" if self.inside is not None else f"{HUB_REPOSITORY}/{OFFICIAL_FOLDER}"


def find_tokenizer(path: Path | None, checkpoint_path: Path) -> TokenizerPlace:
    """The first of: what --t5_tokenizer names, a tokenizer beside the checkpoint, the one inside it, the hub.

    Raises CheckpointError where `path` is given and is no tokenizer.
    """
    if path is not None:
        return TokenizerPlace(_given_file(path))
    folder = checkpoint_path if checkpoint_path.is_dir() else checkpoint_path.parent
    # official repositories; diffusers pipelines, where text_encoder and tokenizer are neighbours; a text encoder saved with it
    for place in (folder / OFFICIAL_FOLDER, folder / "tokenizer", folder.parent / "tokenizer", folder):
        file = _file_in(place)
        if file is not None:
            return TokenizerPlace(file)
    with open_checkpoint(checkpoint_path) as checkpoint:
        has_own = any(name.endswith(SPIECE_MODEL) for name in checkpoint.tensors)
    return TokenizerPlace(inside=checkpoint_path) if has_own else TokenizerPlace()


def load_tokenizer(path: Path | None, checkpoint_path: Path) -> Tokenize:
    """The tokenizer as a function. path: of --t5_tokenizer, or None to look for it (`find_tokenizer`).

    Raises CheckpointError where there is none, it cannot be read, or the hub cannot be reached.
    """
    place = find_tokenizer(path, checkpoint_path)
    if place.inside is not None:
        logger.info("tokenizer: the one inside %s", place.inside)
        return _from_sentencepiece(_embedded(place.inside), place.inside)
    file = place.file or _from_hub(checkpoint_path)
    logger.info("tokenizer: %s", file)
    if file.suffix == ".json":
        return _from_json(file)
    try:
        return _from_sentencepiece(file.read_bytes(), file)
    except OSError as error:
        raise _unreadable(file, error) from error


def _given_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"--t5_tokenizer {path}: there is no such file or folder.", path)
    for folder in (path, path / OFFICIAL_FOLDER, path / "tokenizer"):
        file = _file_in(folder)
        if file is not None:
            return file
    found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"--t5_tokenizer {path}: the folder has none of {', '.join(FILES)} (it holds {found}). "
        f"Give the folder {OFFICIAL_FOLDER} of a Wan2.1 release.",
        path,
    )


def _file_in(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def _embedded(checkpoint_path: Path) -> bytes:
    with open_checkpoint(checkpoint_path) as checkpoint:
        name = next(name for name in checkpoint.tensors if name.endswith(SPIECE_MODEL))
        return checkpoint.read(name).numpy().tobytes()


def _from_json(file: Path) -> Tokenize:
    """Exactly what the file describes (normalisation, special tokens), cut to the trained length."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise _unreadable(file, error) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    end = tokenizer.token_to_id(END)
    if tokenizer.encode("").ids[-1:] != [end]:
        logger.warning("tokenizer %s puts no %s at the end of a text; umT5 was trained with it", file, END)

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return tokenize


def _from_sentencepiece(model: bytes, origin: Path) -> Tokenize:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _unreadable(origin, error) from error
    end = processor.eos_id()
    if end < 0:
        raise CheckpointError(
            f"{origin}: its tokenizer has no end token {END}. Give the tokenizer of umT5 to --t5_tokenizer.", origin
        )

    def tokenize(text: str) -> list[int]:
        ids: list[int] = processor.encode(text)
        return [*ids[: MAX_TOKENS - 1], end]

    return tokenize


def _from_hub(checkpoint_path: Path) -> Path:
    try:
        return Path(hf_hub_download(HUB_REPOSITORY, "tokenizer.json", subfolder=OFFICIAL_FOLDER))
    except Exception as error:  # no network, no such host, a proxy's answer: many classes, one remedy
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"no tokenizer for {checkpoint_path}: there is no folder {OFFICIAL_FOLDER} beside it, none inside it, "
            f"and the hub cannot be reached ({reason})\n"
            f"  Give --t5_tokenizer the folder {OFFICIAL_FOLDER} of {HUB_REPOSITORY} (or its tokenizer.json or spiece.model).",
            checkpoint_path,
        ) from error


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{file} is no tokenizer that can be read ({reason}). Give --t5_tokenizer the folder {OFFICIAL_FOLDER} of a release.",
        file,
    )
