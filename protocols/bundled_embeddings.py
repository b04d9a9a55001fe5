"""Learned words (embeddings) that LoRA files contain or that have files of their own.

In a LoRA file their vectors are called `bundle_emb.WORD.KEY`. KEY is the name that the tensor has in a file
of the word alone: `emb_params`, `clip_l`, `t5xxl`, `string_to_param.*`. OneTrainer and HCP-Diffusion write
them, and the Web UI and ComfyUI read them.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from protocols.family import Family

# what a file of one word contains: tensors by name, or tables of them
WordContent = Mapping[str, Tensor | Mapping[str, Tensor]]
BundledWords = Mapping[str, WordContent]  # of a LoRA file, by word
WordsByFile = Mapping[Path, BundledWords]

BUNDLE = "bundle_emb"
# a word may contain dots; a table one level deeper (`string_to_param`) adds the names of its rows
_NAME = re.compile(rf"{BUNDLE}\.(?P<word>.+?)\.(?P<key>(?P<table>string_to_\w+)(?:\.(?P<row>.+))?|[^.]+)")


def is_word_embedding(name: str) -> bool:
    """Return whether a tensor of a LoRA file is the embedding of a new word."""
    return _NAME.fullmatch(name) is not None


def get_embedding_word(name: str) -> str:
    """Return the word that a tensor of a LoRA file belongs to; "" if it belongs to none."""
    match = _NAME.fullmatch(name)
    return "" if match is None else match["word"]


def find_words(tensors: Mapping[str, Tensor]) -> BundledWords:
    """Return the textual-inversion words in a LoRA file, each with the content of an embedding file."""
    words: dict[str, dict[str, Tensor | Mapping[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        content = words.setdefault(match["word"], {})
        if match["table"] is None:
            content[match["key"]] = tensor
        else:  # Web UI nests tensors: {"string_to_param": {"*": tensor}}
            nested = content.get(match["table"], {})
            assert not isinstance(nested, Tensor)
            content[match["table"]] = {**nested, match["row"] or "*": tensor}
    return words


def bundle_word(word: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a learned word under their names in a LoRA file."""
    return {f"{BUNDLE}.{word}.{key}": tensor for key, tensor in tensors.items()}


def without_words(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA file's tensors without the embeddings of new words."""
    return {name: tensor for name, tensor in tensors.items() if not is_word_embedding(name)}


class TakesWords(Family, Protocol):
    """A family whose text encoders can get embedding vectors for additional words."""

    @property
    def word_names(self) -> Collection[str]:
        """Names of the words that `with_words` has added."""

    def with_words(self, files: WordsByFile, option: str) -> Family:
        """Return the family with text encoders that know the words in `files`.

        Args:
            files: New words with their embedding vectors, by file.
            option: Option that names the files, for messages.

        Raises:
            CheckpointError: If vectors do not fit the text encoders.
        """


def with_words(family: Family, files: WordsByFile, option: str) -> Family:
    """Return the family with text encoders that know the new words in `files` (textual inversions)."""
    return cast(TakesWords, family).with_words(files, option)
