"""The tokenizers of the text encoders: in --tokenizer_cache_dir, in the checkpoint's folder, or from the hub.

OpenCLIP's vocabulary is CLIP-L's, so that either's files serve for both. They differ in what fills up a text:
CLIP-L its end token, OpenCLIP the token 0 ("!" in its released settings), which is not read from the files:
not all copies of OpenCLIP's say so.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from encoders.clip_checkpoints import clip_tokenizer_files
from encoders.clip_l import ClipWords, load_clip_words
from modules.atomic_write import make_folder, write_bytes
from modules.checkpoints.tokenizers import TokenizerFiles
from modules.errors import CheckpointError, OptionError

logger = logging.getLogger(__name__)

OPTION = "--tokenizer_cache_dir"
CLIP_L = "openai_clip-vit-large-patch14"
OPEN_CLIP = ("laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", "stabilityai_stable-diffusion-2")
OPEN_CLIP_PAD = 0


def find_tokenizers(cache: Path | None, checkpoint: Path, are_open_clip: Sequence[bool]) -> list[ClipWords]:
    """Load the tokenizer of each text encoder.

    cache: the option's folder. checkpoint: file or folder. are_open_clip: of each encoder; else CLIP-L.
    Raises OptionError if the option names a file, CheckpointError if there is no tokenizer or it cannot be
    read.
    """
    if cache is not None and cache.exists() and not cache.is_dir():
        raise OptionError(f"{OPTION} {cache}: it is not a folder. Give the folder that holds {CLIP_L}")
    found: dict[Path, ClipWords] = {}
    words = []
    for number, is_open_clip in enumerate(are_open_clip):
        files = _files(number, is_open_clip)
        file = _in_cache(files, cache, is_open_clip) or files.find(None, checkpoint)
        if file is None:
            file = next(iter(found), None) or _download(files, cache, checkpoint)
        if file not in found:
            logger.info("tokenizer: %s", file)
            found[file] = load_clip_words(files, file)
        words.append(found[file])
    return words


def check_vocabulary(words: ClipWords, rows: int, checkpoint: Path) -> None:
    """Raise CheckpointError if the tokenizer has more tokens than the text encoder has rows."""
    last = max(words.start, words.end)
    if last >= rows:
        raise CheckpointError(
            f"{checkpoint}: its text encoder has {rows} rows of token embeddings, the tokenizer counts to "
            f"{last}. Give the tokenizer that belongs to it in {OPTION}.",
            checkpoint,
        )


def _files(number: int, is_open_clip: bool) -> TokenizerFiles:
    ending = "" if number == 0 else f"_{number + 1}"
    names = OPEN_CLIP if is_open_clip else (CLIP_L,)
    return clip_tokenizer_files(OPTION, (f"tokenizer{ending}", *names, "tokenizer", CLIP_L, "clip_l", "."))


def _in_cache(files: TokenizerFiles, cache: Path | None, is_open_clip: bool) -> Path | None:
    if cache is None or not cache.is_dir():
        return None
    for name in (*(OPEN_CLIP if is_open_clip else ()), CLIP_L, "clip_l", "."):
        file = next((cache / name / each for each in files.names if (cache / name / each).is_file()), None)
        if file is not None:
            return file
    return None


def _download(files: TokenizerFiles, cache: Path | None, checkpoint: Path) -> Path:
    """Return the hub's file; with a folder for tokenizers, a copy there, for runs without a network."""
    try:
        file = files.download(checkpoint)
    except CheckpointError as error:
        looked = f" in {cache} or" if cache is not None else ""
        raise CheckpointError(
            f"no tokenizer for {checkpoint}: there is none{looked} beside it, and {files.repository} cannot "
            "be downloaded from the hub.\n  Put vocab.json and merges.txt, or tokenizer.json, of that "
            f"repository into a folder {CLIP_L} and give the folder that holds it to {OPTION}."
        ) from error
    if cache is None:
        return file
    kept = cache / CLIP_L / file.name
    make_folder(kept.parent, OPTION)
    write_bytes(kept, files.read_bytes(file))
    logger.info("The tokenizer was downloaded and is kept in %s", kept.parent)
    return kept
