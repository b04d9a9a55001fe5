"""Options of full fine-tuning: the DiT itself is trained, not a network beside it."""

import argparse
from dataclasses import dataclass, field

from modules.options import HABIT, IDENTITY
from modules.parser import add_unsupported

EVERYTHING = "."  # occurs in every name


@dataclass(frozen=True)
class WholeDitOptions:
    """Which weights of the DiT are trained, in which dtype they are kept, and when they are stepped."""

    # parameters whose name contains one of these are trained, the rest is frozen
    trainable_modules: tuple[str, ...] = field(metadata=IDENTITY)
    fused_backward_pass: bool = field(metadata=HABIT)
    full_bf16: bool = field(metadata=IDENTITY)  # else the weights are kept in float32

    @property
    def name_parts(self) -> tuple[str, ...]:
        """Return `trainable_modules`; empty if everything is trained."""
        return () if EVERYTHING in self.trainable_modules else self.trainable_modules


def add_whole_dit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `WholeDitOptions`."""
    group = parser.add_argument_group("full fine-tuning")
    group.add_argument(
        "--trainable_modules",
        nargs="+",
        default=EVERYTHING,
        metavar="PART",
        help="train only parameters whose name contains one of these, e.g. single_blocks.3. img_mod; "
        ". trains all",
    )
    group.add_argument(
        "--fused_backward_pass",
        action="store_true",
        help="step each weight as soon as its gradient is complete and free the gradient: saves the memory "
        "for all gradients; needs one process, no accumulation, an optimizer such as Adafactor; "
        "--max_grad_norm clips each weight's gradient by itself",
    )
    group.add_argument(
        "--full_bf16",
        action="store_true",
        help="keep the weights in bf16, half of float32's memory; steps are computed in float32 and rounded "
        "stochastically; needs --mixed_precision bf16",
    )
    reason = (
        "weights in fp16 lose most of each step; use --full_bf16, or --mixed_precision fp16 with weights in "
        "float32"
    )
    add_unsupported(group, "--full_fp16", reason=reason, action="store_true", help="keep the weights in fp16")
