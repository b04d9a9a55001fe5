"""Which kernels compute attention. Training names one by a flag of its own, generation by --attn_mode."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from modules.options import add_unsupported

NO_ATTENTION = "attention runs through torch's scaled_dot_product_attention; use --sdpa or leave the option out"


@dataclass(frozen=True)
class TrainingAttentionOptions:
    """The back end of training."""

    sdpa: bool  # the only back end there is, so the flag only says so

    @property
    def mode(self) -> str:
        """The mode of `modules.attention.attend`."""
        return "sdpa"


@dataclass(frozen=True)
class GenerationAttentionOptions:
    """The back end of generation."""

    attn_mode: str

    def __post_init__(self) -> None:
        if self.attn_mode not in {"torch", "sdpa"}:
            raise OptionError(
                f"--attn_mode {self.attn_mode} is not supported yet: {NO_ATTENTION.replace('--sdpa', '--attn_mode torch')}"
            )

    @property
    def mode(self) -> str:
        """The mode of `modules.attention.attend`."""
        return "sdpa"


def add_training_attention_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `TrainingAttentionOptions`, and those that are refused."""
    group = parser.add_argument_group("attention")
    group.add_argument("--sdpa", action="store_true", help="torch's scaled_dot_product_attention (also when no other is chosen)")
    add_unsupported(group, "--flash_attn", reason=NO_ATTENTION, action="store_true", help="FlashAttention 2")
    add_unsupported(group, "--sage_attn", reason=NO_ATTENTION, action="store_true", help="SageAttention; it has no backward pass")
    add_unsupported(group, "--xformers", reason=NO_ATTENTION, action="store_true", help="xFormers")
    add_unsupported(group, "--flash3", reason=NO_ATTENTION, action="store_true", help="FlashAttention 3")
    add_unsupported(group, "--split_attn", reason=NO_ATTENTION, action="store_true", help="attention one sample at a time")


def add_generation_attention_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of `GenerationAttentionOptions`."""
    modes = ("flash", "flash2", "flash3", "torch", "sageattn", "xformers", "sdpa")
    group.add_argument(
        "--attn_mode", default="torch", choices=modes, help="attention back end; torch = sdpa, the only one supported yet"
    )
