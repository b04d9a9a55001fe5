"""One LoRA: what it adds to the output of a frozen Linear or Conv2d, and its dropouts.

Source: Hu et al. 2021, arXiv 2106.09685.
"""
# Letters: B batch, L tokens, R rank

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modules.devices import numbers_on
from modules.seeds import derive_seed

_32_BITS = 0xFFFFFFFF
KINDS = ("neuron", "rank", "module")
# the lower 32 bits of a seed and the rest; as int64 tensors without axes
Halves = tuple[int, int] | tuple[Tensor, Tensor]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Dropouts:
    """Shares dropped while training. None of them acts in eval mode."""

    neuron: float = 0.0  # of single values between the factors
    rank: float = 0.0  # of whole ranks, per sample
    module: float = 0.0  # of whole LoRAs

    def __bool__(self) -> bool:
        return max(self.neuron, self.rank, self.module) > 0


class DropoutSeed:
    """The number that all masks of one micro-batch derive from, shared by the layers of a network."""

    def __init__(self) -> None:
        self.value: int | None = None

    def derive(self, layer: int, kind: str) -> int:
        """The seed of one layer's mask.

        Without a value set, each call draws one from torch's global generator.
        """
        value = int(torch.randint(1 << 62, ())) if self.value is None else self.value
        return derive_seed(value, layer, kind)

    def tables(self, layers: int, device: torch.device) -> Tensor:
        """What `derive` gives for all of them: layers x KINDS x (lower, upper 32 bits) int64, copied to the
        device at once.
        """
        seeds = [[halves(self.derive(layer, kind)) for kind in KINDS] for layer in range(layers)]
        return numbers_on(device, seeds)


class LoraLayer(nn.Module):
    """`y + multiplier * alpha / rank * up(down(x))` in place of the forward of a frozen module.

    The factors are float32 whatever the model's dtype; under autocast they compute in its dtype, without it
    in float32.
    """

    alpha: Tensor
    lora_down: nn.Linear | nn.Conv2d
    lora_up: nn.Linear | nn.Conv2d

    def __init__(self, original: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        """alpha: 0 means rank.

        Initial values come from torch's global CPU generator, as LoRA modules of other tools do it.
        """
        super().__init__()
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))
        self.lora_down, self.lora_up = _factors(original, rank)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.rank = rank
        self.multiplier = 1.0
        self.dropouts, self.index, self.seed = Dropouts(), 0, DropoutSeed()
        # KINDS x 2 int64: compiled code would take a number for a constant
        self.seed_table: Tensor | None = None
        self._original = (original,)  # in a tuple, so that the frozen module is no part of this one
        self._original_forward: Callable[[Tensor], Tensor] = original.forward
        self.register_load_state_dict_post_hook(lambda layer, _: layer.read_alpha())
        self.read_alpha()

    def read_alpha(self) -> None:
        """Take the scale alpha / rank from the alpha buffer, as after loading; 0 means rank in a file too."""
        self.scale = (float(self.alpha) or self.rank) / self.rank

    def set_dropouts(self, dropouts: Dropouts, seed: DropoutSeed, index: int) -> None:
        """index: the layer's number in its network, so that each layer has masks of its own."""
        self.dropouts, self.seed, self.index = dropouts, seed, index

    def attach(self) -> None:
        """From now on the original module's forward is this one's."""
        self._original_forward = self._original[0].forward
        # a mask follows from the numbers of the elements in the input, and would repeat itself in each piece
        # of it
        self._original[0].sees_whole_input = self.dropouts.neuron > 0  # type: ignore[assignment]
        self._original[0].forward = self.forward  # type: ignore[assignment,method-assign]

    def forward(self, x: Tensor) -> Tensor:
        # x: B L in, or B in H W
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast and x.dtype == torch.float32:
            # once, rather than in both the original and the LoRA
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = self._original_forward(x)
        dropping = self.training and bool(self.dropouts)
        in_tensors = dropping and self.seed_table is not None and torch.compiler.is_compiling()
        if self.multiplier == 0 or (dropping and not in_tensors and self._skips()):
            return out
        if not autocast:
            x = x.to(self.lora_down.weight.dtype)
        # B L R: scaled here, where the tensor is small
        hidden = self.lora_down(x) * (self.multiplier * self.scale)
        if dropping:
            hidden = self._dropped(hidden)
        whole = out + self.lora_up(hidden).to(out.dtype)
        # compiled code computes it in any case
        if self.seed_table is not None and in_tensors and self.dropouts.module > 0:
            return torch.where(
                self.seed_table[KINDS.index("module"), 0] < self.dropouts.module * (_32_BITS + 1), out, whole
            )
        return whole

    def _skips(self) -> bool:
        share = self.dropouts.module
        return share > 0 and (self.seed.derive(self.index, "module") & _32_BITS) < share * (_32_BITS + 1)

    def _halves(self, kind: str) -> Halves:
        """The halves of the seed of a mask: as tensors for code that is compiled."""
        if self.seed_table is not None and torch.compiler.is_compiling():
            low, high = self.seed_table[KINDS.index(kind)].unbind()
            return low, high
        return halves(self.seed.derive(self.index, kind))

    def _dropped(self, hidden: Tensor) -> Tensor:
        if self.dropouts.neuron > 0:
            hidden = self._masked(hidden, "neuron", hidden.shape, self.dropouts.neuron)
        if self.dropouts.rank > 0:
            axes = [1] * hidden.ndim
            axes[0], axes[-1 if isinstance(self.lora_down, nn.Linear) else 1] = hidden.shape[0], self.rank
            hidden = self._masked(hidden, "rank", axes, self.dropouts.rank)
        return hidden

    def _masked(self, hidden: Tensor, kind: str, shape: Sequence[int], share: float) -> Tensor:
        """0 where dropped, hidden / (1 - share) elsewhere."""
        keep = keep_mask(shape, share, self._halves(kind), hidden.device)
        # divided by a number, not by a tensor: in bf16 the factor itself would be off by up to 0.4 %, the
        # same way everywhere
        return hidden.masked_fill(~keep, 0.0) / (1 - share)


