"""Round 16-bit weights after a merge, so that LoRAs with small changes keep their effect.

Rounding to the nearest loses changes below half the distance of two neighboring numbers: in bfloat16, changes
of 0.03 % keep 18 % of their effect. Stochastic rounding, whose probabilities depend on the distance to either
neighbor, keeps all of it on average. Source: Gupta et al. 2015, arXiv 1502.02551.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from modules.console import list_some
from networks.use_options import AUTO, NEAREST, STOCHASTIC

logger = getLogger(__name__)

# dtype -> number of float32's last bits that are 0 in all numbers of the dtype
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
_SMALLEST_FP16 = 2.0**-14  # smallest normal number: subnormal numbers below it are evenly spaced
_TOLERANCE = 0.01  # fraction of a change that rounding to the nearest may lose
_SAMPLE_ELEMENTS = 1 << 14  # elements of a weight from which the loss is estimated
_MIN_SAMPLE_ROWS = 16  # LoRAs may change different rows of a fused weight
_CHUNK = 1 << 20  # elements that are rounded at a time
_NOISE = 1 << 21  # random numbers: 8 MB
_MAX_NAMED_FILES = 3  # in a message
SMALL_WEIGHT = 1 << 17  # up to this number of elements, the best of `_DRAWS` random roundings is used
_DRAWS = 4
METADATA_KEY = "ss_lora_rounding"  # in merged models with stochastically rounded weights
MAX_METADATA = 300  # characters of the metadata value


def narrow_dtype(stored: torch.dtype, target: torch.dtype | None) -> torch.dtype | None:
    """Return the 16-bit dtype to which a changed weight is rounded; None if it stays in float32.

    Args:
        stored: Dtype of the weight when it is changed.
        target: Dtype of the weight in the network or file that receives it; None for `stored`.
    """
    for dtype in _DROPPED_BITS:  # bfloat16, the coarser one, comes first
        if dtype in {stored, target}:
            return dtype
    return None


@dataclass
class RoundingLoss:
    """Sums over a weight's elements that measure how much of a LoRA's change survives rounding.

    For the exact change c and the rounding error e, the fraction that survives is <c + e, c> / <c, c>: the
    projection of the rounded change on the exact change.
    """

    error_dot_change: float = 0.0  # sum of e c
    squared_change: float = 0.0  # sum of c^2
    squared_products: float = 0.0  # sum of (e c)^2, for the standard error of the first sum

    @property
    def kept_share(self) -> float:
        """The share of the LoRA's change that is left after rounding, 0 to 1; 1 if nothing changes."""
        share = 1.0
        if self.squared_change > 0:
            share = 1 + self.error_dot_change / self.squared_change
        # sums are estimated from samples, so the share may be outside 0..1
        return min(max(share, 0), 1)


