"""Wan's text encoder: umT5 turns each prompt into a list of vectors as long as the prompt.

Source: the released Wan2.1 code.
"""
# Letters: n tokens of one prompt, C = model width

import html
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from encoders.piece_tokenizers import T5Tokenizer, T5Tokenizers, check_ids, in_groups
from encoders.t5_network import T5Network
from encoders.t5_network import load_t5 as load_any_t5
from modules.checkpoints.opening import fingerprint
from modules.checkpoints.tokenizers import TokenizerFiles
from modules.contract.data import Conditions, weigh_rows
from modules.contract.requests import Prompt, Spans
from modules.contract.rules import CountTokens, token_weights
from modules.errors import InstallationError
from modules.offload.host_memory import LoadedNetwork
from wan.encoder_checkpoints import UMT5

MAX_TOKENS = 512  # with the end token, as trained
TOKENIZER = T5Tokenizers(
    TokenizerFiles(
        option="--t5_tokenizer",
        names=("tokenizer.json", "spiece.model", "tokenizer.model"),
        folder="google/umt5-xxl",  # in the released repositories of Wan2.1
        repository="Wan-AI/Wan2.1-T2V-14B",
        # official repositories; diffusers pipelines, with text_encoder and tokenizer side by side; a
        # tokenizer saved in the text encoder's folder
        beside=("google/umt5-xxl", "tokenizer", "../tokenizer", "."),
    ),
    MAX_TOKENS,
)


def clean_text(text: str) -> str:
    """Repair encoding mistakes and full-width punctuation, unescape HTML entities, collapse white space."""
    text = _repair(text)
    return re.sub(r"\s+", " ", text).strip()


def _repair(text: str) -> str:
    """Repair encoding mistakes and unescape HTML entities. Raises InstallationError without ftfy."""
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing that ftfy would change
        return text
    try:
        import ftfy
    except ModuleNotFoundError:
        raise InstallationError(
            "prompts of Wan are cleaned with the package ftfy, which is not installed. Install it: "
            f"{sys.executable} -m pip install ftfy"
        ) from None
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def clean_spans(text: str, spans: Spans) -> tuple[str, Spans]:
    """Return `clean_text(text)`, and where in it the parts are.

    A part is cleaned by itself to see how long it becomes. If cleaning joins it to its neighbours (an accent
    behind the last letter of a part), places may be a character or two beside.
    """
    cleaned, length, places = clean_text(text), 0, []
    edges = [0, *(edge for start, end, _ in spans for edge in (start, end)), len(text)]
    for start, end in itertools.pairwise(edges):
        piece = re.sub(r"\s+", " ", _repair(text[start:end]))
        length += len(piece.lstrip() if length == 0 else piece)  # what a text begins with is dropped
        places.append(min(length, len(cleaned)))
    parts = zip(places[0::2], places[1::2], spans, strict=False)
    return cleaned, tuple((first, last, weight) for first, last, (_, _, weight) in parts)


def load_t5(path: Path, device: torch.device, in_fp8: bool = False) -> T5Network:
    """Load an umT5 encoder in the dtype of its file; see `encoders.t5_network.load_t5`."""
    return load_any_t5(path, device, UMT5, in_fp8=in_fp8)


class WanTextEncoder:
    """umT5 with its tokenizer, as the shared loops use it: load, encode, free."""

    name = "t5"
    keys = frozenset({"t5"})
    variable_length = frozenset({"t5"})

    def __init__(self, path: Path, tokenizer: Path | None = None, in_fp8: bool = False) -> None:
        """Set up the encoder; `load` reads the files. in_fp8: keep the linear layers in 8 bits."""
        self.path = path
        self.tokenizer = tokenizer
        self.in_fp8 = in_fp8
        self._loaded = LoadedNetwork[T5Network, T5Tokenizer]()

    @property
    def identity(self) -> Mapping[str, str]:
        """Return fingerprints of checkpoint and tokenizer, and how weights are kept. Reads a few MB."""
        identity = {
            "t5": fingerprint(self.path),
            "t5_tokenizer": TOKENIZER.find(self.tokenizer, self.path).identity,
        }
        return identity | ({"t5_weights": "fp8"} if self.in_fp8 else {})

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens with the end token; only the tokenizer is loaded.

        Raises CheckpointError if there is no tokenizer here; none is downloaded.
        """
        count = TOKENIZER.load_counter(self.tokenizer, self.path)
        return lambda text: count(clean_text(text))

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[T5Network, T5Tokenizer]:
        # first, so that a bad tokenizer is reported before gigabytes are read
        tokenize = TOKENIZER.load(self.tokenizer, self.path)
        return load_t5(self.path, device, self.in_fp8), tokenize

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return {"t5": [n C]} on the CPU for each prompt.

        n: the number of the prompt's tokens with the end token, at most 512. The rows of a part's tokens are
        multiplied by the part's weight.
        Raises CheckpointError if the tokenizer has more tokens than the encoder.
        """
        t5, tokenizer = self._loaded.get()
        device = t5.device
        ids = [tokenizer(clean_text(prompt.text)) for prompt in prompts]
        check_ids(ids, t5.token_embedding.num_embeddings, self.path, TOKENIZER.files.option)
        results: list[Conditions] = []
        for group in in_groups(ids):
            embeds = t5([torch.tensor(prompt, device=device) for prompt in group])
            results += [{"t5": [embed.to("cpu", copy=True)]} for embed in embeds]
        for index, prompt in enumerate(prompts):
            if prompt.spans:
                text, spans = clean_spans(prompt.text, prompt.spans)
                weights = token_weights(text, tokenizer.places(text), spans)
                results[index] = {"t5": [weigh_rows(results[index]["t5"][0], weights)]}
        return results

    def free(self) -> None:
        """Release the encoder and its memory."""
        self._loaded.free()
