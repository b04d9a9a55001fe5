"""Measure what --tread saves: the processor time of a training step, with and without.

    python benchmarks/tread.py

A random Wan2.1 of 10 blocks with a LoRA is trained by hand on the CPU with 640 video tokens; half of them
skip 8 of the blocks. Steps with and without take turns; the median of each kind counts. The benchmark fails
if the ratio is above the aim.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402  # the project's modules are found from here on
from torch import nn  # noqa: E402

from networks.adapter import make_network  # noqa: E402
from networks.options import NetworkOptions  # noqa: E402
from runtime.offload.checkpointing import checkpoint_blocks  # noqa: E402
from training.features.tread_runner import Route, bypassing_blocks  # noqa: E402
from wan.configs import WanConfig  # noqa: E402
from wan.model import WanModel  # noqa: E402

AIM = 0.8
CONFIG = WanConfig(
    dim=512, ffn_dim=2048, freq_dim=64, text_dim=64, num_heads=4, num_layers=10, in_dim=16, out_dim=16
)
GRID = (10, 16, 16)  # of latents; 640 tokens of 1 x 2 x 2
TOKENS = 640
TEXT = 64


def main() -> None:
    """Print the ratios with and without gradient checkpointing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="of each kind")
    steps = parser.parse_args().steps
    is_missed = False
    for checkpoints in (False, True):
        ratio = measure(steps, checkpoints)
        is_missed |= ratio > AIM
        kind = "with gradient checkpointing" if checkpoints else "all activations kept"
        print(f"{kind}: {ratio:.2f} of a step's processor time (aim: at most {AIM})")
    sys.exit(is_missed)


def measure(steps: int, checkpoints: bool) -> float:
    """Return the time of a step with half of the tokens in blocks 1 to 8, relative to one with all."""
    torch.manual_seed(0)
    dit = WanModel(CONFIG).requires_grad_(False).train()
    network = make_network(NetworkOptions(network_dim=16), "networks.lora_wan", dit, 0)
    if checkpoints:
        checkpoint_blocks(dit, WanModel.spec)
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * (steps + 1)):
        is_routed = bool(number % 2)
        seconds = time_step(dit, network.module, is_routed)
        if number > 1:  # the first of each kind warms up
            times[is_routed].append(seconds)
    for is_routed, seconds_of_all in times.items():
        print(f"  {'half' if is_routed else 'all'} of the tokens: {statistics.median(seconds_of_all):.2f} s")
    return statistics.median(times[True]) / statistics.median(times[False])


def draw_half(_: tuple[int, ...]) -> torch.Tensor:
    """Return the sorted positions of a random half of the tokens."""
    return torch.randperm(TOKENS)[: TOKENS // 2].sort().values.unsqueeze(0)


def time_step(dit: WanModel, network: nn.Module, is_routed: bool) -> float:
    """Return the processor seconds of forward and backward."""
    network.zero_grad(set_to_none=True)
    noisy = torch.randn(1, CONFIG.in_dim, *GRID)
    text = torch.randn(1, TEXT, CONFIG.text_dim)
    start = time.process_time()
    if is_routed:
        with bypassing_blocks(dit, Route(1, -2, draw_half)):
            output = dit(noisy, torch.tensor([500.0]), text)
    else:
        output = dit(noisy, torch.tensor([500.0]), text)
    output.square().mean().backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
