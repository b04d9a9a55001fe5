"""The umT5 text encoder: turn each prompt into a list of vectors as long as the prompt.

Module names follow the released file. Source: the released Wan2.1 code; UniMax umT5 (arXiv 2304.09151).
"""
# Letters: L tokens of all prompts concatenated, n tokens of one, N heads, D head width, C = model width

import html
import itertools
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import fingerprint, open_checkpoint
from modules.contract.data import Conditions
from modules.contract.generation import Prompt, Spans
from modules.contract.tokens import CountTokens, token_weights
from modules.contract.weighting import weigh_rows
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.offload.loaded import Loaded
from wan.encoder_checkpoints import T5Config, read_t5
from wan.tokenizer import T5Tokenizer, find_tokenizer, load_token_counter, load_tokenizer

logger = logging.getLogger(__name__)

MAX_DISTANCE = 128  # all larger relative positions share one bucket
TOKENS_AT_ONCE = 4096  # bounds memory when many prompts are given


def clean_text(text: str) -> str:
    """Repair encoding mistakes and full-width punctuation, unescape HTML entities, collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def clean_spans(text: str, spans: Spans) -> tuple[str, Spans]:
    """Return `clean_text(text)`, and where in it the parts are.

    A part is cleaned by itself to see how long it becomes. Where it is joined to its neighbours by what
    cleaning does (an accent behind the last letter of a part), places may be a character or two beside.
    """
    cleaned, length, places = clean_text(text), 0, []
    edges = [0, *(edge for start, end, _ in spans for edge in (start, end)), len(text)]
    for start, end in itertools.pairwise(edges):
        piece = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text[start:end]))))
        length += len(piece.lstrip() if length == 0 else piece)  # what a text begins with is dropped
        places.append(min(length, len(cleaned)))
    parts = zip(places[0::2], places[1::2], spans, strict=False)
    return cleaned, tuple((first, last, weight) for first, last, (_, _, weight) in parts)


def relative_bucket(distance: Tensor, num_buckets: int) -> Tensor:
    """Return the bucket of each relative position (key minus query).

    Buckets are exact for small distances and logarithmic up to MAX_DISTANCE; each sign has one half of them.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distance.abs()
    log_part = torch.log(size.float().clamp_min(1) / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    far = (exact + log_part.long()).clamp_max(half - 1)
    return (distance > 0).long() * half + torch.where(size < exact, size, far)


class T5Norm(nn.Module):
    """RMS norm: x / root mean square * weight, with the division in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class T5Attention(nn.Module):
    """Attention without scaling; each prompt attends only to itself."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.k = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.v = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.o = nn.Linear(config.attention_dim, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, lengths: Sequence[int]) -> Tensor:
        """Attend within each prompt. x: L C. bias: N n n for the longest prompt.

        lengths: of the prompts; they sum to L.
        """
        # N L D
        heads = [
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
            for linear in (self.q, self.k, self.v)
        ]
        outputs = []
        for q, k, v in zip(*(tensor.split(list(lengths), dim=1) for tensor in heads), strict=True):
            length = q.shape[1]
            mask = bias[None, :, :length, :length]
            outputs.append(
                F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=1.0)[0]
            )
        return self.o(torch.cat(outputs, dim=1).transpose(0, 1).flatten(1))


class T5FeedForward(nn.Module):
    """Gated feed-forward: fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim, bias=False), nn.GELU(approximate="tanh")
        )
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class PositionTable(nn.Module):
    """Attention bias of each head, looked up by the relative position of two tokens."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, length: int) -> Tensor:
        """Return the bias for `length` tokens, N n n: head, query, key."""
        distances = torch.arange(1 - length, length, device=self.embedding.weight.device)
        by_distance = self.embedding(relative_bucket(distances, self.embedding.num_embeddings)).T  # N 2n-1
        return by_distance.unfold(1, length, 1).flip(1)  # query i takes the window that begins at distance -i


