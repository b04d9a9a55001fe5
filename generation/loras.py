"""Which LoRAs each expert of a model gets: those of --lora_weight, or those of an option of its own."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from generation.options import GenerationOptions
from modules.contract.experts import HIGH_NOISE, Expert
from modules.errors import OptionError
from networks.merge import LoraUse, lora_uses
from networks.names.layouts import FOR_BOTH
from networks.options import LoraOptions

logger = logging.getLogger(__name__)

OPTIONS = {"": "--lora_weight", HIGH_NOISE: "--lora_weight_high_noise"}  # experts not named here: the first


def loras_of(options: GenerationOptions) -> dict[str, LoraOptions]:
    """Return the LoRA options by the expert that they are for; "": by all that have none of their own."""
    return {"": options.lora, HIGH_NOISE: options.experts.loras}


def uses_by_expert(experts: Sequence[Expert], options: GenerationOptions) -> list[list[LoraUse]]:
    """Read all LoRA files, and return for each expert those that are for it.

    Patterns count over all files: those of --lora_weight, then those of --lora_weight_high_noise. Warns of a
    file that was trained for another expert. Raises OptionError if an expert that LoRAs are for is not given.
    """
    by_option = loras_of(options)
    used = {key_of(expert): expert for expert in experts}
    for key, loras in by_option.items():
        if loras.lora_weight and key not in used:
            raise OptionError(
                f"{OPTIONS[key]} is for the {_words(key)}, which is not given.\n  Leave it out, or give the "
                f"model's file to {'--dit' if not key else f'--dit_{key}'}."
            )
    files = [path for loras in by_option.values() for path in loras.lora_weight or ()]
    strengths = [strength for loras in by_option.values() for strength in loras.multipliers()]
    uses = lora_uses(LoraOptions(tuple(files) or None, tuple(strengths)), options.lora_patterns)
    found: dict[str, list[LoraUse]] = {}
    for key, loras in by_option.items():
        count = len(loras.lora_weight or ())
        found[key], uses = uses[:count], uses[count:]
    _hint_at_missing(used, found)
    return [[use.for_expert(expert.name) for use in found[key_of(expert)]] for expert in experts]


def with_loras(
    options: GenerationOptions, experts: Sequence[Expert], uses: Sequence[Sequence[LoraUse]]
) -> GenerationOptions:
    """Return the options that ask for these LoRAs. uses: by expert."""
    by_key = {key_of(expert): of_expert for expert, of_expert in zip(experts, uses, strict=True)}

    def files(key: str) -> LoraOptions:
        found = by_key.get(key, ())
        return LoraOptions(
            tuple(use.lora.path for use in found) or None, tuple(use.multiplier for use in found)
        )

    high = files(HIGH_NOISE)
    of_experts = replace(
        options.experts,
        lora_weight_high_noise=high.lora_weight,
        lora_multiplier_high_noise=high.lora_multiplier,
    )
    return replace(options, lora=files(""), experts=of_experts)


def option_of(expert: Expert) -> tuple[str, str]:
    """Return the options that give an expert its LoRAs and their strengths."""
    weight = OPTIONS[key_of(expert)]
    return weight, weight.replace("weight", "multiplier")


def key_of(expert: Expert) -> str:
    """Return under which name `loras_of` has the LoRAs of an expert."""
    return expert.name if expert.name in OPTIONS else ""


def _words(key: str) -> str:
    return Expert(key or "low_noise", 0.0).words


def _hint_at_missing(used: dict[str, Expert], found: dict[str, list[LoraUse]]) -> None:
    """Say so if LoRAs for all experts are given to some of them only."""
    for key, uses in found.items():
        for use in uses:
            is_for_all = use.lora.expert == FOR_BOTH or bool(use.lora.parts)
            others = [other for other in used if other != key]
            missing = [
                OPTIONS[other]
                for other in others
                if use.lora.path not in {one.lora.path for one in found[other]}
            ]
            if is_for_all and missing:
                logger.warning(
                    "%s was trained for both experts and is used in one of them alone: give it to %s too",
                    use.lora.path,
                    " and ".join(missing),
                )
