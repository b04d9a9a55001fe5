"""Which LoRAs each expert of a model gets: those of --lora_weight, or those of an option of its own."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from generation.options import GenerationOptions
from modules.contract.rules import HIGH_NOISE, Expert
from modules.errors import OptionError
from networks.loading import LoraUse, lora_uses
from networks.names.layouts import FOR_BOTH
from networks.options import LoraOptions

logger = logging.getLogger(__name__)

# option by the expert whose LoRAs it names; "": the first one's, which may be the only one
OPTIONS = {"": "--lora_weight", HIGH_NOISE: "--lora_weight_high_noise"}


def loras_of(options: GenerationOptions) -> dict[str, LoraOptions]:
    """Return the LoRA options, by expert as `OPTIONS` has them."""
    return {"": options.lora, HIGH_NOISE: options.experts.loras}


def key_of(expert: Expert) -> str:
    """Return the name under which `OPTIONS` has an expert."""
    return expert.name if expert.name in OPTIONS else ""


def expert_loras(
    experts: Sequence[Expert], options: GenerationOptions, with_texts: bool = False
) -> tuple[tuple[LoraUse, ...], ...]:
    """Return the LoRAs of each expert, in the order of `experts`; warn of those trained for another one.

    with_texts: read their changes of text encoders too.

    A file that holds a LoRA for each is used in both, whichever option names it. Patterns count over all
    files: those of --lora_weight, then those of --lora_weight_high_noise. Raises OptionError if LoRAs are
    given for an expert that is not, and as `read_lora`.
    """
    given = _read_all(options, with_texts)
    keys = [key_of(expert) for expert in experts]
    for key, uses in given.items():
        whole = [use for use in uses if not use.lora.parts]
        if key not in keys and (whole or (key and uses)):
            dit = f"--dit_{key}" if key else "--dit"
            instead = (
                f"use {OPTIONS[keys[0]]}, or add {dit}" if keys[0] else "add it, or leave the option out"
            )
            raise OptionError(f"{OPTIONS[key]} is for {dit}, which is not given: {instead}")
    _hint_at_missing(keys, given)
    found = []
    for expert, key in zip(experts, keys, strict=True):
        paths = {use.lora.path for use in given[key]}
        others = [use for other, uses in given.items() if other != key for use in uses]
        shared = [use for use in others if use.lora.parts and use.lora.path not in paths]
        found.append(tuple(use.for_expert(expert.name) for use in (*given[key], *shared)))
    return tuple(found)


def _read_all(options: GenerationOptions, with_texts: bool) -> dict[str, list[LoraUse]]:
    by_option = loras_of(options)
    files = [path for loras in by_option.values() for path in loras.lora_weight or ()]
    strengths = [strength for loras in by_option.values() for strength in loras.multipliers()]
    loras_given = LoraOptions(lora_weight=tuple(files) or None, lora_multiplier=tuple(strengths))
    uses = lora_uses(loras_given, options.lora_patterns, with_texts)
    found: dict[str, list[LoraUse]] = {}
    for key, loras in by_option.items():
        count = len(loras.lora_weight or ())
        found[key], uses = uses[:count], uses[count:]
    return found


def _hint_at_missing(keys: Sequence[str], given: Mapping[str, Sequence[LoraUse]]) -> None:
    """Warn if a LoRA that was trained in all experts is given to some of them only."""
    for key, uses in given.items():
        for use in uses:
            missing = [
                OPTIONS[other]
                for other in keys
                if other != key and use.lora.path not in {one.lora.path for one in given[other]}
            ]
            if use.lora.expert == FOR_BOTH and missing:
                logger.warning(
                    "%s was trained for both experts and is used in one of them: give it to %s too",
                    use.lora.path,
                    " and ".join(missing),
                )


def with_loras(
    options: GenerationOptions, experts: Sequence[Expert], uses: Sequence[Sequence[LoraUse]]
) -> GenerationOptions:
    """Return the options that ask for these LoRAs. uses: by expert."""
    by_key = {key_of(expert): of_expert for expert, of_expert in zip(experts, uses, strict=True)}

    def files(key: str) -> LoraOptions:
        found = by_key.get(key, ())
        return LoraOptions(
            lora_weight=tuple(use.lora.path for use in found) or None,
            lora_multiplier=tuple(use.multiplier for use in found),
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
