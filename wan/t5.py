"""Wan's text encoder: umT5 turns each prompt into a list of vectors as long as the prompt.

Source: the released Wan2.1 code.
"""
# Letters: n tokens of one prompt, C = model width

import html
import itertools
import re
import sys
from collections.abc import Mapping, Sequence

import torch

from checkpoints.tokenizers import TokenizerFiles
from encoders.t5_network import T5Kind, T5Network, load_t5
from encoders.text_encoder import (
    END,
    FileTextEncoder,
    TemplatedPrompt,
    TextTokenizer,
    TokenizerSource,
    in_groups,
)
from modules.errors import InstallationError
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.loading import BlockSharder
from protocols.requests import Prompt, Spans
from wan.spec import TEXT_KEYS

MAX_TOKENS = 512  # with the end token, as trained
UMT5 = T5Kind(
    name="umT5",
    description="an umT5 encoder",
    option="--t5",
    release="models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_*.safetensors",
    has_own_tables=True,
)
TOKENIZER = TokenizerSource(
    TokenizerFiles(
        option="--t5_tokenizer",
        names=("tokenizer.json", "spiece.model", "tokenizer.model"),
        folder="google/umt5-xxl",  # in the released repositories of Wan2.1
        repository="Wan-AI/Wan2.1-T2V-14B",
        # official repositories; diffusers pipelines, with text_encoder and tokenizer side by side; a
        # tokenizer saved in the text encoder's folder
        folders=("google/umt5-xxl", "tokenizer", "../tokenizer", "."),
    ),
    end=END,
    may_be_inside=True,
)


def clean_text(text: str) -> str:
    """Repair encoding mistakes and full-width punctuation, unescape HTML entities, collapse white space.

    White space at the ends becomes a single space. Raises InstallationError if the package ftfy is missing.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else ftfy would change nothing
        try:
            import ftfy
        except ModuleNotFoundError:
            raise InstallationError(
                "prompts of Wan are cleaned with the package ftfy, which is not installed. Install it: "
                f"{sys.executable} -m pip install ftfy"
            ) from None
        # twice, as in the released code
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text)


def clean_spans(text: str, spans: Spans) -> tuple[str, Spans]:
    """Clean and strip a prompt; return it with the new positions of its weighted parts (start, end, weight).

    Each part is cleaned alone to measure its length. If cleaning joins it to its neighbors (an accent after
    the last letter of a part), positions may be off by a character or two.
    """
    cleaned = clean_text(text).strip()
    edges = [0]  # starts and ends of all parts, plain and weighted
    for start, end, _ in spans:
        edges += [start, end]
    edges.append(len(text))
    length = 0  # length of the cleaned parts so far
    cleaned_ends = []
    for start, end in itertools.pairwise(edges):
        part = clean_text(text[start:end])
        length += len(part.lstrip() if length == 0 else part)  # white space at the start is dropped
        cleaned_ends.append(min(length, len(cleaned)))
    # plain and weighted parts alternate, so a weighted part starts where the plain part before it ends
    starts = cleaned_ends[0::2]
    ends = cleaned_ends[1::2]
    weights = [weight for _, _, weight in spans]
    return cleaned, tuple(zip(starts, ends, weights, strict=False))


class WanTextEncoder(FileTextEncoder[T5Network]):
    """umT5, which encodes each prompt as one state per token, at most 512 including the end token."""

    abilities = EncoderAbilities(shardable=True, accepts_new_words=True)
    name = "t5"
    keys = variable_length = TEXT_KEYS
    description = "umT5"
    source = TOKENIZER
    max_length = MAX_TOKENS
    weighted_states_key = "t5"
    embedding = "token_embedding.weight"
    word_keys = ("umt5xxl",)
    sentence: str = ""  # of Bernini, in front of all prompts but negative ones
    blocks: BlockSharder | None = None  # splits the network over processes

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that the outputs depend on: file, tokenizer, form of the weights, Bernini's sentence."""
        return self.identify("t5", weights=self.form, sentence=self.sentence or None)

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Return the cleaned prompt with the positions of its weighted parts, which cleaning may shift."""
        if self.sentence and not prompt.is_negative:
            from wan.bernini import begin_with  # only for Bernini

            prompt = begin_with(prompt, self.sentence)
        text, spans = clean_spans(prompt.text, prompt.weighted_spans)
        return TemplatedPrompt(text, text, spans)

    def load_network(self, device: torch.device) -> T5Network:
        """Load umT5 in the requested form; with `blocks`, only this process's part of its blocks."""
        return load_t5(self.path, device, UMT5, form=self.form, blocks=self.blocks)

    def compute(
        self, network: T5Network, tokenizer: TextTokenizer, rows: Sequence[list[int]], dropped: int
    ) -> list[Conditions]:
        """Return {"t5": [n C]} for each prompt of n tokens. `dropped` is not used: umT5 has no template."""
        results: list[Conditions] = []
        for group in in_groups(rows):
            embeds = network([torch.tensor(prompt) for prompt in group])
            results += [{"t5": [embed.to("cpu", copy=True)]} for embed in embeds]
        return results
