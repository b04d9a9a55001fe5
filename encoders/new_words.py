"""Words that text encoders read as additional rows of their tables of token embeddings.

A word has a file (an embedding, or a LoRA that brings it along), or its vectors learn.
"""
# Letters: B captions, L tokens, V vectors of a word, C width

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.embedding_files import TABLE, describe_content, list_tensors, reject_embedding, to_rows
from modules.console import count_of
from modules.errors import CheckpointError
from protocols.family import TextEncoder

if TYPE_CHECKING:
    from protocols.bundled_embeddings import WordContent

logger = logging.getLogger(__name__)


def compile_words(names: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds words in any case, but not inside of other words; each has its group.

    A word may be marked as in ComfyUI: `embedding:folder/NAME.safetensors`.

    Args:
        names: The words; of those that begin alike, the longest first.
    """
    return re.compile("|".join(f"({_marked(name)}|{_alone(name)})" for name in names), re.IGNORECASE)


def _marked(name: str) -> str:
    return rf"(?<!\w)embedding:\s*(?:[^\s,()\[\]:]*[/\\])?{_alone(name)}(?:\.(?:safetensors|sft|pt|bin)\b)?"


def _alone(name: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    behind = r"(?!\w)" if re.search(r"\w\Z", name) else ""
    return before + re.escape(name) + behind


@dataclass(frozen=True)
class NewWord:
    """A new word for a prompt. Alone it means all of its vectors; with a 1, 2, ... appended, a single one."""

    text: str
    count: int = 1  # number of the word's vectors
    copies: int = 1  # of its vectors in the table, one after the other
    alias: str | None = None  # another name of the word

    def list_ids(self, vocabulary: int) -> dict[str, list[int]]:
        """Return the token ids of the word and of its single vectors.

        Args:
            vocabulary: Number of rows of the table without the word.
        """
        ids = [*range(vocabulary, vocabulary + self.count)]
        single = {f"{self.text}{index}": [token_id] for index, token_id in enumerate(ids[1:], 1)}
        return {self.text: ids, **single}


@dataclass(frozen=True, eq=False)
class EncoderWord:
    """A word as one text encoder reads it."""

    word: NewWord
    vectors: Tensor | None = None  # V C; None: they learn
    source: Path | None = None  # file of the vectors
    option: str = ""  # that names the file


@dataclass(frozen=True, eq=False)
class ModelWord:
    """A word for all text encoders of a model."""

    text: str
    count: int = 1  # number of vectors of a word that learns; a file says its own
    content: "WordContent | None" = None  # what a file of the word holds; None: the word learns
    source: Path = field(default_factory=Path)
    option: str = ""


class WordEncoder(TextEncoder, Protocol):
    """A text encoder that can be given vectors of additional words."""

    embedding: str  # name of the weight of the token embeddings in the network
    # names of its vectors in the file of a word: the one that is written, and others that are read
    word_keys: tuple[str, ...]
    words: Sequence[EncoderWord]
    learns_word: bool  # gradients flow through the network

    @property
    def network(self) -> nn.Module:
        """The loaded network."""

    def tokenize_word(self, text: str) -> list[int]:
        """Return the token ids of words inside of a text; loads no weights."""


def takes_words(encoder: TextEncoder) -> TypeGuard[WordEncoder]:
    """Return whether a text encoder can be given vectors of additional words."""
    return encoder.can.take_words


def give_words(encoders: Sequence[TextEncoder], words: Sequence[ModelWord]) -> None:
    """Let text encoders read additional words; call before they are loaded.

    Args:
        encoders: All text encoders of a model.
        words: The words.

    Raises:
        CheckpointError: If a word's file holds vectors of another model.
    """
    able = [encoder for encoder in encoders if takes_words(encoder)]
    for word in words:
        vectors = {} if word.content is None else select_vectors(word, able)
        for encoder in able:
            rows = vectors.get(encoder.word_keys[0])  # the first key names the encoder, others are aliases
            if word.content is None:
                encoder.words = (*encoder.words, EncoderWord(NewWord(word.text, word.count)))
                encoder.learns_word = True
            elif rows is not None:
                new = NewWord(word.text, len(rows))
                encoder.words = (*encoder.words, EncoderWord(new, rows, word.source, word.option))


def select_vectors(word: ModelWord, encoders: Sequence[WordEncoder]) -> dict[str, Tensor]:
    """Return the vectors of a file, V C each, by the first key of the text encoder that they are for."""
    assert word.content is not None
    inner = word.content.get(TABLE)
    tensors = list_tensors(inner if isinstance(inner, Mapping) else word.content)
    found = {
        encoder.word_keys[0]: tensors[key]
        for encoder in encoders
        for key in reversed(encoder.word_keys)  # so that the key that is written counts before aliases
        if key in tensors
    }
    if not found and len(tensors) == len(encoders) == 1:  # then its name says nothing
        found = dict.fromkeys(encoders[0].word_keys[:1], next(iter(tensors.values())))
    if not found:
        keys = " and ".join(encoder.word_keys[0] for encoder in encoders)
        raise CheckpointError(
            f"{word.option} {word.source} has no vectors of {word.text} for this model: "
            f"{describe_content(word.content)}. Its text encoders take {keys}.",
            word.source,
        )
    rows = to_rows(word.source, word.option, found)
    if len({len(vectors) for vectors in rows.values()}) > 1:
        raise reject_embedding(
            word.source, word.option, "it has unequal numbers of vectors for the text encoders"
        )
    count = len(next(iter(rows.values())))
    parts = "" if len(rows) == len(encoders) else f", for {' and '.join(rows)} alone"
    logger.info("%s: %s (%s%s)", word.source, word.text, count_of(count, "vector"), parts)
    return rows


class GrowingEmbedding(nn.Embedding):
    """A frozen table of token embeddings with V additional rows, which are stored separately."""

    def __init__(self, table: nn.Embedding, count: int) -> None:
        """Wrap the table's weight. The additional rows are zero until `rows` is set."""
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.known = table.num_embeddings  # rows of the table itself
        self.num_embeddings = self.known + count
        self.count = count
        self.scale: Tensor | None = getattr(table, "embed_scale", None)  # Gemma multiplies rows by it
        self.rows: Callable[[], Tensor] = self._make_zeros  # V C

    def _make_zeros(self) -> Tensor:
        return self.weight.new_zeros(self.count, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids, B L C."""
        rows = ids - self.known
        is_new = rows >= 0
        old = super().forward(ids.masked_fill(is_new, 0))
        new = F.embedding(rows.clamp(min=0), self.rows().to(old))
        embedded = torch.where(is_new[..., None], new, old)
        return embedded if self.scale is None else embedded * self.scale.to(embedded)


def grow_table(network: nn.Module, embedding: str, words: Sequence[EncoderWord]) -> dict[str, list[int]]:
    """Give a network rows for words, in their order, and return the token ids of all their names.

    Args:
        network: The loaded network.
        embedding: Name of the weight of its token embeddings.
        words: The words: those of files, or one that learns.

    Raises:
        CheckpointError: If vectors have another width than the table.
    """
    parent, _, name = embedding.removesuffix(".weight").rpartition(".")
    module = network.get_submodule(parent)
    table = module.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    for word in words:
        width = table.embedding_dim if word.vectors is None else word.vectors.shape[1]
        if width != table.embedding_dim:
            raise CheckpointError(
                f"{word.option} {word.source}: the vectors of {word.word.text} have {width} numbers, this "
                f"text encoder takes {table.embedding_dim}. Give a file that was made for this model.",
                word.source,
            )
    grown = GrowingEmbedding(table, sum(word.word.count for word in words))
    given = [word.vectors for word in words if word.vectors is not None]
    if given:
        grown.rows = partial(torch.cat, given)
    setattr(module, name, grown)
    return name_ids([word.word for word in words], grown.known)


def name_ids(words: Sequence[NewWord], vocabulary: int) -> dict[str, list[int]]:
    """Return the token ids of words (`cat`) and of their single vectors (`cat1`), by name.

    A name that several have is the word's before it is a vector's, and an alias of a word last.

    Args:
        words: The words, in the order of their rows.
        vocabulary: Number of rows of the table without the words.
    """
    ids: dict[str, list[int]] = {}
    word_names = {word.text.lower() for word in words}
    first_id = vocabulary  # of the next word
    for word in words:
        for name, token_ids in word.list_ids(first_id).items():
            is_word = name == word.text
            if is_word or name.lower() not in word_names:
                ids[name] = token_ids
        first_id += word.count * word.copies
    for word in words:
        if word.alias is not None and word.alias.lower() not in word_names:
            ids.setdefault(word.alias, ids[word.text])
    return ids
