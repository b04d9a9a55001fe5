"""FlowFormer: optical flow from cost maps, each encoded into a few tokens that a decoder attends to.

Source: Huang et al. 2022, arXiv 2203.16194 (Apache license). Attributes are named as in its released files.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from checkpoints.dialects import LoadPlan, count, make_shape_reader, make_wrong_kind_error
from checkpoints.opening import Checkpoint, list_tensor_sources
from postprocessing.interpolation import flowformer_memory
from postprocessing.interpolation.layers import SIDE, Correlation, EncodedImage, chunk_rows, pixel_coordinates
from postprocessing.interpolation.raft import (
    FlowHead,
    MotionEncoder,
    SeparableGru,
    upsample_flow,
    upsampling_mask,
)
from postprocessing.interpolation.twins import HEAD_WIDTH, StageConfig, Twins

# FlowFormer's decoder: refine a flow estimate repeatedly, attending to the cost memory of each position.
#
# Sources: Huang et al. 2022, arXiv 2203.16194, section 3.3; Jiang et al. 2021, arXiv 2104.02409 (motion of
# similar positions, for positions that are occluded in the second image).
COSTS = SIDE**2  # number of costs that each position reads per iteration


@dataclass(frozen=True)
class FlowDecoderConfig:
    """Channel counts of FlowFormer's decoder."""

    memory: int  # D
    query: int
    hidden: int  # channels of the recurrent state, and of its context; half of C
    similarity_width: int  # width of queries and keys of the attention between similar positions
    correlation: tuple[int, int]  # widths of the motion encoder
    flow: tuple[int, int]
    motion: int  # motion channels, including the two channels of the flow
    head: int
    mask: int


