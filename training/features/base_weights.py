"""Merge LoRAs into the transformers before they are trained: --base_weights.

They are merged while a transformer is loaded; how is in `networks/apply.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract.families import HIGH_NOISE
from modules.errors import OptionError
from modules.options import FREE, HABIT, Options, option
from networks.use_options import AUTO, lora_rounding_option, multipliers_for, require_loras
from training.features.contract import AT_NETWORK, Feature
from training.learning_options import MERGED_BEFORE

if TYPE_CHECKING:
    from contract.family import Family
    from contract.rules import Expert
    from training.features.hooks import MergedLoras


class HighNoiseBaseOptions(Options, title="two transformers"):
    """What is merged into the second transformer instead, in scripts that have two."""

    base_weights_high_noise: tuple[Path, ...] | None = option(
        "LoRA files added to --dit_high_noise before training; default: those of --base_weights. If "
        "given, --base_weights is for --dit only",
        place="there",
        facts=FREE,
    )
    base_weights_multiplier_high_noise: tuple[float, ...] | None = option(
        "strength of each file of --base_weights_high_noise; missing ones are 1",
        needs="base_weights_high_noise",
        facts=FREE,
    )

    def __post_init__(self) -> None:
        if self.base_weights_high_noise is not None and not self.base_weights_high_noise:
            raise OptionError("--base_weights_high_noise has no file behind it: give one, or leave it out")
        if self.base_weights_multiplier_high_noise is not None:
            self.multipliers()

    def multipliers(self) -> tuple[float, ...]:
        return multipliers_for(
            self.base_weights_high_noise or (),
            self.base_weights_multiplier_high_noise or (),
            "--base_weights_multiplier_high_noise",
        )


class BaseWeightsOptions(Options, title="network"):
    """Which LoRAs are merged before a training, and how."""

    # resuming compares their names
    base_weights: tuple[Path, ...] | None = option(
        "LoRA files added to the model before training", place="there", facts=FREE
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        "strength of each file of --base_weights; missing ones are 1", needs="base_weights", facts=HABIT
    )
    lora_rounding: str = lora_rounding_option(facts=HABIT)
    high_noise: HighNoiseBaseOptions | None

    def __post_init__(self) -> None:
        self.multipliers(warns=True)

    def multipliers(self, warns: bool = False) -> tuple[float, ...]:
        """Return one multiplier for each file of --base_weights, as `multipliers_for`."""
        multipliers = self.base_weights_multiplier or ()
        return multipliers_for(self.base_weights or (), multipliers, "--base_weights_multiplier", warns)

    @property
    def is_given(self) -> bool:
        return bool(self.base_weights or self.high_noise_files or self.lora_rounding != AUTO)

    @property
    def high_noise_files(self) -> tuple[Path, ...]:
        """Return the files for the second transformer; none if it has those of the first."""
        return () if self.high_noise is None else self.high_noise.base_weights_high_noise or ()


def _check(options: BaseWeightsOptions, family: "Family", counts: Sequence[int]) -> None:
    files = (options.base_weights, options.high_noise_files)
    require_loras(options.lora_rounding, files, "--base_weights")
    experts = family.experts
    if len(experts) == 1 and experts[0].name != HIGH_NOISE and options.high_noise_files:
        raise OptionError(
            "--base_weights_high_noise needs --dit_high_noise. For one transformer use --base_weights"
        )


def _read_merged(options: BaseWeightsOptions, expert: "Expert") -> "MergedLoras":
    """Read the files for a transformer."""
    from networks.loading import read_use  # torch: only with such files
    from training.features.hooks import MergedLoras

    files, multipliers = options.base_weights or (), options.multipliers()
    if expert.name == HIGH_NOISE and options.high_noise is not None and options.high_noise_files:
        files, multipliers = options.high_noise_files, options.high_noise.multipliers()
    uses = [
        read_use(path, expert.name, multiplier) for path, multiplier in zip(files, multipliers, strict=True)
    ]
    return MergedLoras(uses, options.lora_rounding)


def _name_files(options: BaseWeightsOptions) -> Mapping[str, Any]:
    names = {"--base_weights": ", ".join(path.name for path in options.base_weights or ()) or None}
    if options.high_noise_files:
        names["--base_weights_high_noise"] = ", ".join(path.name for path in options.high_noise_files)
    return names


BASE_WEIGHTS = Feature(
    name="base_weights",
    options=BaseWeightsOptions,
    options_by_expert=HighNoiseBaseOptions,
    place=AT_NETWORK,
    is_on=lambda options: options.is_given,
    why_not_whole=MERGED_BEFORE,
    check=_check,
    merged=_read_merged,
    # a LoRA that undoes a distillation may be among them
    undoes_distillation=lambda options: bool(options.base_weights),
    habits=_name_files,
)