class SampledRows:
    """Evenly spaced rows of a weight, and what each LoRA file adds to them."""

    def __init__(self, weight: Tensor) -> None:
        self.rows = slice(None)  # every n-th row, with about `_SAMPLE_ELEMENTS` elements in all
        if weight.ndim:
            num_rows = len(weight)
            num_sampled = max(_MIN_SAMPLE_ROWS, _SAMPLE_ELEMENTS * num_rows // weight.numel())
            step = max(1, num_rows // num_sampled)
            self.rows = slice(step // 2, None, step)
        self.weight = torch.atleast_1d(weight)[self.rows].float()
        self.sampled_fraction = self.weight.numel() / weight.numel()
        self.additions: dict[Path, Tensor] = {}
        self._total = torch.zeros_like(self.weight)

    def record_sum(self, path: Path, total: Tensor) -> None:
        """Record what a LoRA file adds: the difference between this sum and the previous call's.

        Args:
            path: The LoRA file.
            total: Sum of all changes so far, to the sampled rows only.
        """
        added = total - self._total
        self.additions[path] = self.additions[path] + added if path in self.additions else added
        self._total = total.clone()

    def losses(self, dtype: torch.dtype, scale: float = 1.0) -> dict[Path, RoundingLoss]:
        """Return how much of each LoRA's change is lost if the weight is rounded to the nearest value.

        Args:
            dtype: Dtype to which the weight is rounded.
            scale: Factor by which the weight is divided before it is rounded.
        """
        exact = self.weight + self._total
        largest = torch.finfo(dtype).max
        error = (exact / scale).clamp(-largest, largest).to(dtype).float() * scale - exact
        sums_by_file = []
        for change in self.additions.values():
            product = error * change
            # the fields of `RoundingLoss`
            sums = [product.sum(), change.square().sum(), product.square().sum()]
            sums_by_file.append(torch.stack(sums))
        rows = torch.stack(sums_by_file).tolist()  # a single synchronization with the device
        return {path: RoundingLoss(*row) for path, row in zip(self.additions, rows, strict=True)}


@dataclass(frozen=True)
class RandomRounding:
    """Stochastic rounding of one weight, reproducible in every run and on every device."""

    dtype: torch.dtype  # 16-bit dtype of the result
    seed: bytes  # result of `compute_rounding_seed` for the weight
    noise: Tensor  # _NOISE uniform integers that fill the dropped bits of the dtype, on the weight's device

    def round(self, values: Tensor, start: int) -> None:
        """Round float32 values stochastically, in place, to values that the 16-bit dtype can represent.

        All chunks use the same noise, each from a different offset, because drawing new random numbers would
        take longer than the rest of the merge.

        Args:
            values: The values.
            start: Number of elements of the weight that precede these.
        """
        flat = values.view(-1)
        for first in range(0, len(flat), _CHUNK):
            chunk = flat[first : first + _CHUNK]
            # a hash of the seed and the position, so that the blocks of a weight may have any size
            position = (start + first).to_bytes(8, "little")
            position_hash = hashlib.blake2b(position, key=self.seed, digest_size=8).digest()
            offset = int.from_bytes(position_hash, "little") % (_NOISE - _CHUNK)
            shift = None
            if self.dtype == torch.float16:
                # shift subnormal values to where the spacing is constant and equals the dropped bits
                is_small = chunk.abs() < _SMALLEST_FP16
                shift = torch.copysign(is_small * _SMALLEST_FP16, chunk)
                chunk.add_(shift)
            # add almost up to one step to the magnitude, then truncate to whole steps
            bits = chunk.view(torch.int32)
            bits.add_(self.noise[offset : offset + len(chunk)])
            bits.bitwise_and_(-(1 << _DROPPED_BITS[self.dtype]))
            if shift is not None:
                chunk.sub_(shift)

    def round_small(self, values: Tensor, change: Tensor) -> None:
        """Round a small weight stochastically several times; keep the draw that alters the change least.

        With few elements, a single draw may lose or add more than 1 % of the change by chance.

        Args:
            values: All values of the weight, float32, rounded in place.
            change: Sum of the LoRAs' changes, float32.
        """
        min_loss = math.inf
        best = values
        for draw in range(_DRAWS):
            rounded = values.clone()
            # each draw has its own seed
            replace(self, seed=self.seed + bytes([draw])).round(rounded, 0)
            loss = abs(float(((rounded - values) * change).sum()))
            if loss < min_loss:
                min_loss = loss
                best = rounded
        values.copy_(best)


def compute_rounding_seed(name: str, factors: Iterable[Tensor]) -> bytes:
    """Return the rounding seed of a weight: a hash of its name and of the factors (CPU) that change it."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=16)
    for factor in factors:
        data = factor.detach().contiguous().view(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.digest()


@dataclass
class _RoundedWeights:
    """How many weights were changed and rounded since the last report, and what rounding loses."""

    num_changed: int = 0
    num_16_bit: int = 0  # changed weights that are rounded to 16 bits
    num_random: int = 0  # 16-bit weights that are rounded stochastically
    losses: dict[Path, RoundingLoss] = field(default_factory=dict)  # by file, estimated for the whole weights


class LoraRounding:
    """Chooses how to round each changed weight (`--lora_rounding`), and records what rounding loses.

    While weights are merged, a sample of their rows shows whether rounding to the nearest is good enough.
    No weight is read twice, and stochastic rounding is used only where it helps.
    """

    def __init__(self, rule: str) -> None:
        """Set the value of `--lora_rounding`."""
        self._rule = rule
        # whether rows are sampled: not needed if every weight is rounded stochastically anyway
        self.needs_samples = rule != STOCHASTIC
        self._noise: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # for `RandomRounding.noise`
        self._weights = _RoundedWeights()

    def decide_and_count(self, dtype: torch.dtype | None, sample: SampledRows | None) -> bool:
        """Return whether to round a weight stochastically instead of to the nearest value; update the counts.

        The counts are for the summary that is logged after merging.

        Args:
            dtype: 16-bit dtype to which the weight is rounded; None if it stays in float32.
            sample: Some rows of the weight and of its change, which show how much of the change is lost by
                rounding to the nearest; None if no sample was taken (see `needs_samples`).
        """
        self._weights.num_changed += 1
        if dtype is None:
            return False
        self._weights.num_16_bit += 1
        is_random = self._rule == STOCHASTIC
        if sample is not None:  # the rule is not STOCHASTIC, see `needs_samples`
            losses = sample.losses(dtype)
            for path, loss in losses.items():
                if self._rule == AUTO and loss.squared_change > 0:
                    # notable: the share that is lost exceeds the tolerance plus two standard errors
                    standard_error = math.sqrt(loss.squared_products) / loss.squared_change
                    lost_share = abs(loss.error_dot_change) / loss.squared_change
                    is_random = is_random or lost_share > _TOLERANCE + 2 * standard_error
                file_loss = self._weights.losses.setdefault(path, RoundingLoss())
                # extrapolated from the sampled rows to the whole weight
                file_loss.error_dot_change += loss.error_dot_change / sample.sampled_fraction
                file_loss.squared_change += loss.squared_change / sample.sampled_fraction
        self._weights.num_random += is_random
        return is_random

    def make_random_rounding(self, dtype: torch.dtype, device: torch.device, seed: bytes) -> RandomRounding:
        """Return the stochastic rounding of a weight.

        Args:
            dtype: Dtype to which the weight is rounded.
            device: Device of the run.
            seed: Seed from `compute_rounding_seed`.
        """
        key = dtype, device
        if key not in self._noise:
            # The noise fills the bits that rounding drops; all weights of the dtype share one block. Its
            # fixed seed makes repeated merges equal
            generator = torch.Generator().manual_seed(_DROPPED_BITS[dtype])
            noise = torch.randint(
                1 << _DROPPED_BITS[dtype], (_NOISE,), generator=generator, dtype=torch.int32
            )
            self._noise[key] = noise.to(device)
        return RandomRounding(dtype, seed, self._noise[key])

    def describe(self) -> str:
        """Describe how weights were rounded since the last report, and the effect; "" if none were."""
        weights = self._weights
        if not weights.num_changed or (self._rule == AUTO and not weights.num_random):
            return ""
        option = f"--lora_rounding {self._rule}"
        if not weights.num_16_bit:
            return f"{option} has no effect: the weights are in float32, which keeps LoRAs of any size"
        if self._rule == STOCHASTIC:
            return f"{weights.num_16_bit} weights are rounded up or down at random, as set by {option}"
        # no rows were sampled, so the loss is unknown
        if self._rule == NEAREST and not weights.losses:
            return f"weights are rounded to the nearest, as set by {option}"
        shares: list[str] = []
        for path, loss in weights.losses.items():
            percent = 100 * loss.kept_share
            decimals = 1 if percent > 95 else 0
            shares.append(f"{percent:.{decimals}f} % of {path.name}")
        keeps = list_some(shares, _MAX_NAMED_FILES)
        if self._rule == NEAREST:
            return f"weights are rounded to the nearest, as set by {option}: that keeps {keeps}"
        return (
            "16-bit weights cannot hold such small changes: rounded to the nearest they would keep only "
            f"{keeps}. {weights.num_random} of {weights.num_16_bit} are therefore rounded up or down at "
            "random, which keeps the effect (--lora_rounding)"
        )

    @property
    def metadata(self) -> dict[str, str]:
        """Return metadata about stochastic rounding for a merged file; {} if no weight needed it."""
        return {METADATA_KEY: self.describe()[:MAX_METADATA]} if self._weights.num_random else {}

    def report(self, num_unmerged: int = 0) -> None:
        """Log how weights merged since the last report were rounded, and reset the counts.

        Args:
            num_unmerged: Number of 8-bit or 4-bit weights that are not merged; their LoRAs are computed
                separately.
        """
        sentence = self.describe()
        if num_unmerged and not self._weights.num_changed and self._rule != AUTO:
            sentence = (
                f"--lora_rounding {self._rule} has no effect: the weights stay in 8 or 4 bits, and LoRAs are "
                "computed separately"
            )
        if sentence:
            logger.info(sentence)
        self._weights = _RoundedWeights()
