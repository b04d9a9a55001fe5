"""Choose which weights of a network are kept in 8 bits when it is loaded, and measure the rounding error."""

import logging
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from modules.contract.loading import TensorInfo, TensorSource
from modules.errors import CheckpointError, OptionError
from modules.fp8.weights import E4M3, dequantise, linear_weights, quantise
from modules.speed_options import Quantisation

logger = logging.getLogger(__name__)

TEXT_ENCODERS = Quantisation("rows", float32_scales=True)
_SAMPLED_ROWS = 64  # of each weight, on which the rounding error is measured


class Fp8Loading:
    """Hold which weights are kept in 8 bits while a network is loaded, and their rounding errors."""

    def __init__(
        self,
        quantisation: Quantisation,
        rounded: Collection[str],
        kept: Collection[str],
        device: torch.device,
    ) -> None:
        """Take the names of weights to round, and of those that the file already has in fp8 (kept).

        device: where to round. Raises OptionError if the device has no fp8 dtype.
        """
        if device.type == "mps":
            raise OptionError(
                "Apple's GPUs do not support fp8: leave the fp8 options out, or use --device cpu"
            )
        self.quantisation = quantisation
        self.rounded = frozenset(rounded)
        self.kept = frozenset(kept)
        self.device = device
        self._errors: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.rounded or name in self.kept

    def round(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantise a weight (see `quantise`) and remember its rounding error."""
        rounded, scale = quantise(weight, self.quantisation)
        step = max(1, len(weight) // _SAMPLED_ROWS)
        sample = weight[::step].float()
        some = scale if scale is None or scale.ndim == 1 else scale[::step]
        # take rows of a float8 tensor as bytes: not every operation supports the dtype
        back = dequantise(rounded.view(torch.uint8)[::step].view(E4M3), some)
        error = (back - sample).abs().sum() / sample.abs().sum().clamp_min(torch.finfo(torch.float32).tiny)
        # NaN if a weight in any row is NaN or infinite
        self._errors[name] = error if scale is None else error + 0 * scale.sum()
        return rounded, scale

    def report(self, what: str) -> None:
        """Log once how many weights are in 8 bits and their relative error.

        The error of a weight: the sum of |difference| over the sum of |weight|, on some of its rows.
        Raises CheckpointError if an error is NaN.
        """
        if self.kept:
            logger.info("%s: %d linear layers stay in fp8 as the file has them", what, len(self.kept))
        if not self._errors:
            return
        errors = torch.stack([error.cpu() for error in self._errors.values()])
        if not errors.isfinite().all():
            name = list(self._errors)[int(errors.isfinite().logical_not().nonzero()[0])]
            raise CheckpointError(
                f"{what}: {name} has NaN or infinite values, which fp8 cannot hold. Copy the file again."
            )
        how = {
            "cast": "cast to fp8",
            "tensor": "in fp8 with one scale each",
            "rows": "in fp8 with a scale per row",
        }
        mean, low, high = errors.mean().item(), errors.min().item(), errors.max().item()
        text = "%s: %d linear layers %s, relative error %.2f %% (%.2f to %.2f %%)"
        logger.info(text, what, len(errors), how[self.quantisation.kind], 100 * mean, 100 * low, 100 * high)


def find_fp8_weights(
    names: Collection[str], sources: Mapping[str, TensorSource], tensors: Mapping[str, TensorInfo]
) -> frozenset[str]:
    """Return those of the weights that a file with these tensors holds in 8 bits."""
    return frozenset(name for name in names if name in sources and sources[name].is_fp8_in(tensors))


def encoder_loading(
    encoder: nn.Module,
    sources: Mapping[str, TensorSource],
    tensors: Mapping[str, TensorInfo],
    device: torch.device,
) -> Fp8Loading:
    """Keep all linear layers of a text encoder in 8 bits; those of an fp8 file stay as they are.

    Embeddings and norms are not rounded.
    """
    names = linear_weights(encoder)
    kept = find_fp8_weights(names, sources, tensors)
    return Fp8Loading(TEXT_ENCODERS, names - kept, kept, device)