class SelfAffinity(nn.Module):
    """Attention between positions of the first image, weighted by their similarity."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        self.to_qk = nn.Conv2d(config.hidden, 2 * config.similarity_width, 1, bias=False)

    def forward(self, context: Tensor, stores_table: bool) -> Callable[[Tensor], Tensor]:
        """Return a function that averages a feature map over similar positions.

        Args:
            context: Features of the first image, 1 C H W.
            stores_table: Whether to store the weights of all pairs of positions, instead of recomputing
                them in every call.
        """
        q, k = (x.contiguous() for x in _flatten_rows(self.to_qk(context)).chunk(2, dim=1))  # N . each
        if stores_table:
            weights = q.new_empty(len(q), len(k))
            # 8 bytes for each pair: product and softmax in float32
            rows = chunk_rows(8 * len(k), q.device)
            scaled = q * q.shape[1] ** -0.5
            for weight_rows, queries in zip(weights.split(rows), scaled.split(rows), strict=True):
                weight_rows.copy_((queries @ k.T).softmax(dim=1))
            return partial(_apply_to_positions, weights.matmul)

        def attend(v: Tensor) -> Tensor:
            # four axes: with fewer, no kernel avoids computing the table
            return scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]

        return partial(_apply_to_positions, attend)


class Aggregator(nn.Module):
    """Aggregate motion features over similar positions (GMA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_v = nn.Conv2d(width, width, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, motion: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        """Return motion features plus their projected mean over similar positions, 1 C H W.

        Args:
            motion: Motion features, 1 C H W.
            mean: Averages a feature map over similar positions; made by `SelfAffinity`.
        """
        return motion + self.gamma * mean(self.to_v(motion))


class FlowFormerUpdate(nn.Module):
    """Layers of one refinement step of the optical flow."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        inputs = config.query + COSTS
        self.encoder = MotionEncoder(inputs, config.correlation, config.flow, config.motion)
        self.aggregator = Aggregator(config.motion)
        self.gru = SeparableGru(config.hidden, config.hidden + 2 * config.motion)
        self.flow_head = FlowHead(config.hidden, config.head)
        self.mask = upsampling_mask(config.hidden, config.mask)


class MemoryDecoder(nn.Module):
    """Decode the optical flow of the first image from the cost memory."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(2 * config.hidden, 2 * config.hidden, 1)
        self.flow_token_encoder = nn.Sequential(
            nn.Conv2d(COSTS, config.query, 1), nn.GELU(), nn.Conv2d(config.query, config.query, 1)
        )
        # one deeper, as in the files
        attention = flowformer_memory.TokenAttention(config.query, config.memory, concatenates_input=True)
        self.decoder_layer = nn.ModuleDict({"cross_attend": attention})
        self.update_block = FlowFormerUpdate(config)
        self.att = SelfAffinity(config)

    def forward(
        self, costs: Correlation, memory: Tensor, context: Tensor, iterations: int, stores_table: bool
    ) -> Tensor:
        """Refine the optical flow iteratively, and return it at full size, 1 2 8H 8W.

        Args:
            costs: Costs of the pair of images.
            memory: Cost memory, N K D.
            context: Context features of the first image, 1 C H W.
            iterations: Number of refinements.
            stores_table: Whether the attention table of all pairs of positions is kept in memory.
        """
        hidden, context = self.proj(context).chunk(2, dim=1)
        hidden = torch.tanh(hidden)
        context = relu(context)
        layer: Any = self.decoder_layer["cross_attend"]
        block = self.update_block
        # computed once, because these are the same in all iterations
        aggregate = self.att(context, stores_table)
        keys_and_values = layer.project_tokens(memory)
        gru_directions = block.gru.apply_context(context)
        start = positions = pixel_coordinates(context)
        for _ in range(iterations):
            nearby_costs = costs.lookup(positions)
            memory_features = self._read_memory_features(nearby_costs, positions, keys_and_values)
            motion = block.encoder(torch.cat([memory_features, nearby_costs], dim=1), positions - start)
            motion_and_mean = torch.cat([motion, block.aggregator(motion, aggregate)], dim=1)
            hidden = block.gru(hidden, motion_and_mean, gru_directions)
            positions = positions + block.flow_head(hidden)
        # the released weights expect a mask scaled by 0.25
        return upsample_flow(positions - start, 0.25 * block.mask(hidden))

    def _read_memory_features(self, near: Tensor, positions: Tensor, keys_and_values: Any) -> Tensor:
        """Read cost memory features, 1 C H W; the query is made from `near`, the costs at `positions`."""
        query = self.flow_token_encoder(near)
        code = flowformer_memory.position_code(_flatten_rows(positions), query.shape[1])
        attend = self.decoder_layer["cross_attend"]
        recalled = attend(_flatten_rows(query)[:, None], keys_and_values, code[:, None])
        return recalled.squeeze(1).T.view(query.shape)


def _flatten_rows(x: Tensor) -> Tensor:
    """Reshape a feature map, 1 C H W, to rows N C."""
    return x[0].flatten(1).T


def _apply_to_positions(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of rows, N C, to a feature map, 1 C H W."""
    return run(_flatten_rows(x).contiguous()).T.reshape(x.shape)


# Letters: H W sides of an image, C width of the features at an eighth of them

ITERATIONS = 32  # refinements of the flow, as in training
TABLE_BYTES = 1 << 30  # largest stored table of all pairs of positions: images of 1024 x 1024
STAGES = 2  # at a quarter and at an eighth of the sides
UNUSED = ("*.svt.norm.*", "memory_decoder.att.pos_emb.*")


@dataclass(frozen=True)
class FlowFormerConfig:
    """Sizes of FlowFormer's encoders, cost memory and decoder."""

    features: tuple[StageConfig, ...]
    context: tuple[StageConfig, ...]
    matching: int  # width of the features that are compared
    memory: flowformer_memory.MemoryConfig
    decoder: FlowDecoderConfig


class MemoryEncoder(nn.Module):
    """Encode images into features, and the matching costs of two images into memory tokens."""

    def __init__(self, config: FlowFormerConfig) -> None:
        super().__init__()
        self.feat_encoder = nn.ModuleDict({"svt": Twins(config.features)})  # one deeper, as in the files
        self.channel_convertor = nn.Conv2d(config.features[-1].width, config.matching, 1, bias=False)
        self.cost_perceiver_encoder = flowformer_memory.CostPerceiver(config.memory)


class FlowFormer(nn.Module):
    """FlowFormer, which estimates the optical flow between two images in float32, even under autocast.

    In addition to weights and features it needs memory for two tables of all pairs of positions, up to
    TABLE_BYTES each, and for one or two parts (`chunk_rows`). For larger images there are no tables: costs
    and attention are recomputed in every iteration.
    """

    def __init__(
        self, config: FlowFormerConfig, iterations: int = ITERATIONS, table_bytes: int = TABLE_BYTES
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.table_bytes = table_bytes
        self.memory_encoder = MemoryEncoder(config)
        self.context_encoder = nn.ModuleDict({"svt": Twins(config.context)})
        self.memory_decoder = MemoryDecoder(config.decoder)

    def encode(self, image: Tensor) -> EncodedImage:
        """Return the features of one image.

        Args:
            image: Image, 1 3 H W, 0..255, with sides that are multiples of 32.
        """
        with torch.autocast(image.device.type, enabled=False):
            image = 2 * (image.float() / 255) - 1
            quarter, eighth = self.context_encoder["svt"](image)
            encoder = self.memory_encoder
            matching = encoder.channel_convertor(encoder.feat_encoder["svt"](image)[-1])
            return EncodedImage(quarter, eighth, matching, None)

    def flow(self, first: EncodedImage, second: EncodedImage) -> Tensor:
        """Return the optical flow from the first to the second image, 1 2 H W (x, y) in pixels."""
        with torch.autocast(first.matching.device.type, enabled=False):
            # depends on the size only, so that an image gives the same flow on every device
            stores_table = 4 * first.matching[0, 0].numel() ** 2 <= self.table_bytes
            costs = Correlation(first.matching, second.matching, stores_table, levels=1, scale=1.0)
            memory = self.memory_encoder.cost_perceiver_encoder(costs, first.eighth)
            return self.memory_decoder(costs, memory, first.eighth, self.iterations, stores_table)


def read_flowformer(checkpoint: Checkpoint) -> LoadPlan[FlowFormerConfig]:
    """Plan the loading of a FlowFormer; the layer sizes are read from tensor shapes.

    Raises:
        CheckpointError: If the file is not a FlowFormer file.
    """
    checkpoint = checkpoint.without_prefix("module.")
    sources = list_tensor_sources(checkpoint)
    wrong_kind_error = make_wrong_kind_error(
        checkpoint, "a FlowFormer", "--model", "a folder with flowformer_sintel"
    )
    if not {"memory_encoder.channel_convertor.weight", "memory_decoder.proj.weight"} <= sources.keys():
        raise wrong_kind_error
    shape = make_shape_reader(checkpoint, sources, wrong_kind_error)
    config = FlowFormerConfig(
        features=_read_trunk("memory_encoder.feat_encoder.svt", shape),
        context=_read_trunk("context_encoder.svt", shape),
        matching=shape("memory_encoder.channel_convertor.weight")[0],
        memory=_read_memory(shape, sources),
        decoder=_read_decoder(shape),
    )
    if not _is_possible(config):
        raise wrong_kind_error
    return LoadPlan(config, checkpoint, sources, UNUSED)


def _is_possible(config: FlowFormerConfig) -> bool:
    """Return whether the sizes read from a file describe a FlowFormer that this code can build."""
    features, context = config.features, config.context
    memory, decoder = config.memory, config.decoder
    heads = flowformer_memory.HEADS
    return (
        all(stage.width % HEAD_WIDTH == 0 for stage in (*features, *context))
        and all((trunk[0].patch, trunk[1].patch) == (4, 2) for trunk in (features, context))
        and memory.width % heads == decoder.query % heads == 0
        and (memory.width + memory.projected_context_width) % 4 == memory.patch_widths[2] % 4 == 0
        and context[-1].width == memory.context == 2 * decoder.hidden
        and decoder.memory == memory.width
    )


Shape = Callable[..., tuple[int, ...]]


def _read_memory(shape: Shape, names: Iterable[str]) -> flowformer_memory.MemoryConfig:
    """Return the sizes of the cost memory, from the shapes of its weights."""
    start = "memory_encoder.cost_perceiver_encoder"
    _, tokens, width = shape(f"{start}.latent_tokens", axes=3)
    projected_context_width, context = shape(
        f"{start}.vertical_encoder_layers.0.local_block.attn.context_proj.weight", axes=2
    )
    first, second, third = (shape(f"{start}.patch_embed.proj.{index}.weight")[0] for index in (0, 2, 4))
    return flowformer_memory.MemoryConfig(
        tokens=tokens,
        width=width,
        context=context,
        projected_context_width=projected_context_width,
        patch_widths=(first, second, third),
        layers=count(names, r"memory_encoder\.cost_perceiver_encoder\.encoder_layers\.\d+"),
    )


def _read_decoder(shape: Shape) -> FlowDecoderConfig:
    """Return the sizes of FlowFormer's decoder, from the shapes of its weights."""

    def out_channels(name: str) -> int:
        return shape(f"memory_decoder.{name}.weight")[0]

    query, memory = shape("memory_decoder.decoder_layer.cross_attend.k.weight", axes=2)
    return FlowDecoderConfig(
        memory=memory,
        query=query,
        hidden=out_channels("proj") // 2,
        similarity_width=out_channels("att.to_qk") // 2,
        correlation=(
            out_channels("update_block.encoder.convc1"),
            out_channels("update_block.encoder.convc2"),
        ),
        flow=(out_channels("update_block.encoder.convf1"), out_channels("update_block.encoder.convf2")),
        motion=out_channels("update_block.encoder.conv") + 2,  # the flow itself is appended
        head=out_channels("update_block.flow_head.conv1"),
        mask=out_channels("update_block.mask.0"),
    )


def _read_trunk(name: str, shape: Shape) -> tuple[StageConfig, ...]:
    stages = []
    for stage in range(STAGES):
        width, _, patch, _ = shape(f"{name}.patch_embeds.{stage}.proj.weight")
        stages.append(StageConfig(patch, width, shape(f"{name}.blocks.{stage}.1.attn.sr.weight")[2]))
    return tuple(stages)
