"""The encoders T5 v1.1 and umT5: turn each prompt into one vector per token.

Module names follow Wan's released umT5, whose tensor names need no translation. Source: Raffel et al. 2020,
arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202 (the gate); UniMax umT5, arXiv 2304.09151.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.dialects import (
    LoadPlan,
    Names,
    count,
    load_planned,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
    translate_name,
)
from checkpoints.encoders import SPIECE_MODEL
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from modules.attention.sdpa import attend_with_bias
from modules.devices import dtype_name, send_ahead
from modules.errors import CheckpointError
from protocols.family import DitSpec
from protocols.loading import BlockSharder
from protocols.steps import NO_OVERRIDES
from runtime.run_blocks import Hidden, run_blocks


@dataclass(frozen=True)
class T5Config:
    """Dimensions of a T5 v1.1 or umT5 encoder."""

    vocabulary: int
    dim: int
    attention_dim: int  # all heads together
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int  # buckets of relative positions
    # whether all blocks use the position table of the first block (T5) or each has its own (umT5)
    shares_positions: bool = False


@dataclass(frozen=True)
class T5Kind:
    """A kind of T5 encoder, such as umT5, and its name for messages."""

    name: str  # such as "umT5"
    description: str  # such as "an umT5 encoder"
    option: str  # such as "--t5"
    release: str  # names of suitable files
    has_own_tables: bool  # whether each block has its own position table (umT5) or only the first (T5)
    reads_bytes: bool = False  # whether its tokens are bytes and a few marks


# ByT5 has 384 tokens, that of Glyph-ByT5 some thousand colors and fonts in addition; T5 has 32128
MAX_BYTE_TOKENS = 16384

HF_T5: Names = (
    (r"shared\.weight", "token_embedding.weight"),
    (r"(?:encoder\.)?embed_tokens\.weight", "token_embedding.weight"),
    (r"(?:encoder\.)?final_layer_norm\.weight", "norm.weight"),
    (
        r"(?:encoder\.)?block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"blocks.\1.pos_embedding.embedding.weight",
    ),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight", r"blocks.\1.attn.\2.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight", r"blocks.\1.ffn.gate.0.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.ffn.fc1.weight"),
    (r"(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
)
_T5_PREFIXES = (
    "module.text_tower.", "text_encoders.", "umt5xxl.", "t5xxl.", "byt5.", "text_encoder.",
    "text_encoder_2.", "transformer.",
)  # fmt: skip
_NOT_T5 = (
    "model.diffusion_model.", "vae.", "first_stage_model.", "clip_vision.", "clip_l.", "clip_g.",
    SPIECE_MODEL, "logit_scale", "module.", "scaled_fp8",
)  # fmt: skip
_T5_UNUSED = (SPIECE_MODEL, "decoder.*", "lm_head.weight", "logit_scale")


def read_t5(checkpoint: Checkpoint, kind: T5Kind) -> LoadPlan[T5Config]:
    """Plan how to load a T5 or umT5 encoder from a file in 16 or 8 bits.

    1. Translate the tensor names to the official ones.
    2. Reject other models: T5 instead of umT5 or vice versa, and T5 version 1.0.
    3. Read the dimensions from the tensor shapes.

    Tensors may have Wan's official names (also used by Kijai) or Hugging Face's (ComfyUI, transformers), in
    a separate file or an all-in-one file.

    Raises:
        CheckpointError: If the file contains another model.
    """
    checkpoint = checkpoint.without_prefix(*_T5_PREFIXES, ignored_prefixes=_NOT_T5)
    # only for official names: in Hugging Face's names, "encoder." is not a prefix but part of the name
    if "encoder.token_embedding.weight" in checkpoint.tensors:
        checkpoint = checkpoint.without_prefix("encoder.", ignored_prefixes=_NOT_T5)
    # transformers may store the same embedding under two names; the second one is ignored
    duplicate = "encoder.embed_tokens.weight" if "shared.weight" in checkpoint.tensors else ""
    sources = rename_sources(
        list_tensor_sources(checkpoint),
        lambda name: name if name == duplicate else translate_name(name, HF_T5),
    )
    num_layers = count(sources, r"blocks\.\d+", checkpoint.path)
    if "token_embedding.weight" not in sources or "blocks.0.pos_embedding.embedding.weight" not in sources:
        raise make_wrong_kind_error(checkpoint, kind.description, kind.option, kind.release)
    is_umt5 = "blocks.1.pos_embedding.embedding.weight" in sources  # each block has a table of positions
    # in a single block, T5 and umT5 cannot be told apart
    if num_layers > 1 and is_umt5 != kind.has_own_tables:
        raise _make_other_t5_error(checkpoint.path, kind, is_umt5)
    if "blocks.0.ffn.gate.0.weight" not in sources:
        raise _make_first_version_error(checkpoint.path, kind)
    shape = make_shape_reader(checkpoint, sources)
    vocabulary, dim = shape("token_embedding.weight")
    if kind.reads_bytes and vocabulary > MAX_BYTE_TOKENS:
        raise CheckpointError(
            f"{checkpoint.path} has {vocabulary} tokens, parts of words, but those of {kind.name} are bytes: "
            f"it is another T5.\n  Pass {kind.release} to {kind.option}.",
            checkpoint.path,
        )
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight")
    attention_dim = shape("blocks.0.attn.q.weight")[0]
    ffn_dim = shape("blocks.0.ffn.fc1.weight")[0]
    if attention_dim % heads:
        raise _make_heads_error(checkpoint.path, attention_dim, heads)
    config = T5Config(
        vocabulary=vocabulary,
        dim=dim,
        attention_dim=attention_dim,
        ffn_dim=ffn_dim,
        num_heads=heads,
        num_layers=num_layers,
        num_buckets=buckets,
        shares_positions=not kind.has_own_tables,
    )
    return LoadPlan(config, checkpoint, sources, (*_T5_UNUSED, duplicate))


def _make_other_t5_error(path: Path, kind: T5Kind, is_umt5: bool) -> CheckpointError:
    """Return the error for an umT5 where a T5 is needed, or vice versa."""
    found_kind = "a T5 encoder, not an umT5: only its first block has"
    if is_umt5:
        found_kind = "an umT5 encoder, not a T5: each of its blocks has"
    return CheckpointError(
        f"{path} is {found_kind} a table of relative positions. Pass {kind.release} to {kind.option}.", path
    )


def _make_heads_error(path: Path, attention_dim: int, num_heads: int) -> CheckpointError:
    """Return the error for attention channels that cannot be divided among the heads."""
    return CheckpointError(
        f"{path}: {attention_dim} attention channels cannot be divided among {num_heads} heads.", path
    )


def _make_first_version_error(path: Path, kind: T5Kind) -> CheckpointError:
    """Return the error for T5 version 1.0."""
    return CheckpointError(
        f"{path} is a T5 of the first version, whose feed-forward layers have no gate. Pass "
        f"{kind.release} to {kind.option}.",
        path,
    )


# Letters: L tokens of all prompts concatenated, n tokens of one, N heads, D head width, C = model width


logger = logging.getLogger(__name__)

MAX_DISTANCE = 128  # all larger relative positions share one bucket


def relative_bucket(distance: Tensor, num_buckets: int) -> Tensor:
    """Return the bucket of each relative position (key minus query); all tensors are on the CPU.

    Each sign has half of the buckets. Small distances have one bucket each; above that, the bucket width
    grows logarithmically up to MAX_DISTANCE.
    """
    half = num_buckets // 2
    num_exact = half // 2  # distances with a bucket of their own
    size = distance.abs()
    # 16, 32 and 64 lie on the edge of a bucket, which a float32 logarithm misses on some processors
    logarithms = torch.log(size.double().clamp_min(1) / num_exact).float()
    fraction = logarithms / math.log(MAX_DISTANCE / num_exact)  # 0 at num_exact, 1 at MAX_DISTANCE
    far = (num_exact + (fraction * (half - num_exact)).long()).clamp_max(half - 1)
    return (distance > 0).long() * half + torch.where(size < num_exact, size, far)


class T5Norm(nn.Module):
    """RMS norm: x / root mean square * weight, with the division in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tokens, B L C in the dtype of `x`."""
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

    def forward(self, x: Tensor, bias: Tensor, tokens: "T5Tokens") -> Tensor:
        """Attend within each prompt, to its visible tokens.

        Args:
            x: Tokens of all prompts, L C.
            bias: Position bias, N n n, for the n tokens of the longest prompt.
            tokens: Lengths of the prompts.
        """
        # each N L D
        heads = [
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
            for linear in (self.q, self.k, self.v)
        ]
        outputs = []
        prompts = zip(*(tensor.split(list(tokens.lengths), dim=1) for tensor in heads), strict=True)
        # visible: the number of tokens, from the first on, that may be attended to
        for (q, k, v), visible in zip(prompts, tokens.visible, strict=True):
            mask = bias[None, :, : q.shape[1], :visible]
            # T5 does not divide by the square root of the head width
            attended = attend_with_bias(q[None], k[None, :, :visible], v[None, :, :visible], mask, scale=1.0)
            outputs.append(attended[0])
        return self.o(torch.cat(outputs, dim=1).transpose(0, 1).flatten(1))


@dataclass(eq=False)
class T5Tokens:
    """Lengths of the concatenated prompts, and the position bias shared by all blocks."""

    lengths: Sequence[int]  # number of tokens of each prompt; their sum is L
    visible: Sequence[int]  # number of leading tokens of each prompt that attention sees
    bias: Tensor | None = None  # N n n for the longest prompt, from the last block with a position table


class T5Block(nn.Module):
    """Attention and feed-forward with residuals; with `has_table` the block has its own position table."""

    def __init__(self, config: T5Config, has_table: bool) -> None:
        """Build the layers without weights, under the names of Wan's official checkpoints."""
        super().__init__()
        self.norm1 = T5Norm(config.dim)
        self.attn = T5Attention(config)
        self.norm2 = T5Norm(config.dim)
        gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.ffn = nn.ModuleDict(
            {
                "gate": nn.Sequential(gate, nn.GELU(approximate="tanh")),
                "fc1": nn.Linear(config.dim, config.ffn_dim, bias=False),
                "fc2": nn.Linear(config.ffn_dim, config.dim, bias=False),
            }
        )
        self.pos_embedding: nn.ModuleDict | None = None
        if has_table:  # T5's position bias: one value per head and distance bucket
            bias_embedding = nn.Embedding(config.num_buckets, config.num_heads)
            self.pos_embedding = nn.ModuleDict({"embedding": bias_embedding})

    def forward(self, x: Tensor, tokens: T5Tokens) -> Tensor:
        """Return the tokens after the block, L C like the input.

        A block with a position table computes the bias of attention, which the following blocks use too.
        """
        if self.pos_embedding is not None:
            bias_embedding = self.pos_embedding["embedding"]
            length = max(tokens.lengths)
            weight = bias_embedding.get_parameter("weight")
            # T5 learns a bias for each bucket of similar distances between query and key
            distances = torch.arange(1 - length, length)
            buckets = relative_bucket(distances, len(weight))
            bias_by_distance = bias_embedding(send_ahead(buckets, weight.device)).T  # N 2n-1
            # the n keys of query i are at the distances from -i on, which is window n-1-i: hence the flip
            tokens.bias = bias_by_distance.unfold(1, length, 1).flip(1)
        assert tokens.bias is not None
        x = _clamp_float16(x + self.attn(self.norm1(x), tokens.bias, tokens))
        h = self.norm2(x)
        return _clamp_float16(x + self.ffn["fc2"](self.ffn["fc1"](h) * self.ffn["gate"](h)))


