"""What text encoders share: from prompts to rows of tokens, weights of parts, counting, loading."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from encoders.tokenizers import TextTokenizer, TokenizerSource, Tokens, check_ids
from modules.checkpoints.opening import fingerprint
from modules.contract.data import Conditions, weigh_rows
from modules.contract.requests import Prompt, Spans
from modules.contract.rules import CountTokens, TokenCount, kept_characters, token_weights
from modules.offload.host_memory import LoadedNetwork

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


class Written(NamedTuple):
    """A prompt as its encoder reads it."""

    own: str  # the prompt, cleaned
    spans: Spans  # of its parts
    before: str = ""  # what a template puts in front
    after: str = ""

    @property
    def text(self) -> str:
        """Return all that is read."""
        return f"{self.before}{self.own}{self.after}"


class FileTextEncoder(ABC, Generic[Network]):
    """A text encoder whose network is read from a file: load, encode, free.

    Families derive theirs and say what is written around a prompt, and what becomes of rows of tokens.
    """

    name: str  # in messages and cache records
    keys: frozenset[str]  # of the results of `encode`
    variable_length: frozenset[str] = frozenset()
    what: str = "the text encoder"  # in the log
    source: TokenizerSource
    most: int  # tokens of a prompt that are kept, without those that are dropped
    weighed: str = ""  # key of the states that the weights of parts multiply; "": none
    tells_cuts: ClassVar[bool] = False  # log each prompt that is too long
    embedding: ClassVar[str] = "embed_tokens.weight"  # of the tokens, in the network

    def __init__(self, path: Path, tokenizer: Path | None) -> None:
        """Set up the encoder; `load` reads the files. tokenizer: of its option; None looks for it."""
        self.path = path
        self.tokenizer = tokenizer
        self._loaded = LoadedNetwork[Network, TextTokenizer]()

    @property
    def network(self) -> Network:
        """The network. Call `load` first."""
        return self._loaded.get()[0]

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Return what an output depends on beside the text. Reads a few MB.

        Raises CheckpointError if the file holds another model.
        """

    def identify(self, name: str, **facts: str | None) -> dict[str, str]:
        """Return fingerprints of checkpoint and tokenizer with further facts, those of None left out."""
        found = {"": fingerprint(self.path), "_tokenizer": self.source.identity(self.tokenizer, self.path)}
        found |= {f"_{fact}": value for fact, value in facts.items() if value is not None}
        return {f"{name}{fact}": value for fact, value in found.items()}

    def write(self, prompt: Prompt) -> Written:
        """Return a prompt as the encoder reads it."""
        return Written(prompt.text, prompt.spans)

    def count_dropped(self, tokenizer: TextTokenizer) -> int:
        """Return how many tokens stand before the prompt, whose states are cut off."""
        return 0

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens with those around it; only the tokenizer is loaded.

        Raises CheckpointError if there is no tokenizer here; none is downloaded.
        """
        tokenizer = self.source.load(self.tokenizer, self.path, self.what, may_download=False)
        dropped = self.count_dropped(tokenizer)

        def count(text: str) -> TokenCount:
            written = self.write(Prompt(text))
            tokens, own = tokenizer.read(written.text), written.own
            inside = tokens.places[: len(tokens.places) - tokens.behind]
            ends = [0 if place is None else place[1] - len(written.before) for place in inside]
            kept = kept_characters(ends, dropped + self.most - tokens.behind, len(own))
            counted = max(len(tokens.ids) - dropped, 0)
            return TokenCount(own, counted, self.most, min(max(kept, 0), len(own)))

        return count

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[Network, TextTokenizer]:
        # first, so that a bad tokenizer is reported before gigabytes are read
        tokenizer = self.source.load(self.tokenizer, self.path, self.what)
        self.check_tokenizer(tokenizer)
        return self.load_network(device), tokenizer

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise CheckpointError, or warn, if the tokenizer is not that of the model."""
        _ = tokenizer

    @abstractmethod
    def load_network(self, device: torch.device) -> Network:
        """Load the network on the device."""

    @abstractmethod
    def compute(
        self, network: Network, tokenizer: TextTokenizer, rows: Sequence[list[int]], dropped: int
    ) -> list[Conditions]:
        """Return the results of prompts, on the CPU. rows: their tokens. dropped: how many before them."""

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return the tensors `keys` of each prompt, on the CPU; gradients flow to trained parts.

        The states of a part's tokens are multiplied by the part's weight. Raises CheckpointError if the
        tokenizer has more tokens than the network.
        """
        if not prompts:
            return []
        network, tokenizer = self._loaded.get()
        dropped = self.count_dropped(tokenizer)
        written = [self.write(prompt) for prompt in prompts]
        read = [tokenizer.read(one.text) for one in written]
        kept = [tokens.cut(dropped + self.most) for tokens in read]
        for whole, cut, one in zip(read, kept, written, strict=True):
            if self.tells_cuts and len(cut.ids) < len(whole.ids):
                left_out = len(whole.ids) - len(cut.ids)
                logger.info(
                    "%d tokens of the prompt are cut off, %d are used: %.60s", left_out, self.most, one.own
                )
        rows = [tokens.ids for tokens in kept]
        known = len(network.get_parameter(self.embedding))
        check_ids(rows, known, self.path, self.source.files.option)
        results = self.compute(network, tokenizer, rows, dropped)
        if not self.weighed:
            return results
        return [
            _weigh(found, self.weighed, weights_within(one, tokens, dropped)) if one.spans else found
            for found, one, tokens in zip(results, written, kept, strict=True)
        ]

    def free(self) -> None:
        """Release the encoder and its memory."""
        self._loaded.free()


def weights_within(written: Written, tokens: Tokens, dropped: int) -> list[float]:
    """Return the weights of the tokens behind those that are dropped; those around the prompt have 1."""
    start = len(written.before)
    inside = range(start, start + len(written.own))
    own = [place if place is not None and place[0] in inside else None for place in tokens.places[dropped:]]
    shifted = [(first + start, last + start, weight) for first, last, weight in written.spans]
    return token_weights(written.text, own, shifted)


def _weigh(found: Conditions, key: str, weights: Sequence[float]) -> Conditions:
    states: Any = found[key]
    if isinstance(states, Tensor):
        return {**found, key: weigh_rows(states, weights)}
    return {**found, key: [weigh_rows(one, weights) for one in states]}
