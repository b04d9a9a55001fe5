"""The protocol of all quantization formats of linear layers, and the layers that use them.

A quantized layer stays an `nn.Linear`. Its `weight` is a frozen parameter of the format's dtype and shape;
packed shapes differ from the layer's (see `out_features` and `in_features`). The format's companions, such as
scales, are buffers. `forward` is set on the layer itself, so that wrappers added later (a LoRA, compilation)
find it.

A format is a frozen dataclass in a module of this folder; it implements `QuantizationFormat`. If options can
request a format, `Quantization.form` is the name of its module, which defines `make_quantization_format`,
`prepare` and `rehearsed`.
"""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.installation import import_own
from modules.speed_options import Quantization

Shape = tuple[int, int]  # out x in, of the value
MAX_TENSORS = 5  # of a form: the weight and its companions
Tensors = tuple[Tensor | None, ...]  # the weight of a layer and its companions, in the format's order


class QuantizationFormat(Protocol):
    """How weights are stored, such as int8, and how layers compute with them. Equal formats compare equal."""

    @property
    def name(self) -> str:
        """Name of the format in messages and metadata, such as fp8, int8 or nf4."""

    @property
    def log_description(self) -> str:
        """Description of the format for the log, such as "in fp8 with a scale per row"."""

    @property
    def companions(self) -> tuple[str, ...]:
        """Names of the buffers, such as scales, that a layer gets in addition to its quantized weight."""

    @property
    def is_kept_by_default(self) -> bool:
        """Whether weights that a file stores in this format stay quantized without an option."""

    def quantize(self, weight: Tensor) -> "QuantizedWeight":
        """Quantize a weight, out x in, of any floating-point dtype."""
        ...

    def empty(self, shape: Shape) -> "QuantizedWeight":
        """Return a quantized weight of this shape on the meta device, to plan memory."""
        ...

    def dequantize(self, tensors: Tensors, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Dequantize the weight into new memory, out x in."""
        ...

    def multiply(self, x: Tensor, tensors: Tensors, shape: Shape, bias: Tensor | None) -> Tensor:
        """Compute x W^T + b in autocast's dtype, or in x's dtype without autocast; differentiable in x and b.

        Implementations must not save a 16-bit copy of the weight for the backward pass.
        `dequantize_and_multiply` works for any format.
        """
        ...

    def cut(self, stored: "QuantizedWeight", first: int, count: int) -> "QuantizedWeight | None":
        """Return `count` rows of a weight, from row `first` on; None if the format cannot be cut there."""
        ...

    def join(self, parts: Sequence["QuantizedWeight"]) -> "QuantizedWeight | None":
        """Concatenate weights of this format along their rows; return None if they cannot be combined."""
        ...

    def adopt_compute_settings(self, chosen: "QuantizationFormat") -> "QuantizationFormat":
        """Return this format (of a file) with the compute settings of the format that the user chose."""
        ...

    def check_device(self, device: torch.device) -> None:
        """Raise OptionError if the device does not support this format."""
        ...


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight and its format, whether or not a layer contains it yet."""

    format: QuantizationFormat
    shape: Shape
    tensors: Tensors

    @property
    def weight(self) -> Tensor:
        """The first stored tensor, which contains the quantized values."""
        assert self.tensors[0] is not None
        return self.tensors[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantize the weight, out x in."""
        return self.format.dequantize(self.tensors, self.shape, dtype)


def make_quantization_format(quantization: Quantization) -> QuantizationFormat:
    """Return the quantization format that the options select, from the module of that format."""
    form: QuantizationFormat = import_own(f"checkpoints.stored.{quantization.form}").make_quantization_format(
        quantization
    )
    return form


def prepare(quantization: Quantization, device: torch.device) -> Quantization:
    """Return the quantization with the matrix product that its format selects for the device.

    Raises:
        OptionError: If the device or the installed libraries do not support the format.
    """
    result: Quantization = import_own(f"checkpoints.stored.{quantization.form}").prepare(quantization, device)
    return result


def rehearsed(quantization: Quantization | None) -> Quantization | None:
    """Return the quantization for a dry run, in which some kernels only allocate; None stays None."""
    if quantization is None:
        return None
    result: Quantization = import_own(f"checkpoints.stored.{quantization.form}").rehearsed(quantization)
    return result


def attach(layer: nn.Linear, stored: QuantizedWeight) -> None:
    """Replace a linear layer's weight with a quantized weight, and its forward with the format's product."""
    layer.weight = nn.Parameter(stored.weight, requires_grad=False)
    for name, tensor in zip(stored.format.companions, stored.tensors[1:], strict=True):
        layer.register_buffer(name, tensor)
    layer.form = stored.format  # type: ignore[assignment]
    # a method, not a partial: compiled code would know the layer by its partial, and be compiled per block
    layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    # x: ... in -> ... out
    form: QuantizationFormat = layer.form  # type: ignore[assignment]
    shape = (layer.out_features, layer.in_features)
    return form.multiply(x, _get_quantized_tensors(layer, layer.weight, form), shape, layer.bias)


def _get_quantized_tensors(layer: nn.Linear, weight: Tensor, form: QuantizationFormat) -> Tensors:
    return (weight, *[layer._buffers[name] for name in form.companions])


def get_quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """Return the quantized weight of a layer; None if its weight is a plain tensor."""
    form: QuantizationFormat | None = layer.__dict__.get("form")
    if form is None:
        return None
    assert isinstance(layer, nn.Linear)
    return QuantizedWeight(
        form, (layer.out_features, layer.in_features), _get_quantized_tensors(layer, layer.weight, form)
    )


def get_dequantized_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight in float32, dequantized if necessary.

    `weight` is the layer's own full weight.
    """
    stored = get_quantized_weight(layer)
    if stored is None:
        return weight
    return stored.format.dequantize((weight, *stored.tensors[1:]), stored.shape, torch.float32)


def dequantize_and_multiply(
    form: QuantizationFormat, x: Tensor, tensors: Tensors, shape: Shape, bias: Tensor | None
) -> Tensor:
    """Compute x W^T + b in the dtype of x with a quantized weight W.

    The backward pass dequantizes W again, so the dequantized weight is not saved.
    """
    filled = (*tensors, *[None] * (MAX_TENSORS - len(tensors)))
    out: Tensor = _Product.apply(x, None if bias is None else bias.to(x.dtype), form, shape, *filled)
    return out


def computed_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a layer computes in: autocast's if it is enabled, otherwise x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Product(torch.autograd.Function):
    """Linear layer that saves only its quantized weight for the backward pass.

    The tensors are separate arguments, because Dynamo counts arguments and would miss `ctx` with `*tensors`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        form: QuantizationFormat,
        shape: Shape,
        weight: Tensor,
        first: Tensor | None,
        second: Tensor | None,
        third: Tensor | None,
        fourth: Tensor | None,
    ) -> Tensor:
        """Multiply by a quantized weight without saving its dequantized value for the backward pass.

        `first` to `fourth` are the tensors that belong to the stored weight, such as its scale.
        """
        # autograd needs a fixed number of tensors: arguments that the format does not use are None
        tensors = (weight, first, second, third, fourth)[: 1 + len(form.companions)]
        ctx.save_for_backward(*tensors)
        ctx.form, ctx.shape = form, shape
        return functional.linear(x, form.dequantize(tensors, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        tensors = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ ctx.form.dequantize(tensors, ctx.shape, gradient.dtype)
        grad_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, *[None] * MAX_TENSORS
