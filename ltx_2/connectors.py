"""LTX-2's connectors: from the states of all layers of Gemma to the texts of the video and the audio stream.

    states of a token -> normed, projected -> rows of a stream -> filled up with learned registers -> blocks

Module names follow the released file. Source: the released model code, and its config for what tensors do not
show.
"""
# Letters: L tokens of a prompt, n states of a token, C their width, T rows after filling, S width of a
# stream, N heads, D head width

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.dialects import (
    LoadPlan,
    Names,
    count,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
    translate_name,
)
from checkpoints.opening import (
    Checkpoint,
    checkpoint_paths,
    list_tensor_sources,
    open_checkpoint,
)
from ltx_2.blocks import LtxAttention, gelu, norm_tokens
from ltx_2.configs import EPS
from ltx_2.model_options import STREAMS, VIDEO
from ltx_2.released import read_settings
from ltx_2.rope import make_text_table
from modules.attention.attend import attend
from modules.errors import CheckpointError
from modules.layers.norms import NamedFeedForward
from modules.layers.rope import THETA

OPTION = "--ltx2_checkpoint"
FILES = (
    "ltx-2.3-22b-dev.safetensors, ltx-2-19b-dev.safetensors, ltx-2.5-22b-dev-transformer-bf16.safetensors, "
    "or the folder of a release in diffusers' layout"
)
HEAD_WIDTH = 128  # head width of LTX-2 2.0, because its tensors do not show it
MAX_POSITION = 4096  # number of tokens that positions are divided by
DIFFUSERS_CLASS = "LTX2TextConnectors"
RANGE = 8  # 2.0: the states of a layer are scaled to a range of this size
SHARED = "aggregate_embed"  # 2.0: the projection for both streams
PROJECTIONS = ("text_embedding_projection.", "video_text_proj_in.", "audio_text_proj_in.", "text_proj_in.")
# prefixes of our tensors' names in files
PARTS = (
    *(
        f"{start}{stream}_embeddings_connector."
        for start in ("model.diffusion_model.", "")
        for stream in STREAMS
    ),
    *PROJECTIONS,
    *(f"{stream}_connector." for stream in STREAMS),
)
_BLOCK = r"(video|audio)_connector\.transformer_blocks\.(\d+)\."
_OURS = r"\1_embeddings_connector.transformer_1d_blocks.\2."
NAMES: Names = (  # official; then diffusers' layout
    (r"model\.diffusion_model\.(.+)", r"\1"),
    (rf"{_BLOCK}attn1\.norm_([qk])\.(.+)", rf"{_OURS}attn1.\3_norm.\4"),
    (rf"{_BLOCK}(.+)", rf"{_OURS}\3"),
    (r"(video|audio)_connector\.(.+)", r"\1_embeddings_connector.\2"),
    (r"text_proj_in\.(.+)", rf"text_embedding_projection.{SHARED}.\1"),
    (r"(video|audio)_text_proj_in\.(.+)", rf"text_embedding_projection.\1_{SHARED}.\2"),
)


@dataclass(frozen=True)
class ConnectorConfig:
    """Dimensions of one stream's connector."""

    dim: int  # S
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_registers: int
    has_head_gates: bool  # 2.3: a gate for each head
    ff_bias: bool = True  # whether feed-forward layers have a bias


@dataclass(frozen=True)
class ConnectorsConfig:
    """Dimensions of the projections and connectors of the loaded streams."""

    text_dim: int  # n * C
    has_shared_projection: bool  # 2.0: for both streams, after scaling states to a range
    has_bias: bool  # whether the projections have a bias
    streams: Mapping[str, ConnectorConfig]
    max_position: int  # number of tokens that positions are divided by

    def projection(self, stream: str) -> str:
        """Return the name of a stream's projection."""
        return SHARED if self.has_shared_projection else f"{stream}_{SHARED}"


def open_connectors(path: Path, gemma: Path) -> Checkpoint:
    """Open a file of connectors; for LTX-2.5, add the projections from Gemma's file."""
    paths = checkpoint_paths(path)
    with open_checkpoint(path) as checkpoint:
        names = [name for name in checkpoint.tensors if name.startswith(PARTS)]
    has_projections = any(name.startswith(PROJECTIONS) for name in names)
    if names and not has_projections:
        paths = [*paths, *checkpoint_paths(gemma)]
    return open_checkpoint(path, paths)