class T5Block(nn.Module):
    """Attention and feed-forward with residuals. Unlike in T5, each block has its own position table."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm1 = T5Norm(config.dim)
        self.attn = T5Attention(config)
        self.norm2 = T5Norm(config.dim)
        self.ffn = T5FeedForward(config)
        self.pos_embedding = PositionTable(config)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        x = _within_float16(x + self.attn(self.norm1(x), self.pos_embedding(max(lengths)), lengths))
        return _within_float16(x + self.ffn(self.norm2(x)))


def _within_float16(x: Tensor) -> Tensor:
    """Clamp a float16 residual stream, which overflows in T5. Other dtypes pass unchanged."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max - 1000
    return x.clamp(-limit, limit)


class UmT5(nn.Module):
    """The encoder.

    Prompts of different lengths are concatenated without padding, so each gives the same result as alone.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = T5Norm(config.dim)

    def forward(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Encode prompts. ids: one vector of n token ids per prompt. Returns one n C tensor per prompt."""
        lengths = [len(prompt) for prompt in ids]
        x = self.token_embedding(torch.cat(list(ids)))
        for block in self.blocks:
            x = block(x, lengths)
        return list(self.norm(x).split(lengths))


def load_t5(path: Path, device: torch.device, in_fp8: bool = False) -> UmT5:
    """Load an umT5 encoder in the dtype of its file. fp8 weights are dequantized to bfloat16.

    in_fp8: keep the linear layers in 8 bits instead; an fp8 file's weights are then used as they are.
    Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_t5(checkpoint)
        stored = plan.checkpoint.tensors[plan.sources["blocks.0.attn.q.weight"].names[0]].dtype
        compute = _compute_dtype(stored, device)
        t5 = load_planned(plan, UmT5, device, compute, "the umT5 text encoder (--t5)", in_fp8)
    logger.info("T5: %s, stored as %s, computing in %s", path, dtype_name(stored), dtype_name(compute))
    return t5


def _compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    if stored == torch.float32 or (stored == torch.float16 and device.type != "cpu"):
        return stored
    return torch.bfloat16  # fp8 files; and float16 on a CPU: few CPUs have it, and the model is bfloat16


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
        self._loaded = Loaded[UmT5, T5Tokenizer]()

    @property
    def identity(self) -> Mapping[str, str]:
        """Return fingerprints of checkpoint and tokenizer, and how weights are kept. Reads a few MB."""
        identity = {
            "t5": fingerprint(self.path),
            "t5_tokenizer": find_tokenizer(self.tokenizer, self.path).identity,
        }
        return identity | ({"t5_weights": "fp8"} if self.in_fp8 else {})

    def token_counter(self) -> CountTokens:
        """Return a function that counts a text's tokens with the end token; only the tokenizer is loaded.

        Raises CheckpointError if there is no tokenizer here; none is downloaded.
        """
        count = load_token_counter(self.tokenizer, self.path)
        return lambda text: count(clean_text(text))

    def load(self, device: torch.device) -> None:
        """Load encoder and tokenizer. If they are loaded already, move the encoder to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[UmT5, T5Tokenizer]:
        # first, so that a bad tokenizer is reported before gigabytes are read
        tokenize = load_tokenizer(self.tokenizer, self.path)
        return load_t5(self.path, device, self.in_fp8), tokenize

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return {"t5": [n C]} on the CPU for each prompt.

        n: the number of the prompt's tokens with the end token, at most 512. The rows of a part's tokens are
        multiplied by the part's weight.
        Raises CheckpointError if the tokenizer has more tokens than the encoder.
        """
        t5, tokenizer = self._loaded.get()
        device = t5.norm.weight.device
        ids = [tokenizer(clean_text(prompt.text)) for prompt in prompts]
        largest, known = max((max(prompt) for prompt in ids), default=0), t5.token_embedding.num_embeddings
        if largest >= known:
            raise CheckpointError(
                f"{self.path} knows {known} tokens, but its tokenizer has more (token {largest}). "
                "Give the tokenizer of this encoder to --t5_tokenizer.",
                self.path,
            )
        results: list[Conditions] = []
        for group in _groups(ids):
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


def _groups(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Yield the prompts in order, in groups of at most TOKENS_AT_ONCE tokens."""
    group: list[list[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
