"""Merge LoRAs into the transformers before they are trained: --base_weights.

They are merged while a transformer is loaded, by `networks/apply.py`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, HABIT_BY_NAME, Options, option
from networks.use_options import AUTO, lora_rounding_option, multipliers_for, require_loras
from protocols.families import HIGH_NOISE
from training.features.contract import AT_NETWORK, Feature, FeatureOptions
from training.features.hooks import MergedLoras, RunFeatures
from training.learning_options import MERGED_BEFORE

if TYPE_CHECKING:
    from protocols.family import Family
    from protocols.rules import Expert


class HighNoiseBaseOptions(Options, title="two transformers"):
    """LoRAs that are merged into the second of two transformers."""

    base_weights_high_noise: tuple[Path, ...] | None = option(
        "LoRA files added to --dit_high_noise before training; default: those of --base_weights. If "
        "given, --base_weights is for --dit only",
        place="there",
        facts=HABIT_BY_NAME,
    )
    base_weights_multiplier_high_noise: tuple[float, ...] | None = option(
        "strength of each file of --base_weights_high_noise; missing ones are 1",
        needs="base_weights_high_noise",
        facts=HABIT,
    )

    def multipliers(self) -> tuple[float, ...]:
        """Return the multiplier of each LoRA merged into the second transformer, 1 by default."""
        return multipliers_for(
            self.base_weights_high_noise or (),
            self.base_weights_multiplier_high_noise or (),
            "--base_weights_multiplier_high_noise",
        )


class BaseWeightsOptions(FeatureOptions, title="network", at=AT_NETWORK, why_not_full=MERGED_BEFORE):
    """LoRAs that are merged into the model before training, and their multipliers."""

    base_weights: tuple[Path, ...] | None = option(
        "LoRA files added to the model before training", place="there", facts=HABIT_BY_NAME
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        "strength of each file of --base_weights; missing ones are 1", needs="base_weights", facts=HABIT
    )
    lora_rounding: str = lora_rounding_option(facts=HABIT)
    high_noise: HighNoiseBaseOptions | None

    def multipliers(self, warns: bool = False) -> tuple[float, ...]:
        """Return one multiplier for each file of --base_weights, 1 for files without a value."""
        multipliers = self.base_weights_multiplier or ()
        return multipliers_for(self.base_weights or (), multipliers, "--base_weights_multiplier", warns)

    @property
    def high_noise_files(self) -> tuple[Path, ...]:
        """Return the LoRA files for the high-noise transformer; () if both use those of --base_weights."""
        return () if self.high_noise is None else self.high_noise.base_weights_high_noise or ()


def _check(options: BaseWeightsOptions, family: "Family", counts: Sequence[int]) -> None:
    options.multipliers(warns=True)
    files = (options.base_weights, options.high_noise_files)
    require_loras(options.lora_rounding, files, "--base_weights")
    experts = family.experts
    if len(experts) == 1 and experts[0].name != HIGH_NOISE and options.high_noise_files:
        raise OptionError(
            "--base_weights_high_noise needs --dit_high_noise. For one transformer use --base_weights"
        )


def _read_merged(options: BaseWeightsOptions, expert: "Expert") -> MergedLoras:
    """Read the LoRA files of --base_weights that are merged into the expert's transformer."""
    from networks.loading import read_weighted_lora  # torch: only with such files

    files, multipliers = options.base_weights or (), options.multipliers()
    if expert.name == HIGH_NOISE and options.high_noise is not None and options.high_noise_files:
        files, multipliers = options.high_noise_files, options.high_noise.multipliers()
    uses = [
        read_weighted_lora(path, expert.name, multiplier)
        for path, multiplier in zip(files, multipliers, strict=True)
    ]
    return MergedLoras(uses, options.lora_rounding)


def _join(run: RunFeatures, options: BaseWeightsOptions) -> None:
    high_noise = options.high_noise
    if high_noise is not None and high_noise.base_weights_high_noise == ():
        raise OptionError("--base_weights_high_noise names no file: pass one, or omit it")
    options.multipliers()  # raises OptionError
    if high_noise is not None:
        high_noise.multipliers()
    # a LoRA that undoes a distillation may be among them
    run.keeps_few_step_ability = run.keeps_few_step_ability or bool(options.base_weights)
    run.merge = partial(_read_merged, options)
    run.on.check.append(partial(_check, options))


BASE_WEIGHTS = Feature(
    name="base_weights",
    options=BaseWeightsOptions,
    is_on=lambda options: (
        options.base_weights is not None
        or (options.high_noise is not None and options.high_noise.base_weights_high_noise is not None)
        or options.lora_rounding != AUTO
    ),
    join=_join,
)