def _clamp_float16(x: Tensor) -> Tensor:
    """Clamp a float16 residual stream, which may overflow in T5; other dtypes are returned unchanged."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max - 1000
    return x.clamp(-limit, limit)


class T5Network(nn.Module):
    """The encoder of T5 or umT5.

    Prompts of different lengths are concatenated without padding, and a prompt's result does not depend on
    the others.
    """

    spec = DitSpec(block_lists=("blocks",))

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(
            T5Block(config, has_table=index == 0 or not config.shares_positions)
            for index in range(config.num_layers)
        )
        self.norm = T5Norm(config.dim)

    def forward(self, ids: Sequence[Tensor], visible: Sequence[int] | None = None) -> list[Tensor]:
        """Return the hidden states of each prompt, n C.

        Args:
            ids: Token ids of each prompt, n, on any device.
            visible: Number of real tokens in each prompt; attention ignores the padding after them. None if
                there is no padding.
        """
        lengths = [len(prompt) for prompt in ids]
        tokens = T5Tokens(lengths, lengths if visible is None else visible)
        hidden = Hidden(self.token_embedding(torch.cat(list(ids)).to(self.norm.weight.device)), tokens)
        run_blocks(self, hidden, NO_OVERRIDES)
        return list(self.norm(hidden.x).split(lengths))

    def encode_padded(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the hidden states of padded prompts, B n C.

        Args:
            ids: Token ids, B n, on any device.
            mask: B n, 1 for tokens, then 0 for padding, which no token attends to. With None, padding counts
                as tokens.
        """
        visible = None if mask is None else [int(count) for count in mask.sum(dim=1)]
        return torch.stack(self(list(ids), visible))


