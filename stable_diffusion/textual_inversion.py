"""Textual inversion (--textual_inversion_embeddings): words that stand for learned vectors, not for tokens.

The name of a file, without its ending, is the word for all of its vectors; with 1, 2, ... appended, it is the
word for one of the vectors after the first. Words are found in any case, but not inside of other words.
LoRA files may contain words too, which act like other words at any strength of the LoRA.
Extended textual inversion (--XTI_embeddings) has another vector for each cross-attention of the U-Net.
Sources: Gal et al. 2022, arXiv 2208.01618; Voynov et al. 2023, arXiv 2303.09522 (P+).
"""
# Letters: V vectors of a word, C width of a text encoder, A cross-attentions of the U-Net

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.embedding_files import (
    TABLE,
    describe_content,
    list_tensors,
    read_embedding,
    reject_embedding,
    to_rows,
)
from encoders.new_words import NewWord, compile_words, name_ids
from generation.embedding_marks import OPTION
from modules.console import count_of, list_some
from modules.control_codes import shorten
from modules.errors import CheckpointError
from protocols.bundled_embeddings import WordsByFile
from stable_diffusion.contract import SDXL, LoadedTextEncoder, ModelKind
from stable_diffusion.tokenizers import SIZE

logger = logging.getLogger(__name__)

XTI_OPTION = "--XTI_embeddings"
# names of the vectors for each of several text encoders, in the order of the encoders, and for the only one
SEVERAL, SINGLE = ("clip_l", "clip_g"), "emb_params"
_NAMES_OF_SEVERAL = (SEVERAL, ("text_encoders_0", "text_encoders_1"))


@dataclass(frozen=True, eq=False)
class LearnedWord:
    """A word trained by textual inversion, with its vectors as read from a file."""

    path: Path
    word: str
    token: str | None  # the word that the file itself names, as diffusers' training writes it
    vectors: tuple[Tensor, ...]  # each V C, float32; one for each text encoder
    # extended textual inversion: A layers; vectors are A*V C, those of a layer one after the other
    layers: int = 1
    option: str = OPTION
    is_from_lora: bool = False  # `path` is a LoRA file, which names the word in its tensors


def read_words(
    paths: Sequence[Path], extended: Sequence[Path] = (), layers: Sequence[str] = (), option: str = OPTION
) -> tuple[LearnedWord, ...]:
    """Read files of textual inversion: safetensors, or pickled tensors without running code.

    Args:
        paths: Paths of the files.
        extended: Files of extended textual inversion, which have a tensor for each of `layers`.
        layers: Names of the U-Net's cross-attentions.
        option: Option that names `paths`.

    Raises:
        CheckpointError: If a file is missing or of another kind, or if two have the same name.
    """
    plain = [_read_word(path, option, path.stem, read_embedding(path, option)) for path in paths]
    words = (*plain, *(_read_extended(path, layers) for path in extended))
    for index, word in enumerate(words):
        for earlier in words[:index]:
            if earlier.word.lower() == word.word.lower():
                raise CheckpointError(
                    f"{word.option}: {earlier.path} and {word.path} are both for the word {word.word}. "
                    "Rename one of them.",
                    word.path,
                )
    return words


def read_lora_words(files: WordsByFile, option: str) -> tuple[LearnedWord, ...]:
    """Read the words in LoRA files; log which file contains which word.

    Args:
        files: Contents of each word by LoRA file.
        option: Option that names the files.

    Raises:
        CheckpointError: If a word cannot be read.
    """
    words: list[LearnedWord] = []
    for path, contents in files.items():
        of_file: list[LearnedWord] = []
        for name, content in contents.items():
            word = _read_word(path, f"the word {name} in {option}", name, content)
            of_file.append(replace(word, is_from_lora=True))
        names = ", ".join(f"{word.word} ({count_of(_count(word), 'vector')})" for word in of_file)
        logger.info("%s brings learned words for prompts: %s", path, names)
        words += of_file
    return tuple(words)


def merge_lora_words(
    words: Sequence[LearnedWord], lora_words: Sequence[LearnedWord]
) -> tuple[LearnedWord, ...]:
    """Combine words of embedding files and of LoRAs; warn about LoRA words that already exist."""
    chosen = {word.word.lower(): word for word in words}
    for word in lora_words:
        first = chosen.setdefault(word.word.lower(), word)
        if first is not word:
            logger.warning(
                "%s: the word %s of %s is used in place of the one that it brings.",
                word.path,
                first.word,
                first.path,
            )
    return tuple(chosen.values())


