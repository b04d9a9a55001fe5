"""RAFT, optical flow by repeated refinement of one estimate.

Source: Teed and Deng 2020, arXiv 2003.12039 (BSD-3 license). Attributes are named as in raft-things.pth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu, unfold

from checkpoints.dialects import LoadPlan, make_shape_reader, make_wrong_kind_error
from checkpoints.opening import Checkpoint, list_tensor_sources
from postprocessing.contract import batch_norm
from postprocessing.interpolation.layers import CHANNELS, Correlation, EncodedImage, conv, pixel_coordinates

# Letters: H W height and width of an image, h w height and width of its features (an eighth)

ITERATIONS = 20
SCALE = 8
IGNORED_TENSORS = (
    "*.num_batches_tracked",
    "*.norm3.*",  # the same values as downsample.1, stored twice
)


@dataclass(frozen=True)
class RaftConfig:
    """Channel counts of RAFT."""

    stages: tuple[int, int, int]
    features: int  # channels that are compared
    hidden: int
    context: int
    correlation: tuple[int, int]
    flow: tuple[int, int]
    motion: int  # with the two channels of the flow
    head: int
    mask: int


Norm = Callable[[int], nn.Module]


class RaftResidual(nn.Module):
    """Residual block with two convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, stride=stride)
        self.norm1 = norm(width)
        self.conv2 = conv(width, width)
        self.norm2 = norm(width)
        self.downsample = nn.Sequential(conv(inputs, width, 1, stride), norm(width)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the block, B C H W."""
        inner = relu(self.norm1(self.conv1(x)))
        inner = relu(self.norm2(self.conv2(inner)))
        return relu((x if self.downsample is None else self.downsample(x)) + inner)


class RaftEncoder(nn.Module):
    """Encode an image into features at an eighth of its size."""

    def __init__(self, stages: tuple[int, int, int], outputs: int, norm: Norm) -> None:
        super().__init__()
        first, second, third = stages
        self.conv1 = conv(3, first, 7, stride=2)
        self.norm1 = norm(first)
        self.layer1 = nn.Sequential(RaftResidual(first, first, 1, norm), RaftResidual(first, first, 1, norm))
        self.layer2 = nn.Sequential(
            RaftResidual(first, second, 2, norm), RaftResidual(second, second, 1, norm)
        )
        self.layer3 = nn.Sequential(RaftResidual(second, third, 2, norm), RaftResidual(third, third, 1, norm))
        self.conv2 = conv(third, outputs, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of stage 2 (1/4 of the size) and stage 3 (1/8), and the features.

        Args:
            x: Image, 1 3 H W.
        """
        x = self.layer1(relu(self.norm1(self.conv1(x))))
        quarter = self.layer2(x)
        eighth = self.layer3(quarter)
        return quarter, eighth, self.conv2(eighth)


class MotionEncoder(nn.Module):
    """Encode correlation and optical flow into motion features."""

    def __init__(self, inputs: int, correlation: tuple[int, int], flow: tuple[int, int], motion: int) -> None:
        """Create the motion encoder of RAFT, with the module names of its released file.

        Args:
            inputs: Channels of the correlation.
            correlation: Widths of the layers for the correlation.
            flow: Widths of the layers for the flow.
            motion: Output channels, including the flow.
        """
        super().__init__()
        self.convc1 = conv(inputs, correlation[0], 1)
        self.convc2 = conv(*correlation)
        self.convf1 = conv(2, flow[0], 7)
        self.convf2 = conv(*flow)
        # - 2: the flow itself is appended to the output
        self.conv = conv(correlation[1] + flow[1], motion - 2)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        """Return motion features, whose last two channels are the flow itself."""
        compared = relu(self.convc2(relu(self.convc1(correlation))))
        moved = relu(self.convf2(relu(self.convf1(flow))))
        return torch.cat([relu(self.conv(torch.cat([compared, moved], dim=1))), flow], dim=1)


class GruDirection(NamedTuple):
    """GRU weights for one direction, rows or columns; the context's part of each gate is computed in advance.

    The gates are update, reset and candidate; the candidate sees the hidden state after the reset.
    """

    constant: Tensor  # 1 3C h w: what the context and the biases add to the three gates
    motion_weight: Tensor  # weights of the motion for the three gates
    hidden_weight: Tensor  # weights of the hidden state for update and reset
    candidate_weight: Tensor  # weights of the reset hidden state for the candidate


class SeparableGru(nn.Module):
    """Convolutional GRU that runs along rows first, then along columns."""

    def __init__(self, hidden: int, inputs: int) -> None:
        """Create the layers.

        Args:
            hidden: Channels of the hidden state.
            inputs: Channels of context and motion.
        """
        super().__init__()
        for number, size, padding in ((1, (1, 5), (0, 2)), (2, (5, 1), (2, 0))):
            for gate in "zrq":
                layer = nn.Conv2d(hidden + inputs, hidden, size, padding=padding)
                setattr(self, f"conv{gate}{number}", layer)

    def apply_context(self, context: Tensor) -> tuple[GruDirection, GruDirection]:
        """Return the GRU weights for rows and columns; the context, 1 . h w, is already applied.

        Convolutions are linear, so the context's part is computed once for all iterations, and the motion's
        part for all three gates together.
        """
        rows, columns = ([getattr(self, f"conv{gate}{number}") for gate in "zrq"] for number in (1, 2))
        return _apply_context(rows, context), _apply_context(columns, context)

    def forward(
        self, hidden: Tensor, motion: Tensor, directions: tuple[GruDirection, GruDirection]
    ) -> Tensor:
        """Return the hidden state after the GRU has run along rows and along columns, 1 C h w."""
        width = hidden.shape[1]
        for direction in directions:
            inputs = direction.constant + _convolve_same_size(motion, direction.motion_weight)
            gates = _convolve_same_size(hidden, direction.hidden_weight) + inputs[:, : 2 * width]
            update, reset = torch.sigmoid(gates).chunk(2, dim=1)
            from_hidden = _convolve_same_size(reset * hidden, direction.candidate_weight)
            candidate = torch.tanh(from_hidden + inputs[:, 2 * width :])
            hidden = (1 - update) * hidden + update * candidate
        return hidden


def _apply_context(gates: Sequence[Any], context: Tensor) -> GruDirection:
    """Join the weights of update, reset and candidate gates, and apply the context's part to `context`."""
    weight = torch.cat([gate.weight for gate in gates])
    bias = torch.cat([gate.bias for gate in gates])
    # input channels of a gate: hidden state, context, and motion, which changes with each iteration
    hidden_width = gates[0].out_channels
    context_width = context.shape[1]
    motion_width = weight.shape[1] - hidden_width - context_width
    hidden_weight, context_weight, motion_weight = weight.split(
        [hidden_width, context_width, motion_width], dim=1
    )
    return GruDirection(
        constant=_convolve_same_size(context, context_weight, bias),
        motion_weight=motion_weight.contiguous(),
        hidden_weight=hidden_weight[: 2 * hidden_width].contiguous(),
        candidate_weight=hidden_weight[2 * hidden_width :].contiguous(),
    )


def _convolve_same_size(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


class FlowHead(nn.Module):
    """Predict the correction of the optical flow from the hidden state."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.conv1 = conv(hidden, width)
        self.conv2 = conv(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the correction of the optical flow, B 2 H W."""
        return self.conv2(relu(self.conv1(x)))


class UpdateBlock(nn.Module):
    """Layers of one refinement step of RAFT."""

    def __init__(self, config: RaftConfig) -> None:
        super().__init__()
        self.encoder = MotionEncoder(CHANNELS, config.correlation, config.flow, config.motion)
        self.gru = SeparableGru(config.hidden, config.context + config.motion)
        self.flow_head = FlowHead(config.hidden, config.head)
        self.mask = upsampling_mask(config.hidden, config.mask)

    def forward(
        self, hidden: Tensor, directions: tuple[GruDirection, GruDirection], correlation: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the new hidden state and the flow correction; `directions` come from `apply_context`."""
        motion = self.encoder(correlation, flow)
        hidden = self.gru(hidden, motion, directions)
        return hidden, self.flow_head(hidden)


class Raft(nn.Module):
    """RAFT, which estimates the optical flow from one image to another."""

    def __init__(self, config: RaftConfig, iterations: int = ITERATIONS) -> None:
        super().__init__()
        self.config = config
        self.iterations = iterations
        self.fnet = RaftEncoder(config.stages, config.features, nn.InstanceNorm2d)
        self.cnet = RaftEncoder(config.stages, config.hidden + config.context, batch_norm)
        self.update_block = UpdateBlock(config)

    def encode(self, image: Tensor) -> EncodedImage:
        """Return the features of one image.

        Args:
            image: Image, 1 3 H W, 0..255.
        """
        image = 2 * (image / 255) - 1
        quarter, eighth, context = self.cnet(image)
        return EncodedImage(quarter, eighth, self.fnet(image)[2], context)

    def flow(self, first: EncodedImage, second: EncodedImage) -> Tensor:
        """Return the optical flow from the first to the second image, 1 2 H W (x, y) in pixels."""
        correlation = Correlation(first.matching, second.matching)
        hidden, context = first.extra.split([self.config.hidden, self.config.context], dim=1)
        hidden, context = torch.tanh(hidden), relu(context)
        gru_directions = self.update_block.gru.apply_context(context)
        start = pixel_coordinates(hidden)
        positions = start
        for _ in range(self.iterations):
            costs = correlation.lookup(positions)
            hidden, change = self.update_block(hidden, gru_directions, costs, positions - start)
            positions = positions + change
        return upsample_flow(positions - start, 0.25 * self.update_block.mask(hidden))


def upsampling_mask(hidden: int, width: int) -> nn.Sequential:
    """Return the layers that predict the mask of `upsample_flow`, before it is multiplied by 0.25."""
    return nn.Sequential(conv(hidden, width), nn.ReLU(), conv(width, 9 * SCALE**2, 1))


def upsample_flow(flow: Tensor, mask: Tensor) -> Tensor:
    """Upsample a flow to 1 2 8h 8w by weighted means of the nine positions around each pixel.

    Args:
        flow: Flow, 1 2 h w.
        mask: Logits of the weights, 1 576 h w: 9 for each of the 8 x 8 pixels that a position becomes.
    """
    height, width = flow.shape[-2:]
    weights = rearrange(mask, "1 (n y x) h w -> n y x h w", n=9, y=SCALE, x=SCALE).softmax(dim=0)
    around = rearrange(unfold(SCALE * flow, 3, padding=1), "1 (two n) (h w) -> two n h w", n=9, h=height)
    fine = torch.einsum("nyxhw,tnhw->thywx", weights, around)
    return fine.reshape(1, 2, SCALE * height, SCALE * width)


def read_raft(checkpoint: Checkpoint) -> LoadPlan[RaftConfig]:
    """Plan the loading of a large RAFT; the layer sizes are read from tensor shapes.

    Raises:
        CheckpointError: If the file is not a RAFT file.
    """
    checkpoint = checkpoint.without_prefix("module.")
    sources = list_tensor_sources(checkpoint)
    wrong_kind_error = make_wrong_kind_error(
        checkpoint, "a large RAFT", "--model", "a folder with raft-things"
    )
    if not {"update_block.gru.convz1.weight", "cnet.norm1.running_var"} <= sources.keys():
        raise wrong_kind_error
    shape = make_shape_reader(checkpoint, sources, wrong_kind_error)

    def out_channels(name: str) -> int:
        return shape(f"{name}.weight")[0]

    hidden = out_channels("update_block.gru.convz1")
    encoder = "update_block.encoder."
    config = RaftConfig(
        stages=(
            out_channels("cnet.conv1"),
            out_channels("cnet.layer2.0.conv1"),
            out_channels("cnet.layer3.0.conv1"),
        ),
        features=out_channels("fnet.conv2"),
        hidden=hidden,
        context=out_channels("cnet.conv2") - hidden,  # the first channels are the hidden state of the GRU
        correlation=(out_channels(f"{encoder}convc1"), out_channels(f"{encoder}convc2")),
        flow=(out_channels(f"{encoder}convf1"), out_channels(f"{encoder}convf2")),
        motion=out_channels(f"{encoder}conv") + 2,  # the flow itself is appended
        head=out_channels("update_block.flow_head.conv1"),
        mask=out_channels("update_block.mask.0"),
    )
    if config.context <= 0:
        raise wrong_kind_error
    return LoadPlan(config, checkpoint, sources, IGNORED_TENSORS)
