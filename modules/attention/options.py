"""Options that choose the kernels of attention.

Training has one flag for each back end, generation has --attn_mode.
"""

import argparse
from dataclasses import dataclass

TRAINING_FLAGS = {  # mode -> flag of the training scripts; if several are given, the first counts
    "sdpa": "--sdpa",
    "flash": "--flash_attn",
    "sage": "--sage_attn",
    "xformers": "--xformers",
    "flash3": "--flash3",
}
GENERATION_VALUES = {  # value of --attn_mode -> mode
    "flash": "flash",
    "flash2": "flash",
    "flash3": "flash3",
    "torch": "sdpa",
    "sageattn": "sage",
    "xformers": "xformers",
    "sdpa": "sdpa",
}


@dataclass(frozen=True)
class AttentionChoice:
    """What the models pass to `modules.attention.attend.attend`."""

    mode: str  # a key of `modules.attention.attend.BACKENDS`
    split: bool = False  # one sample at a time


SDPA = AttentionChoice("sdpa")


@dataclass(frozen=True)
class TrainingAttentionOptions:
    """The back end of training."""

    sdpa: bool
    flash_attn: bool
    sage_attn: bool
    xformers: bool
    flash3: bool
    split_attn: bool

    @property
    def choice(self) -> AttentionChoice:
        """Return the first back end given, in the order of `TRAINING_FLAGS`; torch's own if there is none."""
        return AttentionChoice(next(iter(self._given), "sdpa"), self.split_attn)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return the flags that an earlier one overrides."""
        return tuple(TRAINING_FLAGS[mode] for mode in self._given[1:])

    @property
    def _given(self) -> list[str]:
        return [mode for mode, flag in TRAINING_FLAGS.items() if getattr(self, flag.removeprefix("--"))]


@dataclass(frozen=True)
class GenerationAttentionOptions:
    """The back end of generation."""

    attn_mode: str
    split_attn: bool

    @property
    def choice(self) -> AttentionChoice:
        """Return the back end that --attn_mode names."""
        return AttentionChoice(GENERATION_VALUES[self.attn_mode], self.split_attn)


def flag_of(mode: str, training: bool) -> str:
    """Return the option that selects a back end: `--flash_attn`, or `--attn_mode flash`."""
    if training:
        return TRAINING_FLAGS[mode]
    return f"--attn_mode {next(name for name, meant in GENERATION_VALUES.items() if meant == mode)}"


def add_training_attention_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `TrainingAttentionOptions`."""
    group = parser.add_argument_group("attention")
    group.add_argument(
        "--sdpa",
        action="store_true",
        help="torch's own kernels, the best one for the device (the default)",
    )
    group.add_argument(
        "--flash_attn", action="store_true", help="FlashAttention 2, from the package flash_attn"
    )
    group.add_argument(
        "--sage_attn", action="store_true", help="SageAttention: for generation only, it has no backward pass"
    )
    group.add_argument("--xformers", action="store_true", help="xFormers' memory-efficient attention")
    group.add_argument("--flash3", action="store_true", help="FlashAttention 3, for Hopper GPUs")
    add_split_argument(group)


def add_generation_attention_arguments(
    parser: argparse.ArgumentParser, group: argparse._ArgumentGroup
) -> None:
    """Add --attn_mode.

    Scripts with --split_attn add it with `add_split_argument`; without it nothing is split.
    """
    group.add_argument(
        "--attn_mode",
        default="torch",
        choices=tuple(GENERATION_VALUES),
        help="attention back end; torch or sdpa: torch's own kernels; flash or flash2, flash3, sageattn, "
        "xformers: packages",
    )
    parser.set_defaults(split_attn=False)


def add_split_argument(group: argparse._ArgumentGroup) -> None:
    """Add --split_attn."""
    group.add_argument("--split_attn", action="store_true", help="compute attention one sample at a time")
