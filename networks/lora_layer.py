"""One LoRA layer: its addition to the output of a frozen Linear or Conv2d, and its dropout.

Source: Hu et al. 2021, arXiv 2106.09685.
"""
# Letters: B batch, L tokens, R rank

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.devices import tensor_on
from modules.seeds import derive_seed
from networks.lora_products import BlockUp, add_up, perturbed, project_in_place_gradient, save_for_add_up
from networks.rank_masks import RankMask
from networks.shared_inputs import SharedInput
from runtime.offload.sharding import TOKEN_PART

_32_BITS = 0xFFFFFFFF
KINDS = ("neuron", "rank", "module")  # kinds of dropout
# Minimum number of values for adding products in place. For so many, that saves four passes over 16 MiB,
# about 16 microseconds on a fast GPU; for smaller tensors, the autograd functions cost the host more than
# that.
MIN_IN_PLACE_NUMEL = 1 << 23
# the lower and upper 32 bits of a seed; as tensors: int64 without axes
Halves = tuple[int, int] | tuple[Tensor, Tensor]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Dropouts:
    """Dropout probabilities in training, at least one of them above 0; in eval mode nothing is dropped."""

    neuron: float = 0.0  # of single values between the factors
    rank: float = 0.0  # of a rank, for all tokens of a sample
    module: float = 0.0  # of the LoRA of a module


class DropoutSeed:
    """Seed for all dropout masks of one micro-batch, shared by the layers of a network."""

    value: int | None = None

    def derive(self, layer: int, kind: str, part: int = 0) -> int:
        """Return the seed of a mask; a random seed in each call if `value` is None.

        Args:
            layer: Index of the layer.
            kind: What is drawn, such as one of KINDS ("neuron", ...).
            part: Index of this process's part of the tokens, if processes split them.
        """
        value = int(torch.randint(1 << 62, ())) if self.value is None else self.value
        return derive_seed(value, layer, kind, part) if part else derive_seed(value, layer, kind)

    def tables(self, layers: "Sequence[LoraLayer]", device: torch.device) -> Tensor:
        """Return the seeds of all layers as layers x KINDS x (low, high 32 bits), int64, copied at once."""
        seeds = [[halves(layer.get_mask_seed(kind)) for kind in KINDS] for layer in layers]
        return tensor_on(device, seeds)


