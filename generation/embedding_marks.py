"""Embeddings of a generation, and words that prompts mark as their names, as in ComfyUI: `embedding:NAME`."""

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

from modules.control_codes import shorten
from modules.limits import MAX_LINE_SHOWN
from protocols.bundled_embeddings import TakesWords, with_words
from protocols.family import Family
from protocols.requests import Request

logger = logging.getLogger(__name__)

OPTION = "--textual_inversion_embeddings"

# the name may have the ending of its file
_MARKED = re.compile(r"(?<!\w)embedding:\s*([^\s,()\[\]:]+)", re.IGNORECASE)


def find_embeddings(text: str) -> list[str]:
    """Return the names of the embeddings that a prompt uses, written as `embedding:NAME`."""
    return _MARKED.findall(text)


def with_embeddings(family: Family, paths: Sequence[Path]) -> Family:
    """Return the family with a new prompt word for each embedding file, named like the file.

    Args:
        family: The model family.
        paths: Files of embeddings.

    Raises:
        CheckpointError: If a file is missing, damaged or of a different kind.
    """
    from checkpoints.embedding_files import read_embedding  # torch: only with embeddings

    if not paths:
        return family
    return with_words(family, {path: {path.stem: read_embedding(path, OPTION)} for path in paths}, OPTION)


def warn_about_embeddings(family: Family, request: Request) -> None:
    """Warn of embedding names in a request's prompts that no loaded file contains."""
    text = " ".join(filter(None, (request.prompt, request.negative_prompt)))
    if find_embeddings(text):
        remedy = f"{OPTION} FILE loads one, or --lora_weight a LoRA that contains it"
        warn_about_unknown_words(text, cast(TakesWords, family).word_names, remedy)


def warn_about_unknown_words(text: str, known: Collection[str], remedy: str) -> None:
    """Warn about names that a prompt marks as embeddings and that are not loaded.

    Args:
        text: The prompt.
        known: All words that are loaded.
        remedy: What loads a word, for the message.
    """
    lowercase_words = {word.lower() for word in known}
    for name in dict.fromkeys(find_embeddings(text)):
        file_name = re.split(r"[/\\]", name.lower())[-1]  # may be written with folders
        # a digit after a word selects one of its vectors
        possible_words = {file_name, file_name.rpartition(".")[0], file_name.rstrip("0123456789")}
        if not possible_words & lowercase_words:
            logger.warning(
                "embedding:%s in a prompt is read as words: no embedding of this name is loaded. %s",
                shorten(name, MAX_LINE_SHOWN),
                remedy,
            )
