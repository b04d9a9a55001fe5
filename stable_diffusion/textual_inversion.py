"""Textual inversion (--textual_inversion_embeddings): words that stand for learned vectors, not for tokens.

The name of a file, without its ending, is the word for all of its vectors; with 1, 2, ... appended, it is the
word for one of the vectors after the first. Words are found in any case, but not inside other words.
LoRA files may contain words too, which act like other words at any strength of the LoRA.
Extended textual inversion (--XTI_embeddings) has a separate vector for each cross-attention of the U-Net.
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
from modules.console import format_count, list_some
from modules.control_codes import shorten
from modules.errors import CheckpointError
from protocols.bundled_embeddings import WordsByFile
from stable_diffusion.contract import SDXL, LoadedTextEncoder, ModelKind
from stable_diffusion.tokenizers import CHUNK_SIZE

logger = logging.getLogger(__name__)

XTI_OPTION = "--XTI_embeddings"
# names of the tensors in embedding files: one for each of SDXL's text encoders, or one for the only encoder
SDXL_TENSOR_NAMES, SD_TENSOR_NAME = ("clip_l", "clip_g"), "emb_params"
_ALL_SDXL_TENSOR_NAMES = (SDXL_TENSOR_NAMES, ("text_encoders_0", "text_encoders_1"))


@dataclass(frozen=True, eq=False)
class LearnedWord:
    """A word trained by textual inversion, with its vectors read from a file."""

    path: Path
    text: str  # the word in prompts
    placeholder_token: str | None  # the word that the file itself names, as diffusers' training writes it
    vectors: tuple[Tensor, ...]  # each V C, float32; one for each text encoder
    # extended textual inversion: A cross-attentions; `vectors` are A*V C, layer by layer
    num_cross_attentions: int = 1
    option: str = OPTION
    is_from_lora: bool = False  # `path` is a LoRA file, which names the word in its tensors

    @property
    def num_vectors(self) -> int:
        """Number of vectors V in each text encoder; with extended inversion, for each cross-attention."""
        return len(self.vectors[0]) // self.num_cross_attentions


def read_words(
    paths: Sequence[Path],
    xti_paths: Sequence[Path] = (),
    cross_attentions: Sequence[str] = (),
    option: str = OPTION,
) -> tuple[LearnedWord, ...]:
    """Read embedding files of textual inversion: safetensors, or pickled tensors without running code.

    Args:
        paths: Files of ordinary textual inversion.
        xti_paths: Files of extended textual inversion, with one tensor per cross-attention.
        cross_attentions: Names of the U-Net's cross-attentions.
        option: Option that names `paths`.

    Raises:
        CheckpointError: If a file is missing or of a different kind, or if two have the same name.
    """
    words = [_read_word(path, option, path.stem, read_embedding(path, option)) for path in paths]
    words += [_read_extended(path, cross_attentions) for path in xti_paths]
    by_name: dict[str, LearnedWord] = {}
    for word in words:
        earlier = by_name.setdefault(word.text.lower(), word)
        if earlier is not word:
            raise CheckpointError(
                f"{word.option}: {earlier.path} and {word.path} are both for the word {word.text}. "
                "Rename one of them.",
                word.path,
            )
    return tuple(words)


def read_lora_words(files: WordsByFile, option: str) -> tuple[LearnedWord, ...]:
    """Read the words in LoRA files; log which file contains which word.

    Args:
        files: For each LoRA file, the tensors of each word in it.
        option: Option that names the files.

    Raises:
        CheckpointError: If a word cannot be read.
    """
    words: list[LearnedWord] = []
    for path, contents in files.items():
        file_words: list[LearnedWord] = []
        for name, content in contents.items():
            word = _read_word(path, f"the word {name} in {option}", name, content)
            file_words.append(replace(word, is_from_lora=True))
        names = ", ".join(f"{word.text} ({format_count(word.num_vectors, 'vector')})" for word in file_words)
        logger.info("%s brings learned words for prompts: %s", path, names)
        words += file_words
    return tuple(words)


def merge_lora_words(
    words: Sequence[LearnedWord], lora_words: Sequence[LearnedWord]
) -> tuple[LearnedWord, ...]:
    """Combine words from embedding files and LoRAs; warn about LoRA words that already exist."""
    word_by_name = {word.text.lower(): word for word in words}
    for word in lora_words:
        known_word = word_by_name.setdefault(word.text.lower(), word)
        if known_word is not word:
            logger.warning(
                "%s: the word %s of %s is used instead of the one in this file.",
                word.path,
                known_word.text,
                known_word.path,
            )
    return tuple(word_by_name.values())


def add_words(
    text_encoders: Sequence[LoadedTextEncoder], kind: ModelKind, words: Sequence[LearnedWord]
) -> tuple[LoadedTextEncoder, ...]:
    """Return text encoders with these words added to their vocabularies.

    The networks get embedding rows for the words, in place.

    Raises:
        CheckpointError: If vectors do not fit an encoder, or if a token with a word's name already exists.
    """
    if not words:
        return tuple(text_encoders)
    widths = [encoder.network.embeddings.token_embedding.embedding_dim for encoder in text_encoders]
    check_words(words, widths, kind)
    _check_new(words, text_encoders)
    for word in words:
        if not word.is_from_lora:  # `read_lora_words` has logged the others
            logger.info("textual inversion: %s (%d vectors)", word.text, word.num_vectors)
    return tuple(_add_words_to_encoder(encoder, words, index) for index, encoder in enumerate(text_encoders))


def _check_new(words: Sequence[LearnedWord], text_encoders: Sequence[LoadedTextEncoder]) -> None:
    """Raise CheckpointError if a word is a single token already."""
    # Words in LoRA files may replace known tokens, as in other programs.
    for word in words:
        is_known_token = any(len(encoder.tokenize(word.text)) == 1 for encoder in text_encoders)
        if is_known_token and not word.is_from_lora:
            raise CheckpointError(
                f"{word.option} {word.path}: {word.text} is a word that the text encoder knows already. "
                "Rename the file, because its name is the word.",
                word.path,
            )


def _add_words_to_encoder(
    text_encoder: LoadedTextEncoder, words: Sequence[LearnedWord], index: int
) -> LoadedTextEncoder:
    """Return a text encoder with learned words added to its vocabulary."""
    embeddings = text_encoder.network.embeddings
    ids = list_ids(words, embeddings.token_embedding.num_embeddings)
    embeddings.token_embedding = extend_token_embedding(embeddings.token_embedding, words, index)
    # an --XTI_embeddings word has V rows for each cross-attention, layer by layer: a token's rows for two
    # successive cross-attentions are V rows apart
    layer_strides = torch.zeros(embeddings.token_embedding.num_embeddings, dtype=torch.int64)
    for word in words:
        if word.num_cross_attentions > 1:
            layer_strides[ids[word.text]] = word.num_vectors
    tokenize = tokenize_with_words(text_encoder.tokenize, ids)
    return replace(text_encoder, tokenize=tokenize, layer_strides=layer_strides)


def extend_token_embedding(table: nn.Embedding, words: Sequence[LearnedWord], index: int) -> nn.Embedding:
    """Return token embeddings with additional rows for the vectors of learned words.

    Args:
        table: Token embeddings of the text encoder.
        words: Learned words.
        index: Index of the text encoder, which selects a word's vectors.
    """
    old = table.weight.detach()
    vectors = [word.vectors[index].to(old.device, old.dtype) for word in words]
    return nn.Embedding.from_pretrained(torch.cat([old, *vectors]), freeze=True)


def list_ids(words: Sequence[LearnedWord], vocabulary: int) -> dict[str, list[int]]:
    """Return the token ids of each word, under each of its names.

    Args:
        words: The words with their vectors.
        vocabulary: Number of embedding rows before the words.
    """
    return name_ids(
        [
            NewWord(
                word.text, word.num_vectors, copies=word.num_cross_attentions, alias=word.placeholder_token
            )
            for word in words
        ],
        vocabulary,
    )


def tokenize_with_words(
    tokenize: Callable[[str], list[int]], words: Mapping[str, Sequence[int]]
) -> Callable[[str], list[int]]:
    """Return a tokenize function that also knows learned words; `tokenize` handles other text.

    Args:
        tokenize: Returns the token ids of a text.
        words: Token ids of each learned word.
    """
    names = sorted(words, key=len, reverse=True)  # longest first: one word may be a prefix of another
    group_token_ids = [list(words[name]) for name in names]
    pattern = compile_words(names)  # with one group for each name, in this order

    def tokenize_all(text: str) -> list[int]:
        tokens: list[int] = []
        position = 0
        for match in pattern.finditer(text):
            tokens += tokenize(text[position : match.start()])
            assert match.lastindex is not None
            tokens += group_token_ids[match.lastindex - 1]
            position = match.end()
        return tokens + tokenize(text[position:])

    return tokenize_all


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
                f"{word.option} {word.path}: its vectors have width {_join(vector_widths)}, but the text "
                f"encoders of {kind.title} take width {_join(widths)}.{hint} Pass a file that was made for "
                f"{kind.title}.",
                word.path,
            )
        if word.num_vectors > CHUNK_SIZE:
            raise CheckpointError(
                f"{word.option} {word.path}: it has {word.num_vectors} vectors, but a text encoder reads at "
                f"most {CHUNK_SIZE} tokens at a time.",
                word.path,
            )


def _join(numbers: Sequence[int]) -> str:
    return " and ".join(str(number) for number in numbers)


def _read_word(path: Path, option: str, name: str, content: Mapping[str, Any]) -> LearnedWord:
    """Return a learned word named `name`, with the embedding vectors in a file's content."""
    tensors, token = _select_tensors(path, option, content)
    vectors = tuple(to_rows(path, option, tensors).values())  # V C of each encoder
    if len({len(encoder_vectors) for encoder_vectors in vectors}) > 1:
        raise reject_embedding(path, option, "it has unequal numbers of vectors for the text encoders")
    return LearnedWord(path, name, token, vectors, option=option)