def load_t5(
    path: Path,
    device: torch.device,
    kind: T5Kind,
    dtype: torch.dtype | None = None,
    form: str | None = None,
    blocks: BlockSharder | None = None,
) -> T5Network:
    """Load a T5 or umT5 encoder.

    Args:
        path: File or folder of the model.
        device: Device to load to.
        kind: Kind of encoder that the file must contain.
        dtype: Compute dtype; None for the file's dtype, or bfloat16 if the file is in fp8.
        form: Module of `checkpoints.stored` in whose form weights are stored; None for the file's form,
            except that fp8 weights are dequantized.
        blocks: Receives each block when it is loaded.

    Raises:
        CheckpointError: If the file is damaged, contains another model, or has its weights in another form.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_t5(checkpoint, kind)
        stored_dtype = plan.checkpoint.tensors[plan.sources["blocks.0.attn.q.weight"].names[0]].dtype
        # bfloat16, the training dtype, replaces fp8, which has no arithmetic, and float16 on CPUs
        keeps_dtype = stored_dtype == torch.float32 or (
            stored_dtype == torch.float16 and device.type != "cpu"
        )
        compute_dtype = dtype or (stored_dtype if keeps_dtype else torch.bfloat16)
        label = f"the {kind.name} text encoder ({kind.option})"
        t5 = load_planned(
            plan, T5Network, device=device, dtype=compute_dtype, label=label, form=form, blocks=blocks
        )
    logger.info(
        "T5: %s, stored as %s, computing in %s", path, dtype_name(stored_dtype), dtype_name(compute_dtype)
    )
    return t5
