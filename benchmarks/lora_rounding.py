"""Measure what 16-bit weights keep of small LoRAs, and how long merging takes: --lora_rounding.

    python benchmarks/lora_rounding.py

Random weights of 1024 x 1024 get LoRAs of rank 16 that change them by a fraction of their size; each seed
draws both anew. The kept fraction is the projection of the rounded change on the exact one. The benchmark
fails if stochastic rounding keeps less than 99 % or more than 101 % of a change, in the mean over the seeds.
Then a weight of 5120 x 5120 is merged with each rule in turn; the fastest round counts.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402  # the project's modules are found from here on
from torch import Tensor  # noqa: E402

from networks.apply import LoraPatch  # noqa: E402
from networks.loading import LoraFile, WeightedLora  # noqa: E402
from networks.rounding import LoraRounding  # noqa: E402
from networks.use_options import NEAREST, STOCHASTIC  # noqa: E402

AIM = 0.01  # most distance of the kept share from 1
CHANGES = 0.01, 0.003, 0.001, 0.0003  # of a weight's size
DTYPES = torch.bfloat16, torch.float16
NAME = "blocks.0.ffn.0.weight"
RANK = 16


def main() -> None:
    """Print the kept fraction of each size of change, and the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=64, help="weights and LoRAs of each size")
    parser.add_argument("--rounds", type=int, default=5, help="of merging, for its time")
    args = parser.parse_args()
    is_missed = False
    for dtype in DTYPES:
        for size in CHANGES:
            nearest = [share_kept(seed, size, dtype, NEAREST) for seed in range(args.seeds)]
            random = [share_kept(seed, size, dtype, STOCHASTIC) for seed in range(args.seeds)]
            is_missed |= abs(statistics.mean(random) - 1) > AIM
            print(f"{dtype}, change {size:.2%}: nearest {in_words(nearest)}; at random {in_words(random)}")
    times = measure_times(args.rounds)
    print(f"merging takes {times[STOCHASTIC] / times[NEAREST]:.2f} of the time of rounding to the nearest")
    sys.exit(is_missed)


def in_words(shares: list[float]) -> str:
    """Return mean, spread, minimum and maximum of fractions, in words."""
    mean, spread = statistics.mean(shares), statistics.pstdev(shares)
    return f"{mean:.2%} +- {spread:.2%}, {min(shares):.2%} to {max(shares):.2%}"


def make_pair(seed: int, size: float, dtype: torch.dtype, side: int) -> tuple[Tensor, WeightedLora, Tensor]:
    """Return a weight, a LoRA of this size, and the exact change."""
    generator = torch.Generator().manual_seed(seed)
    weight = (0.02 * torch.randn(side, side, generator=generator)).to(dtype)
    down = torch.randn(RANK, side, generator=generator)
    up = torch.randn(side, RANK, generator=generator)
    change = up @ down
    factor = size * weight.float().norm() / change.norm()
    tensors = {
        "lora_unet_blocks_0_ffn_0.lora_down.weight": down,
        "lora_unet_blocks_0_ffn_0.lora_up.weight": up * factor,
    }
    file = LoraFile(Path(f"{seed}.safetensors"), tensors, {}, "ours")
    return weight, WeightedLora(file, 1.0), change * factor


def share_kept(seed: int, size: float, dtype: torch.dtype, rule: str) -> float:
    """Return the fraction of a LoRA's change that a rounded weight keeps."""
    weight, use, change = make_pair(seed, size, dtype, side=1024)
    merged = LoraPatch([use], rounding=LoraRounding(rule))(NAME, weight)
    kept = merged.to(dtype).double() - weight.double()
    return float((kept * change.double()).sum() / change.double().square().sum())


def measure_times(rounds: int) -> dict[str, float]:
    """Return the processor seconds of merging a weight of 5120 x 5120, of the fastest round."""
    weight, use, _ = make_pair(0, 0.0003, torch.bfloat16, side=5120)
    times: dict[str, list[float]] = {NEAREST: [], STOCHASTIC: []}
    for _ in range(rounds):
        for rule, seconds in times.items():
            start = time.process_time()
            LoraPatch([use], rounding=LoraRounding(rule))(NAME, weight)
            seconds.append(time.process_time() - start)
    return {rule: min(seconds) for rule, seconds in times.items()}


if __name__ == "__main__":
    main()
