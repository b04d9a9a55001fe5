"""Textual inversion: words that text encoders read as additional rows of their token embeddings.

The vectors of a word come from a file (an embedding, or a LoRA that contains the word), or are trained.
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
from modules.console import format_count
from modules.errors import CheckpointError
from protocols.family import TextEncoder

if TYPE_CHECKING:
    from protocols.bundled_embeddings import WordContent

logger = logging.getLogger(__name__)


def compile_words(names: Sequence[str]) -> re.Pattern[str]:
    """Return a case-insensitive pattern, with one group per word, that matches whole words only.

    A word may be written as in ComfyUI: `embedding:folder/NAME.safetensors`.

    Args:
        names: The words; a longer word must precede its prefixes.
    """
    groups = [f"({_comfyui_pattern(name)}|{_word_pattern(name)})" for name in names]
    return re.compile("|".join(groups), re.IGNORECASE)


def _comfyui_pattern(name: str) -> str:
    folder = r"(?:[^\s,()\[\]:]*[/\\])?"
    suffix = r"(?:\.(?:safetensors|sft|pt|bin)\b)?"
    return rf"(?<!\w)embedding:\s*{folder}{_word_pattern(name)}{suffix}"


def _word_pattern(name: str) -> str:
    # a word that begins or ends with a sign, such as <cat>, may directly follow or precede letters
    no_letter_before = r"(?<!\w)" if re.match(r"\w", name) else ""
    no_letter_after = r"(?!\w)" if re.search(r"\w\Z", name) else ""
    return no_letter_before + re.escape(name) + no_letter_after


@dataclass(frozen=True)
class NewWord:
    """A new word for prompts: `cat` inserts all of its vectors, `cat1` only the second one."""

    text: str
    count: int = 1  # number of the word's vectors
    copies: int = 1  # how many times the vectors are in the table, one copy after the other
    alias: str | None = None  # another name of the word

    def list_ids(self, first_id: int) -> dict[str, list[int]]:
        """Return the token ids of the word and of its individual vectors, by name.

        `first_id` is the id of the word's first vector, which is the number of preceding rows.
        """
        ids = [*range(first_id, first_id + self.count)]

        single = {f"{self.text}{index}": [token_id] for index, token_id in enumerate(ids[1:], 1)}
        return {self.text: ids, **single}


@dataclass(frozen=True, eq=False)
class EncoderWord:
    """An additional word and its vectors in one text encoder."""

    word: NewWord
    vectors: Tensor | None = None  # V C; None: they are trained
    source: Path | None = None  # file of the vectors
    option: str = ""  # option that names the file


@dataclass(frozen=True, eq=False)
class ModelWord:
    """An additional word for a model's text encoders; its vectors come from a file or are trained."""

    text: str
    count: int = 1  # number of vectors to train; those of a file are counted in it
    content: "WordContent | None" = None  # content of the word's file; None: the word is trained
    source: Path = field(default_factory=Path)
    option: str = ""


class WordEncoder(TextEncoder, Protocol):
    """A text encoder that accepts vectors of additional words."""

    embedding: str  # name of the weight of the token embeddings in the network
    # keys of its vectors in embedding files: first the key that is written, then others that are read
    word_keys: tuple[str, ...]
    added_words: Sequence[EncoderWord]
    learns_word: bool  # gradients flow through the network

    @property
    def network(self) -> nn.Module:
        """The loaded network."""

    def tokenize_word(self, text: str) -> list[int]:
        """Return the token ids that a word has inside a text; loads no weights."""


def takes_words(encoder: TextEncoder) -> TypeGuard[WordEncoder]:
    """Return whether the embeddings of a text encoder can be extended by additional words."""
    return encoder.abilities.accepts_new_words


def give_words(encoders: Sequence[TextEncoder], words: Sequence[ModelWord]) -> None:
    """Extend text encoders by additional words; call this before they are loaded.

    Args:
        encoders: All text encoders of a model.
        words: The words.

    Raises:
        CheckpointError: If a word's file contains vectors of another model.
    """
    word_encoders = [encoder for encoder in encoders if takes_words(encoder)]
    for word in words:
        # a new word, which is learned: each encoder gets rows for it
        if word.content is None:
            for encoder in word_encoders:
                encoder.added_words = (*encoder.added_words, EncoderWord(NewWord(word.text, word.count)))
                encoder.learns_word = True
            continue
        # a word from a file: its vectors for each of the encoders
        vectors = select_vectors(word, word_encoders)
        for encoder in word_encoders:
            rows = vectors.get(encoder.word_keys[0])  # the first key names the encoder, others are aliases
            if rows is not None:  # a file need not have vectors for all text encoders
                new_word = NewWord(word.text, len(rows))
                encoder.added_words = (
                    *encoder.added_words,
                    EncoderWord(new_word, rows, word.source, word.option),
                )