def read_connectors(checkpoint: Checkpoint, streams: Collection[str] = STREAMS) -> LoadPlan[ConnectorsConfig]:
    """Plan how to load the text connectors of the given streams, from an official file or diffusers' folder.

    Raises CheckpointError if the file has none, or is damaged.
    """
    parts = checkpoint.select_by_prefix(*PARTS)
    sources = rename_sources(list_tensor_sources(parts), lambda name: translate_name(name, NAMES))
    # files of all releases have the video stream
    if f"{VIDEO}_embeddings_connector.learnable_registers" not in sources:
        raise make_wrong_kind_error(checkpoint, "a file with LTX-2's text connectors", OPTION, FILES)
    damaged = CheckpointError(
        f"{checkpoint.path}: its tensors do not have the sizes of LTX-2's text connectors. Copy it again.",
        checkpoint.path,
    )
    shape = make_shape_reader(parts, sources, damaged)  # returns the shape of a tensor, or raises `damaged`
    settings = read_settings(checkpoint, "transformer", DIFFUSERS_CLASS)
    _require_projections(checkpoint.path, sources)
    connectors = {}
    for stream in streams:
        connectors[stream] = _read_connector(stream, shape, sources, settings=settings, damaged=damaged)
    # the streams share a projection, or each has its own; the first one shows the sizes
    has_shared_projection = f"text_embedding_projection.{SHARED}.weight" in sources
    first_stream = next(iter(streams))
    projection_name = SHARED if has_shared_projection else f"{first_stream}_{SHARED}"
    projection = f"text_embedding_projection.{projection_name}"
    config = ConnectorsConfig(
        text_dim=shape(f"{projection}.weight", 2)[1],
        has_shared_projection=has_shared_projection,
        has_bias=f"{projection}.bias" in sources,
        streams=connectors,
        max_position=_read_max_position(checkpoint, settings),
    )
    unused = [f"*{stream}_*" for stream in STREAMS if stream not in streams]
    return LoadPlan(config, parts, sources, tuple(unused))