def _read_extended(path: Path, cross_attentions: Sequence[str]) -> LearnedWord:
    """Read a file of extended textual inversion, which has vectors for each cross-attention of the U-Net."""
    content = read_embedding(path, XTI_OPTION)
    tensors = {name: content[name] for name in cross_attentions if isinstance(content.get(name), Tensor)}
    missing = sorted({*cross_attentions} - tensors.keys())
    unexpected = sorted(content.keys() - tensors.keys())
    if missing or unexpected:
        wrong_name = (missing or unexpected)[0]
        raise _reject_extended(path, XTI_OPTION, f"{shorten(wrong_name, 60)} is missing or unexpected")
    vectors = tuple(to_rows(path, XTI_OPTION, tensors, _reject_extended).values())
    if len({layer_vectors.shape for layer_vectors in vectors}) > 1:
        raise _reject_extended(path, XTI_OPTION, "its layers have vectors of unequal numbers or widths")
    return LearnedWord(
        path,
        text=path.stem,
        placeholder_token=None,
        vectors=(torch.cat(vectors),),
        num_cross_attentions=len(cross_attentions),
        option=XTI_OPTION,
    )


def _reject_extended(path: Path, option: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{option} {path} is not an extended textual inversion of this model: {why}. Pass a file with a "
        "tensor for each cross-attention of the U-Net (IN01, ..., MID, ..., OUT11), or others to "
        f"{OPTION}.",
        path,
    )


def _select_tensors(
    path: Path, option: str, content: Mapping[str, Any]
) -> tuple[dict[str, Tensor], str | None]:
    """Return the vectors in an embedding file, and its placeholder token or None."""
    # The vectors are keyed by tensor name, in the order of the text encoders. Formats: A1111 (a table of
    # vectors), SDXL trainers (a tensor for each text encoder), diffusers (token: vectors).
    table = content.get(TABLE)
    if isinstance(table, Mapping):
        embeddings = list_tensors(table)  # usually the key is "*", not a word
        if len(embeddings) == 1:
            return embeddings, None
        raise reject_embedding(path, option, f"{TABLE} has {len(embeddings)} words")
    tensors = list_tensors(content)
    for names in (*_ALL_SDXL_TENSOR_NAMES, (SD_TENSOR_NAME,)):
        if tensors.keys() >= set(names):
            unused = tensors.keys() - set(names)
            if unused:
                logger.warning("%s: %s: unused: %s.", option, path, list_some(sorted(unused)))
            return {name: tensors[name] for name in names}, None
    if len(tensors) == 1 and len(content) == 1:
        (placeholder_token,) = tensors
        return tensors, placeholder_token
    raise reject_embedding(path, option, describe_content(content))