def select_vectors(word: ModelWord, encoders: Sequence[WordEncoder]) -> dict[str, Tensor]:
    """Return the vectors in a word's file, each V C, keyed by each text encoder's first key.

    Raises:
        CheckpointError: If the file has no vectors for these encoders, or unequal numbers of vectors.
    """
    assert word.content is not None
    # The vectors in an embedding file's content, keyed by the first key of each text encoder
    nested = word.content.get(TABLE)  # some files nest their vectors in a table with this name
    tensors = list_tensors(nested if isinstance(nested, Mapping) else word.content)
    found: dict[str, Tensor] = {}
    for encoder in encoders:
        key_in_file = next((key for key in encoder.word_keys if key in tensors), None)
        if key_in_file is not None:
            found[encoder.word_keys[0]] = tensors[key_in_file]
    if not found and len(tensors) == len(encoders) == 1:
        # with one text encoder and one tensor, the name of the tensor does not matter
        found[encoders[0].word_keys[0]] = next(iter(tensors.values()))
    vectors_by_encoder = found
    if not vectors_by_encoder:
        keys = " and ".join(encoder.word_keys[0] for encoder in encoders)
        raise CheckpointError(
            f"{word.option} {word.source} has no vectors of {word.text} for this model: "
            f"{describe_content(word.content)}. Its text encoders take {keys}.",
            word.source,
        )
    matrices = to_rows(word.source, word.option, vectors_by_encoder)  # each V C
    if len({len(vectors) for vectors in matrices.values()}) > 1:
        raise reject_embedding(
            word.source, word.option, "it has unequal numbers of vectors for the text encoders"
        )
    num_vectors = len(next(iter(matrices.values())))
    only_for = "" if len(matrices) == len(encoders) else f", for {' and '.join(matrices)} alone"
    logger.info("%s: %s (%s%s)", word.source, word.text, format_count(num_vectors, "vector"), only_for)
    return matrices


class GrowingEmbedding(nn.Embedding):
    """A frozen token embedding with V additional rows, which are stored separately."""

    def __init__(self, table: nn.Embedding, count: int) -> None:
        """Wrap the table's weight. The additional rows are zero until `get_new_vectors` is set."""
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.known = table.num_embeddings  # rows of the original table
        self.num_embeddings = self.known + count
        self.count = count
        self.scale: Tensor | None = getattr(table, "embed_scale", None)  # Gemma multiplies embeddings by it
        self.get_new_vectors: Callable[[], Tensor] = self._make_zeros  # returns the additional rows, V C

    def _make_zeros(self) -> Tensor:
        return self.weight.new_zeros(self.count, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids, B L C."""
        new_ids = ids - self.known  # indices into the additional rows; negative for known tokens
        is_new = new_ids >= 0
        old = super().forward(ids.masked_fill(is_new, 0))
        new = F.embedding(new_ids.clamp(min=0), self.get_new_vectors().to(old))
        embedded = torch.where(is_new[..., None], new, old)
        return embedded if self.scale is None else embedded * self.scale.to(embedded)


def grow_table(network: nn.Module, embedding: str, words: Sequence[EncoderWord]) -> dict[str, list[int]]:
    """Add rows for words to a network's token embeddings; return the token ids of the words by name.

    Args:
        network: The loaded network.
        embedding: Name of the weight of its token embeddings.
        words: The words in the order of their rows: words from files, or a single word to train.

    Raises:
        CheckpointError: If vectors of a file have a different width than the token embeddings.
    """
    parent_name, _, child_name = embedding.removesuffix(".weight").rpartition(".")
    parent = network.get_submodule(parent_name)
    token_embeddings = parent.get_submodule(child_name)
    assert isinstance(token_embeddings, nn.Embedding)
    expected_width = token_embeddings.embedding_dim
    for word in words:
        # a word to train has no vectors yet
        width = expected_width if word.vectors is None else word.vectors.shape[1]
        if width != expected_width:
            raise CheckpointError(
                f"{word.option} {word.source}: the vectors of {word.word.text} have width {width}, but this "
                f"text encoder takes width {expected_width}. Pass a file that was made for this model.",
                word.source,
            )
    grown = GrowingEmbedding(token_embeddings, sum(word.word.count for word in words))
    vectors = [word.vectors for word in words if word.vectors is not None]
    if vectors:  # otherwise `encoders.inversion` sets the rows
        grown.get_new_vectors = partial(torch.cat, vectors)
    setattr(parent, child_name, grown)
    return name_ids([word.word for word in words], grown.known)


def name_ids(words: Sequence[NewWord], vocabulary: int) -> dict[str, list[int]]:
    """Return the token ids of words (`cat`) and of their individual vectors (`cat1`), by name.

    If names collide, words take precedence over single vectors, and these over aliases.

    Args:
        words: The words, in the order of their rows.
        vocabulary: Number of embedding rows before the words.
    """
    ids: dict[str, list[int]] = {}
    word_names = {word.text.lower() for word in words}
    first_id = vocabulary  # first token id of the next word
    for word in words:
        for name, token_ids in word.list_ids(first_id).items():
            is_word = name == word.text
            # `cat1` is the first vector of `cat`, unless there is a word `cat1`
            if is_word or name.lower() not in word_names:
                ids[name] = token_ids
        # each copy of a word has rows of its own
        first_id += word.count * word.copies
    for word in words:
        if word.alias is not None and word.alias.lower() not in word_names:
            ids.setdefault(word.alias, ids[word.text])
    return ids