def _require_projections(path: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if connectors of LTX-2.5 are given without their projections."""
    if not any(name.startswith("text_embedding_projection.") for name in names):
        raise CheckpointError(
            f"{path} has connectors without projections in front of them: LTX-2.5 has those in "
            "the file of its text encoder. Pass gemma4-12b-with-proj-ltx-2.5-bf16.safetensors to "
            "--ltx2_text_encoder_checkpoint.",
            path,
        )


def _read_connector(
    stream: str,
    shape: Callable[..., tuple[int, ...]],
    names: Collection[str],
    settings: Mapping[str, Any],
    damaged: CheckpointError,
) -> ConnectorConfig:
    """Return a connector's dimensions; `shape` returns a tensor's shape from its name and number of axes."""
    connector = f"{stream}_embeddings_connector"
    block = f"{connector}.transformer_1d_blocks.0."
    gates = f"{block}attn1.to_gate_logits.weight"
    num_registers, dim = shape(f"{connector}.learnable_registers", 2)
    has_head_gates = gates in names
    if has_head_gates:  # a gate for each head
        heads: Any = shape(gates, 2)[0]
    else:
        shared_heads = settings.get("connector_num_attention_heads", dim // HEAD_WIDTH)
        heads = settings.get(f"{stream}_connector_num_attention_heads", shared_heads)
    if not isinstance(heads, int) or heads < 1 or dim % (2 * heads):
        raise damaged
    return ConnectorConfig(
        dim=dim,
        ffn_dim=shape(f"{block}ff.net.0.proj.weight", 2)[0],
        num_heads=heads,
        num_layers=count(names, rf"{connector}\.transformer_1d_blocks\.\d+"),
        num_registers=num_registers,
        has_head_gates=has_head_gates,
        ff_bias=f"{block}ff.net.0.proj.bias" in names,
    )


def _read_max_position(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> int:
    """Return the number of tokens by which the connectors divide text positions."""
    try:
        default = settings.get("connector_rope_base_seq_len", MAX_POSITION)
        (max_position,) = settings.get("connector_positional_embedding_max_pos", [default])
        kind = settings.get("rope_type", "split")
        theta = settings.get("rope_theta", THETA)
        if kind != "split" or theta != THETA or not 0 < max_position < math.inf:
            raise ValueError(f"rope_type {kind}, rope_theta {theta}, positions up to {max_position}")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: its configuration is not one of LTX-2's text connectors ({error!r}). Pass "
            f"{FILES} to {OPTION}.",
            checkpoint.path,
        ) from error
    return max_position


class TextConnectors(nn.Module):
    """Projections and connectors of the loaded streams."""

    def __init__(self, config: ConnectorsConfig) -> None:
        super().__init__()
        self.config = config
        projections = {}
        for stream, connector in config.streams.items():
            layer = nn.Linear(config.text_dim, connector.dim, bias=config.has_bias)
            projections[config.projection(stream)] = layer
        self.text_embedding_projection = nn.ModuleDict(projections)
        for stream, connector in config.streams.items():
            self.add_module(f"{stream}_embeddings_connector", Connector(connector, config.max_position))

    def forward(self, hidden_states: Tensor, num_tokens: int) -> dict[str, Tensor]:
        """Return the text embeddings for each stream, T S, from a prompt's hidden states, L n C (n layers).

        `num_tokens` is T, to which the prompt's L tokens are padded.
        """
        normed = torch.empty_like(hidden_states.mT)  # L C n: the order of the projections' inputs
        for index, layer_states in enumerate(hidden_states.unbind(1)):  # singly: float32 copies are large
            x = layer_states.float()
            if self.config.has_shared_projection:  # normalized to mean 0 and a range of 8
                normed[..., index] = (x - x.mean()) / (x.amax() - x.amin() + EPS) * RANGE
            else:
                normed[..., index] = norm_tokens(x)
        normed = normed.flatten(1)
        text_embeddings = {}
        for stream, connector in self.config.streams.items():
            factor = 1.0
            if not self.config.has_shared_projection:
                factor = math.sqrt(connector.dim / hidden_states.shape[-1])
            projected = self.text_embedding_projection[self.config.projection(stream)](normed * factor)
            connect = self.get_submodule(f"{stream}_embeddings_connector")
            text_embeddings[stream] = connect(projected, num_tokens)
        return text_embeddings


class Connector(nn.Module):
    """Transformer over a text's states, padded with learned registers."""

    def __init__(self, config: ConnectorConfig, max_position: int) -> None:
        super().__init__()
        self.config, self.max_position = config, max_position
        self.learnable_registers = nn.Parameter(torch.empty(config.num_registers, config.dim))
        self.transformer_1d_blocks = nn.ModuleList(ConnectorBlock(config) for _ in range(config.num_layers))

    def forward(self, text: Tensor, num_tokens: int) -> Tensor:
        """Transform a text, L S, to T S; `num_tokens` is T, a multiple of the number of registers."""
        padding = self.learnable_registers.repeat(num_tokens // len(self.learnable_registers), 1)
        x = torch.cat([text, padding[len(text) :].to(text.dtype)])[None]  # 1 T S
        rotary = make_text_table(
            num_tokens,
            max_position=self.max_position,
            dim=self.config.dim,
            num_heads=self.config.num_heads,
            device=x.device,
        )
        for block in self.transformer_1d_blocks:
            x = block(x, rotary)
        return norm_tokens(x)[0]


class ConnectorBlock(nn.Module):
    """Self-attention among all tokens, then a feed-forward; both start with a norm without weights."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.attn1 = LtxAttention(
            config.num_heads,
            has_gates=config.has_head_gates,
            rotates_halves=True,
            query_dim=dim,
            key_dim=dim,
            dim=dim,
        )
        self.ff = NamedFeedForward(dim, config.ffn_dim, gelu, config.ff_bias)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Apply the block to text tokens x, 1 T S."""
        # x: 1 T S
        layer = self.attn1
        h = norm_tokens(x)
        attended = attend(layer.queries(h, rotary), layer.keys(h, rotary), layer.values(h))
        x = x + layer.project(h, attended)
        return x + self.ff(norm_tokens(x))
