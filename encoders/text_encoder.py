"""Base of text encoders: tokenizers, padded token rows, prompt weights, counting tokens, loading.

tokenizer.json is read directly, because the tokenizer classes of transformers rebuild some tokenizers with
different rules.
"""

import contextlib
import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from protocols.data import Conditions, weigh_rows
from protocols.family import EncoderAbilities
from protocols.requests import Prompt, Spans
from protocols.rules import CountTokens, Place, TokenCount, kept_characters, token_weights
from runtime.offload.block_swap import move_network
from runtime.offload.host_memory import LoadedNetwork

# Letters: B prompts, L tokens

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 4096  # limits memory if there are many prompts
END = "</s>"  # end token of SentencePiece models


class Tokens(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    places: list[Place]  # character range of each token; None for tokens that the tokenizer adds

    def behind(self, end: float = math.inf) -> int:
        """Return the number of tokens at the end that `cut` must keep.

        These are the tokens from character `end` on, and the end token.
        """
        last_places = itertools.takewhile(
            lambda place: place is None or place[0] >= end, reversed(self.places)
        )
        return sum(1 for _ in last_places)

    def cut(self, maximum: int, end: float = math.inf) -> "Tokens":
        """Shorten the text to `maximum` tokens; the tokens at the end that `behind` counts are kept."""
        if len(self.ids) <= maximum:
            return self
        behind = self.behind(end)
        last = len(self.ids) - behind
        first = maximum - behind
        return Tokens(self.ids[:first] + self.ids[last:], self.places[:first] + self.places[last:])


@dataclass(frozen=True)
class TextTokenizer:
    """Turn text of any length into tokens."""

    read: Callable[[str], Tokens]
    number: Callable[[str], int | None]  # id of a token; None if there is no such token
    file: Path  # file of the tokenizer

    def with_words(self, words: Mapping[str, Sequence[int]]) -> "TextTokenizer":
        """Return a tokenizer that turns each of these words into its token ids."""
        return replace(self, read=_WordReader(self.read, words))


class _WordReader:
    """Tokenize texts with additional words.

    The space before a word is dropped, because most tokens include the space before them.
    """

    def __init__(self, read: Callable[[str], Tokens], words: Mapping[str, Sequence[int]]) -> None:
        names = sorted(words, key=len, reverse=True)  # longest first: a word may be a prefix of another
        self.read_plain = read
        self.pattern = compile_words(names)
        self.ids = [list(words[name]) for name in names]
        around = read("a").places  # "a" is any text: counts the tokens that are added before and after it
        self.begin = sum(1 for _ in itertools.takewhile(_is_added, around))
        self.end = sum(1 for _ in itertools.takewhile(_is_added, reversed(around)))

    def __call__(self, text: str) -> Tokens:
        """Return the tokens of a text."""
        if not self.pattern.search(text):
            return self.read_plain(text)
        around = self.read_plain("a")
        ids = around.ids[: self.begin]
        places: list[Place] = [None] * self.begin
        last = 0  # end of the previous word in characters
        for match in self.pattern.finditer(text):
            assert match.lastindex is not None
            self._add(ids, places, text[last : match.start()].removesuffix(" "), last)
            word_ids = self.ids[match.lastindex - 1]
            ids += word_ids
            places += [match.span()] * len(word_ids)
            last = match.end()
        self._add(ids, places, text[last:], last)
        ids += around.ids[len(around.ids) - self.end :]
        return Tokens(ids, [*places, *[None] * self.end])

    def _add(self, ids: list[int], places: list[Place], text: str, start: int) -> None:
        """Add the tokens of the text between two words; `start` is its first character."""
        if not text:
            return
        tokens = self.read_plain(text)
        inner = slice(self.begin, len(tokens.ids) - self.end)
        ids += tokens.ids[inner]
        for place in tokens.places[inner]:
            places.append(None if place is None else (place[0] + start, place[1] + start))


def _is_added(place: Place) -> bool:
    """Return whether the tokenizer added this token before or after the text."""
    return place is None


@dataclass(frozen=True)
class TokenizerSource:
    """Places to look for an encoder's tokenizer, and the special tokens to put around a text."""

    files: TokenizerFiles
    begin: str = ""  # begin token to add if the tokenizer does not
    end: str = ""  # end token that the encoder was trained with; warn if a tokenizer.json does not add it
    adds_own: bool = True  # whether a tokenizer.json adds its special tokens
    may_be_inside: bool = False  # the checkpoint may contain a SentencePiece model or a tokenizer.json
    read_file: Callable[[TokenizerFiles, Path], Tokenizer] = TokenizerFiles.read

    def find(self, path: Path | None, checkpoint_path: Path) -> tuple[Path | None, bool]:
        """Return the tokenizer's file, and whether the tokenizer is inside the checkpoint.

        The file is `path` if the option is set, else one next to the checkpoint. The file is None if the
        tokenizer is inside the checkpoint or has to be downloaded from the hub.

        Raises:
            CheckpointError: If `path` is set and is not a tokenizer.
        """
        file = self.files.find(path, checkpoint_path)
        if file is not None or not self.may_be_inside:
            return file, False
        with open_checkpoint(checkpoint_path) as checkpoint:
            return None, _find_inside(checkpoint) is not None

    def identity(self, path: Path | None, checkpoint_path: Path) -> str:
        """Return the identity of the tokenizer for cache records; `path` is the option's value."""
        file, is_inside = self.find(path, checkpoint_path)
        if is_inside:
            return "inside the checkpoint"
        merges = find_merges(file)
        return self.files.identity(file) + ("" if merges is None else self.files.identity(merges))

    def load(
        self, path: Path | None, checkpoint_path: Path, what: str, may_download: bool = True
    ) -> TextTokenizer:
        """Load the tokenizer.

        Args:
            path: Path from the tokenizer's option; None searches the usual places.
            checkpoint_path: Checkpoint of the encoder.
            what: Name of the encoder, for the log.
            may_download: Whether a missing tokenizer may be downloaded from the hub.

        Raises:
            CheckpointError: If no tokenizer is found, if it cannot be read, or if the hub cannot be reached.
        """
        file, is_inside = self.find(path, checkpoint_path)
        if is_inside:
            logger.info("tokenizer of %s: the one inside %s", what, checkpoint_path)
            return self._load_inside(checkpoint_path)
        if file is None:
            file = self.files.download(checkpoint_path, may_download)
        logger.info("tokenizer of %s: %s", what, file)
        if file.suffix == ".json":
            return self._use_json(self.read_file(self.files, file), file)
        return self._read_pieces(self.files.read_bytes(file), file)

    def _load_inside(self, checkpoint_path: Path) -> TextTokenizer:
        """Load the tokenizer that a checkpoint contains as a tensor of bytes."""
        with open_checkpoint(checkpoint_path) as checkpoint:
            name = _find_inside(checkpoint) or ""
            info = checkpoint.tensors[name]
            if len(info.shape) != 1 or math.prod(info.shape) * info.dtype.itemsize > MAX_TOKENIZER_BYTES:
                error = ValueError(f"{name} is too large, or no row of bytes")
                raise self.files.unreadable(checkpoint_path, error)
            model = checkpoint.read(name).view(torch.uint8).numpy().tobytes()
        if name.endswith(TOKENIZER_JSON):
            return self._use_json(self.files.read(checkpoint_path, model), checkpoint_path)
        return self._read_pieces(model, checkpoint_path)

    def _use_json(self, tokenizer: Tokenizer, file: Path) -> TextTokenizer:
        """Return the tokenizer of a tokenizer.json, with a begin token if one is configured."""
        begin = tokenizer.token_to_id(self.begin) if self.begin else None
        with self.files.explain(file):
            empty: list[int] = tokenizer.encode("").ids
            tokenizer.encode("a b")  # only for its error: a tokenizer that fails for any text fails here
        first = []  # the begin token, unless the tokenizer adds it
        if begin is not None and empty[:1] != [begin]:
            first.append(begin)
        if self.end and empty[-1:] != [tokenizer.token_to_id(self.end)]:
            logger.warning(
                "tokenizer %s does not end texts with %s, but the encoder was trained with it", file, self.end
            )

        def read(text: str) -> Tokens:
            with self.files.explain(file):
                encoded = tokenizer.encode(text, add_special_tokens=self.adds_own)
            positions: list[Place] = [None] * len(first)
            for position, is_added in zip(encoded.offsets, encoded.special_tokens_mask, strict=True):
                positions.append(None if is_added else position)
            return Tokens([*first, *encoded.ids], positions)

        return TextTokenizer(read, tokenizer.token_to_id, file)

    def _read_pieces(self, model: bytes, origin: Path) -> TextTokenizer:
        """Build the tokenizer of a SentencePiece model, with begin and end tokens as configured.

        `origin` is the file of the model, for messages.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            check_sentencepiece(model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise self.files.unreadable(origin, error) from error
        first = [processor.bos_id()] if self.begin else []
        last = [processor.eos_id()] if self.end else []
        if min([0, *first, *last]) < 0:
            missing = f"begin token {self.begin}" if self.begin else f"end token {self.end}"
            raise CheckpointError(
                f"{origin}: the tokenizer has no {missing}. Give the tokenizer of this encoder to "
                f"{self.files.option}.",
                origin,
            )

        def read(text: str) -> Tokens:
            with self.files.explain(origin):
                ids: list[int] = processor.encode(text)
                surfaces = piece_surfaces(processor.encode(text, out_type="serialized_proto"))
            # the pieces cover the text without gaps; only white space at its start may be dropped
            start_of_text = len(text) - sum(map(len, surfaces))
            edges = itertools.accumulate(map(len, surfaces), initial=start_of_text)
            positions: list[Place] = [None] * len(first)
            positions += itertools.pairwise(edges)
            positions += [None] * len(last)
            return Tokens([*first, *ids, *last], positions)

        return TextTokenizer(read, processor.piece_to_id, origin)


def _find_inside(checkpoint: Checkpoint) -> str | None:
    """Return the name of the tensor with the bytes of a tokenizer; None if there is none."""
    return next((name for name in checkpoint.tensors if name.endswith((SPIECE_MODEL, TOKENIZER_JSON))), None)


def find_merges(file: Path | None) -> Path | None:
    """Return the path of merges.txt next to a vocab.json; None for a tokenizer in a single file."""
    return file.with_name("merges.txt") if file is not None and file.name == "vocab.json" else None


def fill_rows(
    rows: Sequence[Sequence[int]], length: int, pad: int, on_left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return token ids and mask (1 for real tokens), each B L int64, with rows padded to `length`."""
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(length - len(row), None) if on_left else slice(len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.int64)
        mask[index, columns] = 1
    return ids, mask


def check_ids(rows: Sequence[Sequence[int]], vocabulary: int, path: Path, option: str) -> None:
    """Raise CheckpointError if a token id has no embedding in the encoder at `path`.

    `rows` are the token ids of texts, `vocabulary` is the number of embeddings, and `option` is the
    option of the tokenizer.
    """
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= vocabulary:
        raise CheckpointError(
            f"{path} knows {vocabulary} tokens, but its tokenizer has more (token {largest}). "
            f"Give the tokenizer of this model to {option}.",
            path,
        )


def in_groups(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Yield the prompts (token ids) in order, in groups of at most TOKENS_AT_ONCE tokens."""
    group: list[list[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


Network = TypeVar("Network", bound=nn.Module)


class Written(NamedTuple):
    """A prompt in the template of its encoder."""

    text: str  # prompt with template
    prompt: str  # cleaned prompt without template
    spans: Spans  # weighted parts of the prompt
    start: int = 0  # first character of the prompt in `text`
    end: float = math.inf  # characters of `text` from here on are kept if the prompt is too long
    uncounted: int = 0  # tokens of images, which do not count towards the maximum


class FileTextEncoder(ABC, Generic[Network]):
    """A text encoder whose network is read from a file: load, encode, free.

    Subclasses implement the template (`write`) and compute the conditions from tokens (`compute`).
    """

    can: ClassVar[EncoderAbilities] = EncoderAbilities()
    name: str  # name in messages and cache records
    keys: frozenset[str]  # keys of the conditions that `encode` returns
    variable_length: frozenset[str] = frozenset()  # keys whose tensors have the length of the prompt
    what: str = "the text encoder"  # name in the log
    source: TokenizerSource
    maximum: int  # longest prompt in tokens, not counting dropped template tokens
    takes_weights: str = ""  # key of the states that prompt weights multiply; "": weights are not supported
    pads_left: bool = False  # padding is on the left, up to `maximum`
    logs_cuts: ClassVar[bool] = False  # log each prompt that is too long
    embedding: str = "embed_tokens.weight"  # name of the token embeddings in the network
    # keys of its vectors in embedding files (see `encoders.new_words.WordEncoder`)
    word_keys: tuple[str, ...] = ()
    words: Sequence[EncoderWord] = ()  # additional words (textual inversion)
    learns_word: bool = False  # an additional word is trained: gradients flow through the network
    # returns the number of tokens before the prompt, whose states are cut off; None: there are none
    count_dropped: Callable[[TextTokenizer], int] | None = None
    # raises CheckpointError, or warns, if the tokenizer belongs to another model
    check_tokenizer: Callable[[TextTokenizer], None] | None = None

    def __init__(self, path: Path, tokenizer: Path | None = None, form: str | None = None) -> None:
        """Set up the encoder; files are read by `load`.

        Args:
            path: File or folder of the model.
            tokenizer: Path from the tokenizer's option; None searches the usual places.
            form: Module of `checkpoints.stored` that quantizes the weights; None keeps the file's form.
        """
        self.path = path
        self.tokenizer = tokenizer
        self.form = form
        self._loaded = LoadedNetwork[Network, TextTokenizer]()

    @property
    def network(self) -> Network:
        """The network. Call `load` first."""
        return self._loaded.get()[0]

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Entries of cache records: all that outputs depend on except the text. Reads a few MB.

        Raises:
            CheckpointError: If the file contains another model.
        """

    @property
    def token_bytes(self) -> int:
        """Size in bytes of the states of one token; 0 if unknown."""
        return 0

    def identify(self, name: str, **facts: str | None) -> dict[str, str]:
        """Return entries for `identity`: fingerprints and all `facts` except None; keys begin with `name`."""
        identity = {
            name: fingerprint(self.path),
            f"{name}_tokenizer": self.source.identity(self.tokenizer, self.path),
        }
        for fact, value in facts.items():
            if value is not None:
                identity[f"{name}_{fact}"] = value
        return identity

    def write(self, prompt: Prompt) -> Written:
        """Return the prompt in the template; here the prompt alone."""
        return Written(prompt.text, prompt.text, prompt.spans)

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens, including those of the template; loads no weights.

        Raises:
            CheckpointError: If the tokenizer is not on this machine; it is not downloaded.
        """
        tokenizer = self.source.load(self.tokenizer, self.path, self.what, may_download=False)
        if self.words:
            # tokens are only counted, so any ids will do
            tokenizer = tokenizer.with_words(name_ids([word.word for word in self.words], 0))
        dropped = 0 if self.count_dropped is None else self.count_dropped(tokenizer)
        token_bytes = 0
        with contextlib.suppress(CheckpointError):  # caching reports a file that is missing or damaged
            token_bytes = self.token_bytes

        def count(text: str) -> TokenCount:
            try:
                written = self.write(Prompt(text))
            except CaptionError:  # reported when the text is encoded, and by --check
                return TokenCount(text, tokens=0, limit=self.maximum, num_read=len(text), size_bytes=0)
            tokens = tokenizer.read(written.text)
            num_behind = tokens.behind(written.end)
            # a cut never drops the template and the end token after the prompt
            droppable = tokens.places[: len(tokens.places) - num_behind]
            ends = [0 if place is None else place[1] - written.start for place in droppable]
            length = len(written.prompt)
            max_kept = dropped + self.maximum - num_behind
            characters = kept_characters(ends, max_kept, length)
            counted = max(len(tokens.ids) - dropped, 0)
            stored = min(counted, self.maximum) if self.variable_length else self.maximum
            return TokenCount(
                written.prompt,
                tokens=counted,
                limit=self.maximum,
                num_read=min(max(characters, 0), length),
                size_bytes=stored * token_bytes,
            )

        return count

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        self._loaded.load(device, self._read, move_network)

    def _read(self, device: torch.device) -> tuple[Network, TextTokenizer]:
        # first, so that a bad tokenizer is reported before gigabytes are read
        tokenizer = self.source.load(self.tokenizer, self.path, self.what)
        if self.check_tokenizer is not None:
            self.check_tokenizer(tokenizer)
        network = self.load_network(device)
        if self.words:
            ids = grow_table(network, self.embedding, self.words)
            tokenizer = tokenizer.with_words(ids)
        return network, tokenizer

    def tokenize_word(self, text: str) -> list[int]:
        """Return the token ids of a text as if it stood inside a longer text; loads no weights.

        Raises:
            CheckpointError: If the tokenizer is not on this machine; it is not downloaded.
        """
        with quiet():  # the tokenizer is logged when the encoder is loaded
            tokenizer = self.source.load(self.tokenizer, self.path, self.what, may_download=False)
        # most tokens of words begin with a space
        tokens = tokenizer.read(f" {text.strip()}")
        return [number for number, place in zip(tokens.ids, tokens.places, strict=True) if place is not None]

    @abstractmethod
    def load_network(self, device: torch.device) -> Network:
        """Load the network on the device."""

    @abstractmethod
    def compute(
        self, network: Network, tokenizer: TextTokenizer, rows: Sequence[list[int]], dropped: int
    ) -> list[Conditions]:
        """Return the conditions of each prompt, on the CPU.

        `rows` are the token ids of each prompt; the states of the first `dropped` tokens are left out.
        """

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return the conditions of each prompt, with the keys `keys`, on the CPU; gradients are kept.

        States are multiplied by the prompt weights of their tokens.

        Raises:
            CheckpointError: If the tokenizer has more tokens than the network.
        """
        return self.encode_written([self.write(prompt) for prompt in prompts], self.compute)

    def encode_written(
        self, written: Sequence[Written], compute: Callable[..., list[Conditions]]
    ) -> list[Conditions]:
        """Encode prompts that are already in the template.

        `compute` is `self.compute`, possibly with additional arguments bound.
        """
        if not written:
            return []
        network, tokenizer = self._loaded.get()
        dropped = 0 if self.count_dropped is None else self.count_dropped(tokenizer)
        all_tokens = [tokenizer.read(prompt.text) for prompt in written]
        cut_tokens = []
        for tokens, prompt in zip(all_tokens, written, strict=True):
            max_tokens = dropped + prompt.uncounted + self.maximum
            cut_tokens.append(tokens.cut(max_tokens, prompt.end))
        if self.logs_cuts:
            self._log_cuts(written, all_tokens, cut_tokens)
        rows = [tokens.ids for tokens in cut_tokens]
        num_rows = len(network.get_parameter(self.embedding)) + sum(word.word.count for word in self.words)
        check_ids(rows, num_rows, self.path, self.source.files.option)
        results = compute(network, tokenizer, rows, dropped)
        if not self.takes_weights:
            return results
        weighted = []
        for conditions, prompt, tokens in zip(results, written, cut_tokens, strict=True):
            if prompt.spans:
                weights = weights_of(prompt, tokens.places[dropped:])
                conditions = self.weigh(conditions, weights)
            weighted.append(conditions)
        return weighted

    def _log_cuts(
        self, written: Sequence[Written], all_tokens: Sequence[Tokens], cut_tokens: Sequence[Tokens]
    ) -> None:
        """Log each prompt that is too long."""
        for prompt, tokens, cut in zip(written, all_tokens, cut_tokens, strict=True):
            left_out = len(tokens.ids) - len(cut.ids)
            if left_out > 0:
                logger.info(
                    "%d tokens of the prompt are cut off, %d are used: %.60s",
                    left_out,
                    self.maximum,
                    prompt.prompt,
                )

    def weigh(self, conditions: Conditions, weights: Sequence[float]) -> Conditions:
        """Multiply the states of a prompt's tokens by their weights."""
        if self.pads_left:
            weights = [1.0] * (self.maximum - len(weights)) + [*weights]
        states: Any = conditions[self.takes_weights]
        if isinstance(states, Tensor):
            return {**conditions, self.takes_weights: weigh_rows(states, weights)}
        return {**conditions, self.takes_weights: [weigh_rows(rows, weights) for rows in states]}

    def free(self) -> None:
        """Release the network; the next `load` loads it again."""
        self._loaded.free()


def weights_of(written: Written, places: Sequence[Place]) -> list[float]:
    """Return the weight of each token; `places` has the character range of each token in the text."""
    prompt_characters = range(written.start, written.start + len(written.prompt))
    # tokens of the template have weight 1
    prompt_places = [place if place and place[0] in prompt_characters else None for place in places]
    spans = [(first + written.start, last + written.start, weight) for first, last, weight in written.spans]
    return token_weights(written.text, prompt_places, spans)
