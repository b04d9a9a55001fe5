"""The umT5 text encoder: prompts to a list of vectors each, as long as the prompt.

Module names follow the released file. Source: the released Wan2.1 code; UniMax umT5 (arXiv 2304.09151).
"""
# Letters: L tokens of all prompts in a row, n tokens of one, N heads, D head width, C = model width

import html
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
from modules.contract.generation import Prompt
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.offload.loaded import Loaded
from wan.encoder_checkpoints import T5Config, read_t5
from wan.tokenizer import Tokenize, find_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

MAX_DISTANCE = 128  # relative positions beyond it share a bucket
TOKENS_AT_ONCE = 4096  # bounds memory when many prompts are given


def clean_text(text: str) -> str:
    """Mended encoding mistakes and full-width punctuation, HTML entities resolved, runs of white space as one
    blank.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def relative_bucket(distance: Tensor, num_buckets: int) -> Tensor:
    """Bucket of each relative position (key minus query): exact when small, logarithmic up to MAX_DISTANCE,
    one half per sign.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distance.abs()
    log_part = torch.log(size.float().clamp_min(1) / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    far = (exact + log_part.long()).clamp_max(half - 1)
    return (distance > 0).long() * half + torch.where(size < exact, size, far)


class T5Norm(nn.Module):
    """x / root mean square * weight, the division in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class T5Attention(nn.Module):
    """Attention without scaling; each prompt sees itself only."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.k = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.v = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.o = nn.Linear(config.attention_dim, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, lengths: Sequence[int]) -> Tensor:
        """x: L C. bias: N n n for the longest prompt. lengths: of the prompts, summing to L."""
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
    """Gated: fc2(fc1(x) * gelu(gate(x)))."""

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
    """What each head adds to the attention between two tokens, by their relative position."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, length: int) -> Tensor:
        """N n n: head, query, key."""
        distances = torch.arange(1 - length, length, device=self.embedding.weight.device)
        by_distance = self.embedding(relative_bucket(distances, self.embedding.num_embeddings)).T  # N 2n-1
        return by_distance.unfold(1, length, 1).flip(1)  # query i sees the window that begins at distance -i


class T5Block(nn.Module):
    """Attention and feed-forward with residuals; a table of relative positions of its own, which is what
    makes it umT5.
    """

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
    """T5's residual stream outgrows float16; other dtypes pass."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max - 1000
    return x.clamp(-limit, limit)


class UmT5(nn.Module):
    """The encoder.

    Prompts of different lengths stand in one row without padding, so each gives what it gives alone.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = T5Norm(config.dim)

    def forward(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """ids: one vector of n token ids per prompt. Returns for each n C."""
        lengths = [len(prompt) for prompt in ids]
        x = self.token_embedding(torch.cat(list(ids)))
        for block in self.blocks:
            x = block(x, lengths)
        return list(self.norm(x).split(lengths))


def load_t5(path: Path, device: torch.device, in_fp8: bool = False) -> UmT5:
    """Load an umT5 encoder in the dtype it has in the file. fp8 files are multiplied out to bfloat16.

    in_fp8: its linear layers are kept in 8 bits, as those of an fp8 file then stay.

    Raises CheckpointError where the file is damaged or of another model.
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
    return torch.bfloat16  # fp8 files; float16 on a CPU, where few have it and bfloat16 is the model's own


class WanTextEncoder:
    """umT5 with its tokenizer as the shared loops see it: load, encode, free."""

    name = "t5"
    keys = frozenset({"t5"})
    variable_length = frozenset({"t5"})

    def __init__(self, path: Path, tokenizer: Path | None = None, in_fp8: bool = False) -> None:
        """in_fp8: keep the linear layers in 8 bits."""
        self.path = path
        self.tokenizer = tokenizer
        self.in_fp8 = in_fp8
        self._loaded = Loaded[UmT5, Tokenize]()

    @property
    def identity(self) -> Mapping[str, str]:
        """Content of the checkpoint and of the tokenizer, and how weights are kept. Reads a few MB."""
        identity = {
            "t5": fingerprint(self.path),
            "t5_tokenizer": find_tokenizer(self.tokenizer, self.path).identity,
        }
        return identity | ({"t5_weights": "fp8"} if self.in_fp8 else {})

    def load(self, device: torch.device) -> None:
        """Read encoder and tokenizer. A loaded encoder moves to the device."""
        self._loaded.load(device, self._read)

    def _read(self, device: torch.device) -> tuple[UmT5, Tokenize]:
        # first: what is wrong with it shows before gigabytes are read
        tokenize = load_tokenizer(self.tokenizer, self.path)
        return load_t5(self.path, device, self.in_fp8), tokenize

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """For each prompt {"t5": [n C]} on the CPU: n is the number of its tokens, at most 512, the end token
        included.

        Raises CheckpointError where the tokenizer knows more tokens than the encoder.
        """
        t5, tokenize = self._loaded.get()
        device = t5.norm.weight.device
        ids = [tokenize(clean_text(prompt.text)) for prompt in prompts]
        largest, known = max((max(prompt) for prompt in ids), default=0), t5.token_embedding.num_embeddings
        if largest >= known:
            raise CheckpointError(
                f"{self.path} knows {known} tokens, its tokenizer has more (token {largest}). Give its own "
                "to --t5_tokenizer.",
                self.path,
            )
        results: list[Conditions] = []
        for group in _groups(ids):
            embeds = t5([torch.tensor(prompt, device=device) for prompt in group])
            results += [{"t5": [embed.to("cpu", copy=True)]} for embed in embeds]
        return results

    def free(self) -> None:
        """Give the memory back."""
        self._loaded.free()


def _groups(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """The prompts in order, in groups of at most TOKENS_AT_ONCE tokens."""
    group: list[list[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
