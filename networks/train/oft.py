"""The trained layers of an OFT, each of which rotates the input of a frozen Linear."""

from collections import Counter
from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from modules.console import format_count
from modules.errors import CheckpointError, OptionError
from networks.kinds import oft
from networks.kinds.contract import LORA_ONLY_ARGUMENTS, KindTraining, LoraModule, Settings, Target
from networks.kinds.factors import Factors
from networks.kinds.oft import MODULE, PART, measure_blocks
from networks.kinds.oft_rotation import compute_rotations, rotate
from networks.lora_layer import KINDS, Dropouts, DropoutSeed, Halves, halves, keep_mask

logger = getLogger(__name__)
MAX_BLOCK = 1024  # inputs in a block


class Rotation(nn.Module):
    """Trainable OFT parameters of a layer's blocks; initialized to zeros, which rotate nothing."""

    def __init__(self, num_blocks: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_blocks, size * (size - 1) // 2))


class OftLayer(nn.Module):
    """Replaces the forward of a frozen Linear to rotate its input first (OFT).

    The rotation is computed in float32 from float32 values. The input is rotated in autocast's dtype, or in
    float32 without autocast.
    """

    kind = "OFT"
    size_word = "block size"

    def __init__(self, original: nn.Linear, size: int) -> None:
        """Create an identity rotation; the frozen module's input width must be divisible by `size`."""
        super().__init__()
        self.oft_R = Rotation(original.in_features // size, size)
        self.rank = size  # for logs and messages
        self.multiplier = 1.0
        self.dropouts: Dropouts | None = None  # `neuron` is the fraction of blocks that do not rotate
        self.seed = DropoutSeed()
        self.index = 0  # index of this layer in the network, so that dropout masks differ between layers
        self.seed_table: Tensor | None = None  # seeds of dropout masks as a tensor, for compiled code
        self._original = (original,)  # in a tuple, so that it is not registered as a submodule
        self._original_forward: Callable[[Tensor], Tensor] = original.forward

    @property
    def original(self) -> nn.Linear:
        """The frozen module."""
        return self._original[0]

    def attach(self) -> None:
        """Replace the forward method of the frozen module with this layer's."""
        self._original_forward = self._original[0].forward
        self._original[0].forward = self.forward  # type: ignore[assignment,method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the input, then run the frozen module on it."""
        # x: ... in
        if self.multiplier == 0:
            return self._original_forward(x)
        is_autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            rotations = compute_rotations(self.oft_R.weight, self.multiplier)  # R - I
            if self.training and self.dropouts is not None:
                rotations = self._drop(rotations, self.dropouts)
            cast = x.to(dtype)
            rotated = cast + rotate(cast, rotations.to(dtype))
        return self._original_forward(rotated if is_autocast else rotated.to(x.dtype))

    def get_mask_seed(self, kind: str) -> int:
        """Return the seed of this layer's dropout mask of a kind, such as "neuron", in this step."""
        return self.seed.derive(self.index, kind)

    def _drop(self, rotations: Tensor, dropouts: Dropouts) -> Tensor:
        """Set R - I, n x b x b, to zero for dropped blocks, or for all blocks if the layer is dropped."""
        device = rotations.device
        if dropouts.neuron > 0:
            keep = keep_mask((len(rotations), 1, 1), dropouts.neuron, self._split_halves("neuron"), device)
            rotations = rotations.masked_fill(~keep, 0.0)
        if dropouts.module > 0:
            keep = keep_mask((1, 1, 1), dropouts.module, self._split_halves("module"), device)
            rotations = rotations.masked_fill(~keep, 0.0)
        return rotations

    def _split_halves(self, kind: str) -> Halves:
        """Return both halves of the seed for a kind of dropout; compiled code reads them from a tensor."""
        if self.seed_table is not None and torch.compiler.is_compiling():
            low, high = self.seed_table[KINDS.index(kind)].unbind()
            return low, high
        return halves(self.get_mask_seed(kind))


def fit_block_size(width: int, size: int) -> int | None:
    """Return the divisor of a width that is nearest to a block size; None for a width of 1.

    Ties go to the smaller divisor, as in OneTrainer (modules/module/LoRAModule.py).
    """
    divisors = [number for number in range(2, width + 1) if width % number == 0]
    return min(divisors, key=lambda number: (abs(number - size), number), default=None)


class OftTraining(KindTraining):
    """Builds the layers of OFTs."""

    kind = oft.OFT

    def check_settings(self, settings: Settings, has_lora_arguments: bool) -> None:
        """Raise OptionError for settings that an OFT does not support.

        Args:
            settings: Settings of the network.
            has_lora_arguments: Whether any argument in `LORA_ONLY_ARGUMENTS` is set.
        """
        if has_lora_arguments or settings.conv_rank is not None:
            raise OptionError(
                f"--network_module {MODULE} rotates the inputs of linear layers. "
                f"{', '.join(LORA_ONLY_ARGUMENTS)} and conv_dim of --network_args are for LoRAs only: "
                "omit them, or use --network_module networks.lora"
            )
        if settings.has_rank_dropout:
            raise OptionError(
                "--network_args rank_dropout: an OFT has no ranks. Use --network_dropout, the share of "
                "blocks that do not rotate in a step, or module_dropout"
            )
        block_sizes = [settings.rank, *settings.ranks_by_pattern]  # --network_dim of an OFT
        if 1 in block_sizes:
            raise OptionError(
                "--network_dim 1: a block of a single value cannot be rotated. Pass 2 or more; 32 is usual"
            )
        if max(block_sizes) > MAX_BLOCK:
            raise OptionError(
                f"--network_dim {max(block_sizes)}: {MAX_BLOCK} is the most values in a block of an OFT. "
                "Use less; 32 is usual"
            )

    def make_layers(
        self, targets: Mapping[str, Target], settings: Settings, kind_arguments: Any
    ) -> dict[str, nn.Module]:
        """Build the layers of a network; log block sizes that do not divide a layer's input width.

        Raises:
            OptionError: If the model has no layer that can be rotated.
        """
        layers: dict[str, nn.Module] = {}
        adjustments: Counter[str] = Counter()  # description of a changed block size -> number of layers
        for name, target in targets.items():
            module = target.module
            if not isinstance(module, nn.Linear):  # convolutions are not rotated
                continue
            block_size = fit_block_size(module.in_features, target.rank)
            if block_size is None:
                adjustments[f"{module.in_features} inputs: no rotation"] += 1
                continue
            if block_size != target.rank:
                adjustments[f"{module.in_features} inputs: {block_size} instead of {target.rank}"] += 1
            layers[name] = OftLayer(module, block_size)
        if adjustments:
            # Log which block sizes were replaced because they do not divide a layer's inputs
            lines = [
                f"{text} ({format_count(count, 'layer')})" for text, count in sorted(adjustments.items())
            ]
            logger.info(
                "block sizes that do not divide a layer's inputs are replaced by the nearest that do. "
                f"{'; '.join(lines)}"
            )
        if not layers:
            raise OptionError(f"--network_module {MODULE}: the model has no linear layer that can be rotated")
        return layers

    def make_layer(self, module: LoraModule, path: str, factors: Factors, settings: Settings) -> OftLayer:
        """Return a trainable layer with the same block size as the factors in a file.

        Raises:
            CheckpointError: If the blocks do not fit the layer's inputs.
        """
        block_size = measure_blocks(factors)
        if block_size is not None and isinstance(module, nn.Linear):
            num_blocks = len(factors[PART])
            # False for a single block that all inputs share, which cannot be trained
            covers_all_inputs = num_blocks * block_size == module.in_features
            if covers_all_inputs:
                return OftLayer(module, block_size)
        raise CheckpointError(
            f"--dim_from_weights: {path} has {PART} {list(factors[PART].shape)}, but only "
            "blocks that cover all inputs of the layer can be trained"
        )


OFT = OftTraining()
