"""The base class of text encoders: tokenizers, padded token rows, prompt weights, counting tokens, loading.

A tokenizer.json is read with the library tokenizers, because the tokenizer classes of transformers rebuild
some tokenizers with different rules.
"""

import contextlib
import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import sentencepiece
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from checkpoints.encoders import SPIECE_MODEL, TOKENIZER_JSON
from checkpoints.opening import Checkpoint, fingerprint, open_checkpoint
from checkpoints.tokenizers import TokenizerFiles, check_sentencepiece, piece_surfaces
from encoders.new_words import EncoderWord, compile_words, grow_table, name_ids
from modules.console import quiet
from modules.errors import CaptionError, CheckpointError
from modules.limits import MAX_TOKENIZER_BYTES
from protocols.data import Conditions, weigh_tokens
from protocols.family import EncoderAbilities
from protocols.requests import Prompt, Spans
from protocols.rules import (
    CharSpan,
    CountTokens,
    TextPiece,
    TokenCount,
    count_covered_characters,
    token_weights,
)
from runtime.offload.block_swap import move_network
from runtime.offload.host_memory import LoadedNetwork

# Letters: B prompts, L tokens

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 4096  # tokens of a batch of prompts; limits memory
END = "</s>"  # end token of SentencePiece models


class Tokens(NamedTuple):
    """Token ids of a text, and the character range of each token."""

    ids: list[int]
    char_spans: list[CharSpan]  # character range of each token; None for tokens that the tokenizer adds

    def count_after(self, end: float = math.inf) -> int:
        """Return the number of tokens that start at character `end` or later, including the end token."""
        number = 0
        for span in reversed(self.char_spans):
            if span is not None and span[0] < end:
                break
            number += 1
        return number

    def cut(self, maximum: int, end: float = math.inf) -> "Tokens":
        """Truncate the text that ends at character `end`, so that `maximum` tokens remain in total."""
        if len(self.ids) <= maximum:
            return self
        num_after = self.count_after(end)
        cut_end = len(self.ids) - num_after
        cut_start = maximum - num_after
        return Tokens(
            ids=self.ids[:cut_start] + self.ids[cut_end:],
            char_spans=self.char_spans[:cut_start] + self.char_spans[cut_end:],
        )


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer for text of any length."""

    read: Callable[[str], Tokens]
    token_to_id: Callable[[str], int | None]  # id of a token; None if there is no such token
    file: Path  # file of the tokenizer

    def with_words(self, words: Mapping[str, Sequence[int]]) -> "TextTokenizer":
        """Return a tokenizer that maps each of these words to its token ids."""
        return replace(self, read=_WordReader(self.read, words))


class _WordReader:
    """Tokenize text that contains additional words: tokenize the text between them, and insert their ids."""

    def __init__(self, read: Callable[[str], Tokens], words: Mapping[str, Sequence[int]]) -> None:
        names = sorted(words, key=len, reverse=True)  # longest first: a word may be a prefix of another
        self.tokenize_text = read  # the tokenizer, for text without additional words
        self.word_pattern = compile_words(names)  # with a group for each word
        self.ids_of_words = [list(words[name]) for name in names]  # in the order of the pattern's groups
        # tokenize any text, to see which tokens are added before and after it
        example = read("a")
        num_before = example.char_spans.index(next(span for span in example.char_spans if span is not None))
        num_after = example.count_after()
        self.ids_before = example.ids[:num_before]
        self.ids_after = example.ids[len(example.ids) - num_after :]

    def __call__(self, text: str) -> Tokens:
        """Return the tokens of a text: additional words get their own ids, text between them is tokenized."""
        if not self.word_pattern.search(text):
            return self.tokenize_text(text)
        ids = list(self.ids_before)
        char_spans: list[CharSpan] = [None] * len(self.ids_before)
        previous_end = 0  # end of the previous word, in characters
        for match in self.word_pattern.finditer(text):
            assert match.lastindex is not None
            # without the space before the word, because most tokens include the space in front of them
            text_before_word = text[previous_end : match.start()].removesuffix(" ")
            tokens = self._tokenize_between(text_before_word, previous_end)
            word_ids = self.ids_of_words[match.lastindex - 1]
            ids += [*tokens.ids, *word_ids]
            char_spans += [*tokens.char_spans, *[match.span()] * len(word_ids)]
            previous_end = match.end()
        tokens = self._tokenize_between(text[previous_end:], previous_end)
        ids += [*tokens.ids, *self.ids_after]
        char_spans += [*tokens.char_spans, *[None] * len(self.ids_after)]
        return Tokens(ids, char_spans)

    def _tokenize_between(self, text: str, start: int) -> Tokens:
        """Tokenize part of a text, which starts at character `start`, without special tokens."""
        if not text:
            return Tokens([], [])
        tokens = self.tokenize_text(text)
        inner = slice(len(self.ids_before), len(tokens.ids) - len(self.ids_after))
        char_spans: list[CharSpan] = []
        for span in tokens.char_spans[inner]:
            char_spans.append(None if span is None else (span[0] + start, span[1] + start))
        return Tokens(tokens.ids[inner], char_spans)


@dataclass(frozen=True)
class TokenizerSource:
    """Where to find an encoder's tokenizer, and which special tokens to add around a text."""

    files: TokenizerFiles
    begin: str = ""  # begin token, which is added if the tokenizer does not add it
    end: str = ""  # end token that the encoder was trained with; a tokenizer.json without it causes a warning
    adds_own: bool = True  # whether the special tokens of a tokenizer.json are added
    may_be_inside: bool = False  # whether the checkpoint may contain the tokenizer's file as a tensor
    read_file: Callable[[TokenizerFiles, Path], Tokenizer] = TokenizerFiles.read

    def find(self, path: Path | None, checkpoint_path: Path) -> tuple[Path | None, bool]:
        """Return the tokenizer's file, and whether the tokenizer is inside the checkpoint.

        The file is `path`, the value of the tokenizer's option, or if that is None, one near the checkpoint.
        It is None if the tokenizer is inside the checkpoint or must be downloaded.

        Raises:
            CheckpointError: If `path` is given but is not a tokenizer.
        """
        file = self.files.find(path, checkpoint_path)
        if file is not None or not self.may_be_inside:
            return file, False
        with open_checkpoint(checkpoint_path) as checkpoint:
            return None, _find_inside(checkpoint) is not None

    def identity(self, path: Path | None, checkpoint_path: Path) -> str:
        """Return the tokenizer's identity for cache records; `path` is the value of its option."""
        file, is_inside = self.find(path, checkpoint_path)
        if is_inside:
            return "inside the checkpoint"
        identity = self.files.identity(file)
        merges = find_merges(file)
        if merges is not None:
            identity += self.files.identity(merges)
        return identity

    def load(
        self, path: Path | None, checkpoint_path: Path, what: str, may_download: bool = True
    ) -> TextTokenizer:
        """Load the tokenizer.

        Args:
            path: Value of the tokenizer's option; None searches near the checkpoint.
            checkpoint_path: Checkpoint of the encoder.
            what: Name of the encoder, for the log.
            may_download: Whether a missing tokenizer may be downloaded from the hub.

        Raises:
            CheckpointError: If no tokenizer is found, if it cannot be read, or if the hub cannot be reached.
        """
        file, is_inside = self.find(path, checkpoint_path)
        if is_inside:
            logger.info("tokenizer of %s: the one inside %s", what, checkpoint_path)
            # Load the tokenizer that a checkpoint contains in a byte tensor
            with open_checkpoint(checkpoint_path) as checkpoint:
                name = _find_inside(checkpoint) or ""
                info = checkpoint.tensors[name]
                if len(info.shape) != 1 or math.prod(info.shape) * info.dtype.itemsize > MAX_TOKENIZER_BYTES:
                    error = ValueError(f"{name} is too large, or not a 1D tensor of bytes")
                    raise self.files.unreadable(checkpoint_path, error)
                model = checkpoint.read(name).view(torch.uint8).numpy().tobytes()
            if name.endswith(TOKENIZER_JSON):
                return self._from_tokenizer_json(self.files.read(checkpoint_path, model), checkpoint_path)
            return self._from_sentencepiece(model, checkpoint_path)
        if file is None:
            file = self.files.download(checkpoint_path, may_download)
        logger.info("tokenizer of %s: %s", what, file)
        if file.suffix == ".json":
            return self._from_tokenizer_json(self.read_file(self.files, file), file)
        return self._from_sentencepiece(self.files.read_bytes(file), file)

    def _from_tokenizer_json(self, tokenizer: Tokenizer, file: Path) -> TextTokenizer:
        """Return the tokenizer in a tokenizer.json, plus a begin token if one is configured."""
        begin = tokenizer.token_to_id(self.begin) if self.begin else None
        with self.files.convert_errors(file):
            # an empty text has only the ids that the tokenizer itself adds
            empty_text_ids: list[int] = tokenizer.encode("").ids
            tokenizer.encode("a b")  # a tokenizer that fails for every text raises its error here
        added_begin = []  # the begin token, unless the tokenizer adds it
        if begin is not None and empty_text_ids[:1] != [begin]:
            added_begin.append(begin)
        if self.end and empty_text_ids[-1:] != [tokenizer.token_to_id(self.end)]:
            logger.warning(
                "tokenizer %s does not end texts with %s, but the encoder was trained with it", file, self.end
            )

        def read(text: str) -> Tokens:
            with self.files.convert_errors(file):
                encoded = tokenizer.encode(text, add_special_tokens=self.adds_own)
            # char_spans: the characters that each token stands for; None for special tokens
            char_spans: list[CharSpan] = [None] * len(added_begin)
            for span, is_special in zip(encoded.offsets, encoded.special_tokens_mask, strict=True):
                char_spans.append(None if is_special else span)
            return Tokens([*added_begin, *encoded.ids], char_spans)

        return TextTokenizer(read, tokenizer.token_to_id, file)

    def _from_sentencepiece(self, model: bytes, origin: Path) -> TextTokenizer:
        """Build a tokenizer from a SentencePiece model, with begin and end tokens as configured."""
        # `origin` is the model's file, for messages.
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            check_sentencepiece(model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise self.files.unreadable(origin, error) from error
        added_begin = [processor.bos_id()] if self.begin else []
        added_end = [processor.eos_id()] if self.end else []
        if min([0, *added_begin, *added_end]) < 0:  # an id of -1 means that there is no such token
            missing = f"begin token {self.begin}" if self.begin else f"end token {self.end}"
            raise CheckpointError(
                f"{origin}: the tokenizer has no {missing}. Pass the tokenizer of this encoder to "
                f"{self.files.option}.",
                origin,
            )

        def read(text: str) -> Tokens:
            with self.files.convert_errors(origin):
                ids: list[int] = processor.encode(text)
                surfaces = piece_surfaces(processor.encode(text, out_type="serialized_proto"))
            # None for begin and end tokens
            char_spans: list[CharSpan] = [None] * len(added_begin)
            # Yield the characters of a text that each SentencePiece piece stands for
            # the pieces cover the text without gaps; only white space at its start may be dropped
            lengths = [len(surface) for surface in surfaces]
            # where each piece of the text begins, and where the last one ends
            edges = itertools.accumulate(lengths, initial=len(text) - sum(lengths))
            char_spans += itertools.pairwise(edges)
            char_spans += [None] * len(added_end)
            return Tokens([*added_begin, *ids, *added_end], char_spans)

        return TextTokenizer(read, processor.piece_to_id, origin)


def _find_inside(checkpoint: Checkpoint) -> str | None:
    """Return the name of the byte tensor that contains a tokenizer; None if there is none."""
    return next((name for name in checkpoint.tensors if name.endswith((SPIECE_MODEL, TOKENIZER_JSON))), None)


def find_merges(file: Path | None) -> Path | None:
    """Return the path of merges.txt next to a vocab.json; None for a tokenizer in a single file."""
    if file is None or file.name != "vocab.json":
        return None
    return file.with_name("merges.txt")


def fill_rows(
    rows: Sequence[Sequence[int]], length: int, pad: int, on_left: bool = False
) -> tuple[Tensor, Tensor]:
    """Pad token rows to `length`; return ids and mask (1 for real tokens), each B L int64."""
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(length - len(row), None) if on_left else slice(len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.int64)
        mask[index, columns] = 1
    return ids, mask


def check_ids(token_ids: Sequence[Sequence[int]], vocabulary: int, path: Path, option: str) -> None:
    """Raise CheckpointError if a token id has no embedding in the encoder.

    Args:
        token_ids: Token ids of each text.
        vocabulary: Number of the encoder's embeddings.
        path: File of the encoder, for the message.
        option: Option of the tokenizer, for the message.
    """
    # 0 if there are no texts or all are empty
    largest = max((max(ids, default=0) for ids in token_ids), default=0)
    if largest >= vocabulary:
        raise CheckpointError(
            f"{path} knows {vocabulary} tokens, but its tokenizer has more (token {largest}). "
            f"Pass the tokenizer of this model to {option}.",
            path,
        )


def in_groups(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Yield the prompts (token ids), in order, in groups with at most TOKENS_AT_ONCE tokens each."""
    group: list[list[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


Network = TypeVar("Network", bound=nn.Module)


class TemplatedPrompt(NamedTuple):
    """A prompt after its encoder's template has been applied."""

    text: str  # prompt with template
    prompt: str  # cleaned prompt without template
    spans: Spans  # weighted parts of `prompt`
    start: int = 0  # first character of the prompt in `text`
    suffix_start: float = math.inf  # `text` from this character on is never cut off, however long the prompt
    num_image_tokens: int = 0  # number of image tokens, which do not count towards the maximum


class FileTextEncoder(ABC, Generic[Network]):
    """A text encoder whose network is read from a file: load, encode, free.

    Subclasses implement the template (`apply_template`) and compute the conditions from tokens (`compute`).
    """

    abilities: ClassVar[EncoderAbilities] = EncoderAbilities()
    name: str  # name in messages and cache records
    keys: frozenset[str]  # keys of the conditions that `encode` returns
    variable_length: frozenset[str] = frozenset()  # keys whose tensors have the length of the prompt
    description: str = "the text encoder"  # name in the log
    source: TokenizerSource
    max_length: int  # longest prompt in tokens, not counting dropped template tokens
    weighted_states_key: str = ""  # key of the states that prompt weights multiply; "": no weights
    pads_left: bool = False  # padding is on the left, up to `max_length`
    logs_truncation: ClassVar[bool] = False  # whether each prompt that is too long is logged
    embedding: str = "embed_tokens.weight"  # name of the token embeddings in the network
    # keys of its vectors in embedding files (see `encoders.new_words.WordEncoder`)
    word_keys: tuple[str, ...] = ()
    added_words: Sequence[EncoderWord] = ()  # additional words (textual inversion)
    learns_word: bool = False  # whether an additional word is trained: gradients flow through the network
    # returns the number of template tokens before the prompt, whose states are dropped; None: there are none
    count_template_tokens: Callable[[TextTokenizer], int] | None = None
    # raises CheckpointError or warns if the tokenizer belongs to another model
    check_tokenizer: Callable[[TextTokenizer], None] | None = None

    def __init__(self, path: Path, tokenizer: Path | None = None, form: str | None = None) -> None:
        """Set up the encoder; files are read by `load`.

        Args:
            path: File or folder of the model.
            tokenizer: Value of the tokenizer's option; None searches near the model.
            form: Module of `checkpoints.stored` that quantizes the weights; None keeps the file's form.
        """
        self.path = path
        self.tokenizer = tokenizer
        self.form = form
        self._loaded = LoadedNetwork[Network, TextTokenizer]()

    @property
    def network(self) -> Network:
        """The loaded network; call `load` first."""
        return self._loaded.get()[0]

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Fields of cache records: everything that outputs depend on except the text. Reads a few MB.

        Raises:
            CheckpointError: If the file contains a different model.
        """

    @property
    def token_bytes(self) -> int:
        """Size in bytes of one token's hidden states; 0 if unknown."""
        return 0

    def identify(self, name: str, **settings: str | None) -> dict[str, str]:
        """Return the fields of `identity`: fingerprints of the files, and all settings that are not None.

        Keys begin with `name`.
        """
        identity = {
            name: fingerprint(self.path),
            f"{name}_tokenizer": self.source.identity(self.tokenizer, self.path),
        }
        for setting, value in settings.items():
            if value is not None:
                identity[f"{name}_{setting}"] = value
        return identity

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Return the prompt with the template applied; by default, there is no template."""
        return TemplatedPrompt(prompt.text, prompt.text, prompt.weighted_spans)

    def token_counter(self) -> CountTokens:
        """Return a function that counts a prompt's tokens as `max_length` limits them; loads no weights.

        For each prompt it also returns how many characters the encoder reads before it truncates, and how
        many bytes the states take in a cache.

        Raises:
            CheckpointError: If the tokenizer is not on this machine; it is not downloaded.
        """
        tokenizer = self.source.load(self.tokenizer, self.path, self.description, may_download=False)
        if self.added_words:
            # tokens are only counted, so any ids will do
            tokenizer = tokenizer.with_words(name_ids([word.word for word in self.added_words], 0))
        count_template_tokens = self.count_template_tokens
        num_template_tokens = 0 if count_template_tokens is None else count_template_tokens(tokenizer)
        token_bytes = 0
        with contextlib.suppress(CheckpointError):  # caching reports a file that is missing or damaged
            token_bytes = self.token_bytes

        return partial(self._count_tokens, tokenizer, num_template_tokens, token_bytes)

    def _count_tokens(
        self, tokenizer: TextTokenizer, num_template_tokens: int, token_bytes: int, text: str
    ) -> TokenCount:
        """Count a text's tokens, and how many of its characters the encoder reads."""
        # token_bytes: Size in bytes of one token's hidden states; 0 if unknown.
        try:
            templated = self.apply_template(Prompt(text))
        except CaptionError:  # reported when the text is encoded, and by --check
            return TokenCount(text, tokens=0, limit=self.max_length, num_read=len(text), size_bytes=0)
        tokens = tokenizer.read(templated.text)
        # truncation drops a prompt's last tokens, but not the template and end token after it
        num_suffix_tokens = tokens.count_after(templated.suffix_start)
        spans_before_suffix = tokens.char_spans[: len(tokens.char_spans) - num_suffix_tokens]
        # for each of these tokens: the number of prompt characters up to its end
        ends = [0 if span is None else span[1] - templated.start for span in spans_before_suffix]
        length = len(templated.prompt)
        max_tokens_read = num_template_tokens + self.max_length - num_suffix_tokens
        characters_read = count_covered_characters(ends, max_tokens_read, length)
        num_tokens = max(len(tokens.ids) - num_template_tokens, 0)
        # caches contain the states of these tokens; encoders of fixed length pad to `max_length`
        num_stored = min(num_tokens, self.max_length) if self.variable_length else self.max_length
        pieces = []
        for token, span in zip(tokens.ids, tokens.char_spans, strict=True):
            # tokens of the template lie outside the prompt; the first one may begin with the space before it
            if span is not None and span[0] < templated.start + length and span[1] > templated.start:
                pieces.append(TextPiece(token, templated.text[span[0] : span[1]]))
        return TokenCount(
            templated.prompt,
            tokens=num_tokens,
            limit=self.max_length,
            num_read=min(max(characters_read, 0), length),
            size_bytes=num_stored * token_bytes,
            pieces=tuple(pieces),
        )

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer, or move a loaded encoder to the device."""
        self._loaded.load(device, self._read, move_network)

    def _read(self, device: torch.device) -> tuple[Network, TextTokenizer]:
        # the tokenizer is loaded first, so that an error in it is reported before gigabytes are read
        tokenizer = self.source.load(self.tokenizer, self.path, self.description)
        if self.check_tokenizer is not None:
            self.check_tokenizer(tokenizer)
        network = self.load_network(device)
        if self.added_words:
            ids = grow_table(network, self.embedding, self.added_words)
            tokenizer = tokenizer.with_words(ids)
        return network, tokenizer

    def tokenize_word(self, text: str) -> list[int]:
        """Return the token ids that a text has inside a longer text; loads no weights.

        Raises:
            CheckpointError: If the tokenizer is not on this machine; it is not downloaded.
        """
        with quiet():  # the tokenizer is logged when the encoder is loaded
            tokenizer = self.source.load(self.tokenizer, self.path, self.description, may_download=False)
        tokens = tokenizer.read(f" {text.strip()}")  # inside a text, most tokens begin with a space
        # without the tokens that the tokenizer adds, which have no span in the text
        return [
            number for number, span in zip(tokens.ids, tokens.char_spans, strict=True) if span is not None
        ]

    @abstractmethod
    def load_network(self, device: torch.device) -> Network:
        """Load the network onto the device."""

    @abstractmethod
    def compute(
        self,
        network: Network,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
    ) -> list[Conditions]:
        """Return the conditions of each prompt, on the CPU.

        Args:
            network: The loaded network.
            tokenizer: The loaded tokenizer.
            token_ids: Token ids of each prompt with its template.
            num_template_tokens: Number of template tokens before each prompt; their states are dropped.
        """

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Encode prompts; return each prompt's conditions, keyed by `keys`, on the CPU, with gradients.

        States are multiplied by the prompt weights of their tokens.

        Raises:
            CheckpointError: If the tokenizer has more tokens than the network has embeddings.
        """
        return self.encode_templated([self.apply_template(prompt) for prompt in prompts], self.compute)

    def encode_templated(
        self, templated_prompts: Sequence[TemplatedPrompt], compute: Callable[..., list[Conditions]]
    ) -> list[Conditions]:
        """Encode prompts to which the template has been applied.

        `compute` is `self.compute`, possibly a partial with additional arguments.
        """
        if not templated_prompts:
            return []
        network, tokenizer = self._loaded.get()
        # tokens of the template before the prompt, whose states are not part of the result
        count_template_tokens = self.count_template_tokens
        num_template_tokens = 0 if count_template_tokens is None else count_template_tokens(tokenizer)
        all_tokens = [tokenizer.read(prompt.text) for prompt in templated_prompts]
        cut_tokens = []
        for tokens, prompt in zip(all_tokens, templated_prompts, strict=True):
            # only the tokens of the prompt's own text are limited
            max_tokens = num_template_tokens + prompt.num_image_tokens + self.max_length
            is_too_long = len(tokens.ids) > max_tokens
            cut_tokens.append(tokens.cut(max_tokens, prompt.suffix_start) if is_too_long else tokens)
        if self.logs_truncation:
            self._log_truncated(templated_prompts, all_tokens, cut_tokens)
        token_ids = [tokens.ids for tokens in cut_tokens]
        vocabulary = len(network.get_parameter(self.embedding)) + sum(
            word.word.count for word in self.added_words
        )
        check_ids(token_ids, vocabulary, self.path, self.source.files.option)
        results = compute(network, tokenizer, token_ids, num_template_tokens)
        # the family may not support weights such as (cat:1.2)
        if self.weighted_states_key and any(prompt.spans for prompt in templated_prompts):
            return self._weigh_prompts(results, templated_prompts, cut_tokens, num_template_tokens)
        return results

    def _weigh_prompts(
        self,
        results: Sequence[Conditions],
        templated_prompts: Sequence[TemplatedPrompt],
        cut_tokens: Sequence[Tokens],
        num_template_tokens: int,
    ) -> list[Conditions]:
        """Multiply the states of each prompt by the prompt weights of its tokens."""
        weighted = []
        for conditions, prompt, tokens in zip(results, templated_prompts, cut_tokens, strict=True):
            if prompt.spans:  # parts of the prompt that have a weight
                weights = compute_token_weights(prompt, tokens.char_spans[num_template_tokens:])
                conditions = self.weigh(conditions, weights)
            weighted.append(conditions)
        return weighted

    def _log_truncated(
        self,
        templated_prompts: Sequence[TemplatedPrompt],
        all_tokens: Sequence[Tokens],
        cut_tokens: Sequence[Tokens],
    ) -> None:
        """Log each prompt that is too long, with the number of tokens that were cut off."""
        for prompt, tokens, cut in zip(templated_prompts, all_tokens, cut_tokens, strict=True):
            left_out = len(tokens.ids) - len(cut.ids)
            if left_out > 0:
                logger.info(
                    "%d tokens of the prompt are cut off, %d are used: %.60s",
                    left_out,
                    self.max_length,
                    prompt.prompt,
                )

    def weigh(self, conditions: Conditions, weights: Sequence[float]) -> Conditions:
        """Multiply the states of a prompt's tokens by their prompt weights."""
        if self.pads_left:  # padding before the prompt has weight 1
            weights = [1.0] * (self.max_length - len(weights)) + [*weights]
        states: Any = conditions[self.weighted_states_key]
        if isinstance(states, Tensor):
            return {**conditions, self.weighted_states_key: weigh_tokens(states, weights)}
        # states of variable length are in a list
        return {**conditions, self.weighted_states_key: [weigh_tokens(rows, weights) for rows in states]}

    def free(self) -> None:
        """Release the network; the next `load` loads it again."""
        self._loaded.free()


def compute_token_weights(templated: TemplatedPrompt, char_spans: Sequence[CharSpan]) -> list[float]:
    """Return each token's prompt weight; `char_spans` contains each token's character range in the text."""
    start = templated.start
    prompt_characters = range(start, start + len(templated.prompt))
    prompt_spans: list[CharSpan] = []
    for span in char_spans:
        is_prompt_token = span is not None and span[0] in prompt_characters
        prompt_spans.append(span if is_prompt_token else None)  # tokens of the template have weight 1
    # positions in the prompt -> positions in the text
    spans = [(first + start, last + start, weight) for first, last, weight in templated.spans]
    return token_weights(templated.text, prompt_spans, spans)