def add_words(
    text_encoders: Sequence[LoadedTextEncoder], kind: ModelKind, words: Sequence[LearnedWord]
) -> tuple[LoadedTextEncoder, ...]:
    """Return text encoders with these words added to their vocabularies.

    The networks are changed in place: they get rows for the words.

    Raises:
        CheckpointError: If vectors do not fit an encoder, or if a token with a word's name exists already.
    """
    if not words:
        return tuple(text_encoders)
    check_words(
        words,
        [text_encoder.network.embeddings.token_embedding.embedding_dim for text_encoder in text_encoders],
        kind,
    )
    for word in words:
        # words in LoRA files may replace known tokens, as in other programs
        if not word.is_from_lora and any(
            len(text_encoder.tokenize(word.word)) == 1 for text_encoder in text_encoders
        ):
            raise CheckpointError(
                f"{word.option} {word.path}: {word.word} is a word that the text encoder knows already. "
                "Rename the file, as its name is the word for it.",
                word.path,
            )
    for word in words:
        if not word.is_from_lora:  # `read_lora_words` has logged the others
            logger.info("textual inversion: %s (%d vectors)", word.word, _count(word))
    return tuple(_learn(text_encoder, words, index) for index, text_encoder in enumerate(text_encoders))


def _learn(text_encoder: LoadedTextEncoder, words: Sequence[LearnedWord], index: int) -> LoadedTextEncoder:
    """Return a text encoder with learned words added to its vocabulary.

    Args:
        text_encoder: The text encoder.
        words: The words to add.
        index: Index of the encoder in the checkpoint, which selects the vectors of each word.
    """
    embeddings = text_encoder.network.embeddings
    ids = list_ids(words, embeddings.token_embedding.num_embeddings)
    embeddings.token_embedding = add_rows(embeddings.token_embedding, words, index)
    # a word of --XTI_embeddings has the same number of vectors for each cross-attention, stored layer by
    # layer; the stride is the distance from a vector's row to the row for the next cross-attention
    strides = torch.zeros(embeddings.token_embedding.num_embeddings, dtype=torch.int64)
    for word in words:
        if word.layers > 1:
            strides[ids[word.word]] = _count(word)
    return replace(text_encoder, tokenize=with_words(text_encoder.tokenize, ids), layer_strides=strides)


def add_rows(table: nn.Embedding, words: Sequence[LearnedWord], index: int) -> nn.Embedding:
    """Return a table of token embeddings extended by rows for the vectors of learned words.

    Args:
        table: Token embeddings of the text encoder.
        words: Learned words.
        index: Index of the text encoder, whose vectors are used.
    """
    old = table.weight.detach()
    vectors = [word.vectors[index].to(old.device, old.dtype) for word in words]
    return nn.Embedding.from_pretrained(torch.cat([old, *vectors]), freeze=True)


def list_ids(words: Sequence[LearnedWord], vocabulary: int) -> dict[str, list[int]]:
    """Return the token ids of each word, under each of its names.

    Args:
        words: The words with their vectors.
        vocabulary: Number of embedding rows without the words.
    """
    return name_ids(
        [NewWord(word.word, _count(word), copies=word.layers, alias=word.token) for word in words], vocabulary
    )


def with_words(
    tokenize: Callable[[str], list[int]], words: Mapping[str, Sequence[int]]
) -> Callable[[str], list[int]]:
    """Return a tokenizer that maps `words` to their ids and leaves the text between them to `tokenize`."""
    names = sorted(words, key=len, reverse=True)  # longest first: one word may be a prefix of another
    ids = [list(words[name]) for name in names]
    pattern = compile_words(names)

    def tokenize_all(text: str) -> list[int]:
        tokens: list[int] = []
        position = 0
        for match in pattern.finditer(text):
            tokens += tokenize(text[position : match.start()])
            assert match.lastindex is not None  # each word is one group of the pattern
            tokens += ids[match.lastindex - 1]
            position = match.end()
        return tokens + tokenize(text[position:])

    return tokenize_all


