"""Options that choose the kernels of attention.

Training has one flag for each back end, generation has --attn_mode.
"""

from dataclasses import dataclass

from modules.options import Options, option

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
    """Settings that models pass to `modules.attention.attend.attend`."""

    mode: str  # a key of `modules.attention.attend.BACKENDS`
    split: bool = False  # one sample at a time


SDPA = AttentionChoice("sdpa")

_SPLIT = "compute attention one sample at a time"


class TrainingAttentionOptions(Options, title="attention"):
    """The back end of training."""

    sdpa: bool = option("torch's own kernels, the best one for the device (the default)")
    flash_attn: bool = option("FlashAttention 2, from the package flash_attn", often=True)
    sage_attn: bool = option("SageAttention: for generation only, it has no backward pass")
    xformers: bool = option("xFormers' memory-efficient attention")
    flash3: bool = option("FlashAttention 3, for Hopper GPUs")
    split_attn: bool = option(_SPLIT)

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


class GenerationAttentionOptions(Options):
    """The back end of generation. Some scripts have no --split_attn."""

    attn_mode: str = option(
        "attention back end; torch or sdpa: torch's own kernels; flash or flash2, flash3, sageattn, "
        "xformers: packages",
        default="torch",
        choices=tuple(GENERATION_VALUES),
        often=True,
    )
    split_attn: bool = option(_SPLIT)

    @property
    def choice(self) -> AttentionChoice:
        """Return the back end that --attn_mode names."""
        return AttentionChoice(GENERATION_VALUES[self.attn_mode], self.split_attn)


def flag_of(mode: str, training: bool) -> str:
    """Return the option that selects a back end: `--flash_attn`, or `--attn_mode flash`."""
    if training:
        return TRAINING_FLAGS[mode]
    return f"--attn_mode {next(name for name, meant in GENERATION_VALUES.items() if meant == mode)}"
