"""Options of the network to train beside the model (LoRA)."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.options import check_at_least, check_below, split_pairs


@dataclass(frozen=True)
class NetworkOptions:
    """What to train: a network module, its size, and the weights it starts from."""

    network_module: str | None  # None: the family's own LoRA module
    network_dim: int | None  # rank; None: 4
    network_alpha: float
    network_dropout: float | None
    network_args: tuple[str, ...] | None  # key=value
    network_weights: Path | None
    dim_from_weights: bool
    scale_weight_norms: float | None
    base_weights: tuple[Path, ...] | None
    base_weights_multiplier: tuple[float, ...] | None

    def __post_init__(self) -> None:
        check_at_least("--network_dim", self.network_dim, 1, "leave it out for 4")
        check_at_least("--network_alpha", self.network_alpha, 0, "0 means alpha = rank")
        check_at_least("--network_dropout", self.network_dropout, 0, "the probability of dropping a neuron")
        check_below("--network_dropout", self.network_dropout, 1, "the probability of dropping a neuron")
        if self.scale_weight_norms is not None and not self.scale_weight_norms > 0:
            raise OptionError(f"--scale_weight_norms {self.scale_weight_norms}: the largest norm allowed has to be positive")
        if self.dim_from_weights and self.network_weights is None:
            raise OptionError("--dim_from_weights needs --network_weights: the LoRA file to take ranks and alphas from")
        split_pairs("--network_args", self.network_args)

    def arguments(self) -> dict[str, str]:
        """`network_args` as a dictionary of texts."""
        return split_pairs("--network_args", self.network_args)

    def weighted_base_weights(self) -> tuple[tuple[Path, float], ...]:
        """Each file of --base_weights with its multiplier; missing multipliers are 1."""
        files, given = self.base_weights or (), self.base_weights_multiplier or ()
        return tuple((path, given[i] if i < len(given) else 1.0) for i, path in enumerate(files))


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `NetworkOptions`."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--network_module", help="module that builds the network, as networks.lora_wan; the family's own LoRA when not given"
    )
    group.add_argument("--network_dim", type=int, help="rank of the LoRA; 4 when not given")
    group.add_argument("--network_alpha", type=float, default=1, help="scale numerator: the LoRA acts with alpha / rank")
    group.add_argument(
        "--network_dropout", type=float, help="probability of dropping a neuron of the low-rank output while training"
    )
    group.add_argument(
        "--network_args", nargs="*", metavar="KEY=VALUE", help="further arguments of the network module, e.g. loraplus_lr_ratio=4"
    )
    group.add_argument("--network_weights", help="start from this LoRA file")
    group.add_argument("--dim_from_weights", action="store_true", help="take ranks and alphas from --network_weights")
    group.add_argument("--scale_weight_norms", type=float, help="after each step scale down LoRA weights whose norm is above this")
    group.add_argument("--base_weights", nargs="*", metavar="FILE", help="LoRA files to merge into the model before training")
    group.add_argument(
        "--base_weights_multiplier", type=float, nargs="*", metavar="X", help="strength of each of --base_weights; 1 when not given"
    )