def _count(word: LearnedWord) -> int:
    """Return how many vectors a word has; one that learns per layer has as many for each cross-attention."""
    return len(word.vectors[0]) // word.layers


def check_words(words: Sequence[LearnedWord], widths: Sequence[int], kind: ModelKind) -> None:
    """Raise CheckpointError if vectors do not fit text encoders of these widths, or if there are too many."""
    for word in words:
        vector_widths = [vectors.shape[1] for vectors in word.vectors]
        if list(widths) != vector_widths:
            hint = ""
            if kind is SDXL and len(vector_widths) == 1:
                hint = (
                    " It has one set of vectors; files for Stable Diffusion XL have two, clip_l and clip_g."
                )
            raise CheckpointError(
                f"{word.option} {word.path}: its vectors have {_join(vector_widths)} numbers, the text "
                f"encoders of {kind.title} take {_join(widths)}.{hint} Give a file that was made for "
                f"{kind.title}.",
                word.path,
            )
        if _count(word) > SIZE:
            raise CheckpointError(
                f"{word.option} {word.path}: it has {_count(word)} vectors; a text encoder reads {SIZE} "
                "tokens at a time, so that more than these are never read together.",
                word.path,
            )


def _join(numbers: Sequence[int]) -> str:
    return " and ".join(str(number) for number in numbers)


def _read_word(path: Path, option: str, name: str, content: Mapping[str, Any]) -> LearnedWord:
    """Return a learned word called `name` with the vectors in a file's content."""
    tensors, token = _select_tensors(path, option, content)
    vectors = tuple(to_rows(path, option, tensors).values())
    if len({len(rows) for rows in vectors}) > 1:
        raise reject_embedding(path, option, "it has unequal numbers of vectors for the text encoders")
    return LearnedWord(path, name, token, vectors, option=option)


def _read_extended(path: Path, layers: Sequence[str]) -> LearnedWord:
    """Read a file of extended textual inversion, which has vectors for each cross-attention of the U-Net.

    Args:
        path: Path of the file.
        layers: Names of its tensors, one for each cross-attention, in their order.
    """
    content = read_embedding(path, XTI_OPTION)
    tensors = {name: content[name] for name in layers if isinstance(content.get(name), Tensor)}
    if tensors.keys() != content.keys() or len(tensors) != len(layers):
        # a missing layer is named first, otherwise an unexpected tensor
        wrong_names = sorted({*layers} - tensors.keys()) or sorted(content.keys() - tensors.keys())
        raise _reject_extended(path, XTI_OPTION, f"{shorten(wrong_names[0], 60)} is missing or strange")
    vectors = tuple(to_rows(path, XTI_OPTION, tensors, _reject_extended).values())
    if len({rows.shape for rows in vectors}) > 1:
        raise _reject_extended(path, XTI_OPTION, "its layers have vectors of unequal numbers or widths")
    return LearnedWord(
        path,
        word=path.stem,
        token=None,
        vectors=(torch.cat(vectors),),
        layers=len(layers),
        option=XTI_OPTION,
    )


def _reject_extended(path: Path, option: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{option} {path} is not an extended textual inversion of this model: {why}. Give a file with a "
        "tensor for each cross-attention of the U-Net (IN01, ..., MID, ..., OUT11), or others to "
        f"{OPTION}.",
        path,
    )


def _select_tensors(
    path: Path, option: str, content: Mapping[str, Any]
) -> tuple[dict[str, Tensor], str | None]:
    """Return the vectors by tensor name, in the order of the text encoders, and the file's word or None."""
    inner = content.get(TABLE)
    if isinstance(inner, Mapping):
        embeddings = list_tensors(inner)  # placeholder -> vectors; usually the placeholder is "*", no word
        if len(embeddings) == 1:
            return embeddings, None
        raise reject_embedding(path, option, f"{TABLE} has {len(embeddings)} words")
    tensors = list_tensors(content)
    for names in (*_NAMES_OF_SEVERAL, (SINGLE,)):
        if tensors.keys() >= set(names):
            unused = tensors.keys() - set(names)
            if unused:
                logger.warning("%s: %s: not used are %s.", option, path, list_some(sorted(unused)))
            return {name: tensors[name] for name in names}, None
    if len(tensors) == 1 and len(content) == 1:  # diffusers: word -> vectors
        return tensors, next(iter(tensors))
    raise reject_embedding(path, option, describe_content(content))