class LoraLayer(nn.Module):
    """Replaces the forward of a frozen module: `y + multiplier * alpha / rank * up(down(x))`.

    The factors are float32 for every dtype of the model. They compute in autocast's dtype, or in float32
    without autocast.
    """

    kind = "LoRA"
    size_word = "rank"
    alpha: Tensor
    lora_down: nn.Linear | nn.Conv2d
    lora_up: nn.Linear | nn.Conv2d | BlockUp

    def __init__(
        self,
        original: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
        split_sizes: Sequence[int] = (),
    ) -> None:
        """Create the factors for a frozen module; initially their product is 0.

        Initial values are drawn from torch's global CPU generator, as in other tools' LoRA modules.

        Args:
            original: The frozen module.
            rank: Rank (of each part, if there are `split_sizes`).
            alpha: Numerator of the scale alpha / rank; 0 means the rank.
            split_sizes: Number of rows of each part of a fused weight; each part gets its own factors. The
                layer's `rank` and `alpha` are then the sums over all parts, so their quotient is unchanged.
        """
        super().__init__()
        num_parts = max(len(split_sizes), 1)
        alpha = (alpha or rank) * num_parts
        rank = rank * num_parts
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.lora_down, self.lora_up = _make_factors(original, rank, split_sizes)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.rank = rank
        self.multiplier = 1.0
        # the product is added in place if the input or the output has at least this many values
        self.min_in_place_numel = MIN_IN_PLACE_NUMEL
        # for DoRA, a function that replaces the addition: (layer, output of the frozen module, output of the
        # LoRA, dtype of the input) -> output
        self.combine_outputs: Callable[[Any, Tensor, Tensor, torch.dtype], Tensor] | None = None
        self.dropouts: Dropouts | None = None
        self.rank_mask: RankMask | None = None  # T-LoRA
        self.seed = DropoutSeed()
        self.index = 0  # position in the network, so that each layer draws its own masks
        # KINDS x 2 int64, a tensor because compiled code would treat a number as a constant
        self.seed_table: Tensor | None = None
        # `networks.cast_factors` sets these before a pass:
        # down factor, and multiplier * scale * up factor, in autocast's dtype
        self.cast_factors: tuple[Tensor, Tensor] | None = None
        # computes the products of layers with the same input together
        self.shared_input: SharedInput | None = None
        # LoRA-GGPO: the module and buffer name of the noise's standard deviations; None: no noise
        self.ggpo_noise_buffer: tuple[nn.Module, str] | None = None
        self._original = (original,)  # in a tuple, so that it is not registered as a submodule
        self._original_forward: Callable[[Tensor], Tensor] = original.forward
        self.register_load_state_dict_post_hook(lambda layer, _: layer.read_alpha())
        self.read_alpha()

    def read_alpha(self) -> None:
        """Recompute the scale alpha / rank after loading the buffer `alpha`; an alpha of 0 means the rank."""
        self.scale = (float(self.alpha) or self.rank) / self.rank

    def attach(self) -> None:
        """Replace the forward method of the frozen module with this layer's."""
        self._original_forward = self._original[0].forward
        # masks depend on an element's index in the input, so chunks of the input would get identical masks
        self._original[0].sees_whole_input = bool(self.dropouts and self.dropouts.neuron)  # type: ignore[assignment]
        self._original[0].forward = self.forward  # type: ignore[assignment,method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """Return the frozen module's output plus the product of the factors, with dropout and noise.

        1. Return only the frozen output if the multiplier is 0 or dropout skips the layer.
        2. Compute together with the layers that have the same input, if these are plain.
        3. Otherwise add the LoRA in place or to a new tensor, with DoRA's norms and GGPO's noise.
        """
        # x: B x L x in, or B x in x H x W
        input_dtype = x.dtype
        # not in compiled code: torch.compile already fuses products with the same input
        shared = None if torch.compiler.is_compiling() else self.shared_input
        x, dtype = self._cast_input(x, shared)
        dropouts = self.dropouts if self.training else None
        has_module_dropout = dropouts is not None and dropouts.module > 0
        # compiled code cannot branch on a random value: it computes the LoRA, then selects an output
        selects_output = has_module_dropout and self.seed_table is not None and torch.compiler.is_compiling()
        if self.multiplier == 0 or (has_module_dropout and not selects_output and self._is_dropped()):
            return self._original_forward(x)
        # layers with the same input compute their outputs together
        if shared is not None and shared.computes_outputs and x.dtype == dtype:
            return shared.compute(self, x)
        if self._adds_in_place(x, dtype):
            out = self._add_in_place(x, dropouts, shared)
            total = out
        else:
            out = self._original_forward(x)
            addition = self._compute_addition(x.to(dtype), dropouts, shared).to(out.dtype)
            if self.combine_outputs is None:
                total = out + addition
            else:  # DoRA
                total = self.combine_outputs(self, out, addition, input_dtype)
        if self.training and self.ggpo_noise_buffer is not None:
            # LoRA-GGPO's noise for this layer's output
            assert self.ggpo_noise_buffer is not None
            module, buffer_name = self.ggpo_noise_buffer
            seed = self.seed.derive(self.index, "noise")
            total = total + perturbed(x.to(dtype), getattr(module, buffer_name), seed).to(total.dtype)
        return self._select_output(out, total) if selects_output else total

    def _cast_input(self, x: Tensor, shared: SharedInput | None) -> tuple[Tensor, torch.dtype]:
        """Return the input of the frozen module and the LoRA, and the dtype of the LoRA's products."""
        # Under autocast, a float32 input is cast once for both, or once for all layers that share it.
        if not torch.is_autocast_enabled(x.device.type):
            return x, self.lora_down.weight.dtype
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype == torch.float32:
            x = x.to(dtype) if shared is None else shared.cast(x)
        return x, dtype

    def _select_output(self, out: Tensor, total: Tensor) -> Tensor:
        """Return the frozen module's output `out` if module dropout skips this LoRA, else `total`."""
        assert self.seed_table is not None
        assert self.dropouts is not None
        is_dropped = self.seed_table[KINDS.index("module"), 0] < self.dropouts.module * (_32_BITS + 1)
        return torch.where(is_dropped, out, total)

    def _compute_addition(self, x: Tensor, dropouts: Dropouts | None, shared: SharedInput | None) -> Tensor:
        """Return the LoRA's output, which is added to the frozen module's output."""
        # x: Input, ... x in, or B x in x H x W, in the dtype of the products.
        factors = self.cast_factors
        if factors is None or factors[0].dtype != x.dtype:  # not cast before the pass: autocast casts them
            return self.lora_up(self._scaled(self.lora_down(x), dropouts))
        down, up = factors  # `up` is already multiplied by the scale
        if shared is None:
            hidden = _multiply(self.lora_down, x, down)
        else:
            # the frozen module has already run on x itself, so its gradient cannot be added in place
            _, hidden = shared.multiply(self, x, adds_gradient_in_place=False)
        if self.rank_mask is not None or dropouts is not None:
            hidden = self._masked(hidden, dropouts)
        # parts of a fused layer with their own up factors
        if isinstance(self.lora_up, BlockUp):
            return self.lora_up.multiply(hidden, up)
        return _multiply(self.lora_up, hidden, up)

    def _add_in_place(self, x: Tensor, dropouts: Dropouts | None, shared: SharedInput | None) -> Tensor:
        """Add the LoRA's product in place to the output of the frozen module, and return that output."""
        is_cast = self.cast_factors is not None and self.cast_factors[0].dtype == x.dtype
        if self.cast_factors is not None and is_cast:
            down, up = self.cast_factors
        else:
            down = self.lora_down.weight.to(x.dtype)
            up = self.lora_up.weight.to(x.dtype)
        if shared is None:
            # a view of x; in the backward pass, the LoRA's gradient is added to the frozen module's gradient
            frozen_input, hidden = project_in_place_gradient(x, down)
        else:
            frozen_input, hidden = shared.multiply(self, x, adds_gradient_in_place=True)
        # factors that were cast before the pass already include the scale
        hidden = self._masked(hidden, dropouts) if is_cast else self._scaled(hidden, dropouts)
        split_sizes = self.lora_up.split_sizes if isinstance(self.lora_up, BlockUp) else ()
        # saved before the frozen layer runs: recomputing a checkpointed block can then stop before that layer
        saved = save_for_add_up(hidden, up, split_sizes)
        out = self._original_forward(frozen_input)
        total = add_up(out.to(x.dtype), hidden, up, split_sizes=split_sizes, saved=saved)
        return total.to(out.dtype)

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Return whether the layer only adds the product of its factors to a frozen linear layer.

        It does more if it has rank masks, dropout, noise, DoRA or a split up factor. False also if other code
        has replaced the frozen module's forward or added hooks.

        Args:
            dtype: Dtype that the frozen weight must have.
        """
        original = self._original[0]
        frozen_forward = self._original_forward
        return (
            type(original) is nn.Linear
            and original.weight.dtype == dtype
            and not original.weight.requires_grad
            and not (original._forward_pre_hooks or original._forward_hooks)
            # no other code has replaced the module's forward, before or after this layer did
            and getattr(frozen_forward, "__func__", None) is nn.Linear.forward
            and getattr(original.forward, "__self__", None) is self
            and isinstance(self.lora_up, nn.Linear)
            and self.rank_mask is None
            and self.ggpo_noise_buffer is None
            and self.combine_outputs is None
            and self.dropouts is None
            and self.multiplier != 0
        )

    def run_frozen(self, x: Tensor) -> Tensor:
        """Return the output of the frozen module without the LoRA."""
        return self._original_forward(x)

    @property
    def original(self) -> nn.Linear | nn.Conv2d:
        """The frozen module."""
        return self._original[0]

    def factor_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return (down R x in, up out x R) for each part of a fused weight; else a single pair."""
        if isinstance(self.lora_up, BlockUp):
            ups = self.lora_up.weight.split(self.lora_up.split_sizes)
            return list(zip(self.lora_down.weight.chunk(len(ups)), ups, strict=True))
        return [(self.lora_down.weight.flatten(1), self.lora_up.weight.flatten(1))]

    def norm(self) -> Tensor:
        """Return the Frobenius norm of alpha / rank * up @ down, computed from R x R products."""
        squares = []
        for down, up in self.factor_pairs():  # R x in, out x R
            # Apple GPUs have no float64
            dtype = torch.float32 if down.device.type == "mps" else torch.float64
            down = down.to(dtype)
            up = up.to(dtype)
            # |up @ down|^2 = trace(up^T up down down^T)
            products = (up.T @ up) * (down @ down.T)
            squares.append(products.sum().clamp(min=0))
        return self.scale * torch.stack(squares).sum().sqrt()

    def shrink(self, ratio: Tensor) -> None:
        """Multiply the change by `ratio`, that is, each factor by its square root."""
        self.lora_down.weight.mul_(ratio.sqrt())
        self.lora_up.weight.mul_(ratio.sqrt())

    def _adds_in_place(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Return whether the LoRA's product may be added in place to the output of the frozen module."""
        # False in compiled code, which fuses the operations anyway, with `combine_outputs`, which needs both
        # outputs, and for small tensors.
        original = self._original[0]
        if torch.compiler.is_compiling() or not isinstance(original, nn.Linear) or x.dtype != dtype:
            return False
        num_tokens = x.numel() // original.in_features
        largest_numel = num_tokens * max(original.in_features, original.out_features)  # of input and output
        return self.combine_outputs is None and largest_numel >= self.min_in_place_numel

    def _scaled(self, hidden: Tensor, dropouts: Dropouts | None) -> Tensor:
        """Multiply the down factor's output by multiplier and scale, then apply masks and dropout."""
        return self._masked(hidden * (self.multiplier * self.scale), dropouts)

    def _masked(self, hidden: Tensor, dropouts: Dropouts | None) -> Tensor:
        """Apply T-LoRA's rank mask and dropout to the output of the down factor."""
        rank_axis = -1 if isinstance(self.lora_down, nn.Linear) else 1
        if self.rank_mask is not None:
            hidden = self.rank_mask.apply(hidden, rank_axis)
        if dropouts and dropouts.neuron > 0:
            hidden = self._mask(hidden, "neuron", hidden.shape, dropouts.neuron)
        if dropouts and dropouts.rank > 0:
            mask_shape = [1] * hidden.ndim
            mask_shape[0] = hidden.shape[0]
            mask_shape[rank_axis] = self.rank
            hidden = self._mask(hidden, "rank", mask_shape, dropouts.rank)
        return hidden

    def get_mask_seed(self, kind: str) -> int:
        """Return the seed of this layer's dropout mask of a kind, such as "neuron".

        If processes split the tokens, they have different neuron masks; all other masks are equal.
        """
        part = getattr(self._original[0], TOKEN_PART, 0) if kind == "neuron" else 0
        return self.seed.derive(self.index, kind, part)

    def _is_dropped(self) -> bool:
        """Return whether module dropout skips this LoRA in the current step."""
        assert self.dropouts is not None
        return (self.get_mask_seed("module") & _32_BITS) < self.dropouts.module * (_32_BITS + 1)

    def _mask(self, hidden: Tensor, kind: str, shape: Sequence[int], probability: float) -> Tensor:
        """Apply dropout: set random elements to 0 and divide the others by 1 - probability."""
        seed: Halves
        if self.seed_table is not None and torch.compiler.is_compiling():
            low, high = self.seed_table[KINDS.index(kind)].unbind()
            seed = low, high
        else:
            seed = halves(self.get_mask_seed(kind))
        keep = keep_mask(shape, probability, seed, hidden.device)
        # divided by a number instead of a tensor, whose rounding to bf16 would change all elements in the
        # same direction, by up to 0.4 %
        return hidden.masked_fill(~keep, 0.0) / (1 - probability)


def _multiply(factor: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Apply a factor's layer to x with `weight` in place of the layer's own weight."""
    if isinstance(factor, nn.Linear):
        return functional.linear(x, weight)
    return functional.conv2d(x, weight, None, factor.stride, factor.padding, factor.dilation)


def _make_factors(
    original: nn.Linear | nn.Conv2d, rank: int, split_sizes: Sequence[int]
) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d | BlockUp]:
    """Return uninitialized modules for the down and up factors, float32 on the CPU."""
    # on the meta device: `_make_empty` allocates them without torch's initialization
    common_arguments: Any = {"bias": False, "dtype": torch.float32, "device": "meta"}
    if isinstance(original, nn.Linear):
        down = _make_empty(nn.Linear(original.in_features, rank, **common_arguments))
        if split_sizes:
            return down, BlockUp(rank, split_sizes)
        return down, _make_empty(nn.Linear(rank, original.out_features, **common_arguments))
    assert not split_sizes
    geometry: Any = {
        "kernel_size": original.kernel_size,
        "stride": original.stride,
        "padding": original.padding,
        "dilation": original.dilation,
    }
    down_conv = _make_empty(nn.Conv2d(original.in_channels, rank, **geometry, **common_arguments))
    return down_conv, _make_empty(nn.Conv2d(rank, original.out_channels, 1, **common_arguments))


def _make_empty(layer: Layer) -> Layer:
    """Move a layer from the meta device to the CPU with an uninitialized weight (may be a fake tensor)."""
    layer.weight = nn.Parameter(torch.empty(layer.weight.shape, dtype=layer.weight.dtype))
    return layer


def halves(seed: int) -> tuple[int, int]:
    """Return the low and the high 32 bits of a seed."""
    return seed & _32_BITS, seed >> 32


def keep_mask(shape: Sequence[int], probability: float, seed: Halves, device: torch.device) -> Tensor:
    """Draw booleans, False with the given probability; the same seed gives the same mask on every device.

    The index of each element is hashed on the device, so no mask has to be transferred. A checkpointed block
    draws the same mask again when its forward pass is recomputed.
    """
    hashes = torch.arange(math.prod(shape), device=device)  # int64
    low, high = seed
    hashes = _hash(hashes ^ low)
    hashes = _hash((hashes + high) & _32_BITS)
    return (hashes >= int(probability * (_32_BITS + 1))).view(*shape)


def _hash(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit integers in int64. Source: C. Wellons, "Prospecting for hash functions"."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _32_BITS
    return x ^ (x >> 16)