def _factors(
    original: nn.Linear | nn.Conv2d, rank: int
) -> tuple[nn.Linear, nn.Linear] | tuple[nn.Conv2d, nn.Conv2d]:
    """The empty down and up modules, float32 on the CPU."""
    made: Any = {"bias": False, "dtype": torch.float32, "device": "meta"}
    if isinstance(original, nn.Linear):
        down, up = (
            nn.Linear(original.in_features, rank, **made),
            nn.Linear(rank, original.out_features, **made),
        )
        return _emptied(down), _emptied(up)
    places: Any = {"stride": original.stride, "padding": original.padding, "dilation": original.dilation}
    places["kernel_size"] = original.kernel_size
    down_conv = nn.Conv2d(original.in_channels, rank, **places, **made)
    return _emptied(down_conv), _emptied(nn.Conv2d(rank, original.out_channels, 1, **made))


def _emptied(layer: Layer) -> Layer:
    """A layer from the meta device with an unfilled weight on the CPU; also where a dry run stands in for
    allocation.
    """
    layer.weight = nn.Parameter(torch.empty(layer.weight.shape, dtype=layer.weight.dtype))
    return layer


def halves(seed: int) -> tuple[int, int]:
    """The lower 32 bits and the rest."""
    return seed & _32_BITS, seed >> 32


def keep_mask(shape: Sequence[int], share: float, seed: Halves, device: torch.device) -> Tensor:
    """Booleans, false with probability `share`, equal on every device and at every call with the same seed.

    Each element's number is hashed in integers on the device, so a mask costs no transfer, and the
    recomputation of a checkpointed block draws the mask of its first pass.
    """
    numbers = torch.arange(math.prod(shape), device=device)  # int64
    low, high = seed
    numbers = _hashed(numbers ^ low)
    numbers = _hashed((numbers + high) & _32_BITS)
    return (numbers >= int(share * (_32_BITS + 1))).view(*shape)


def _hashed(x: Tensor) -> Tensor:
    """A mixing of 32-bit numbers held in int64.

    Source: C. Wellons, "Prospecting for hash functions", lowbias32.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _32_BITS
    return x ^ (x >> 16)
