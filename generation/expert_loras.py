"""Which LoRAs each expert of a model gets."""

from collections.abc import Sequence
from dataclasses import replace

from generation.options import GenerationOptions
from modules.contract.experts import HIGH_NOISE, Expert
from modules.errors import OptionError
from networks.merge import LoraUse, lora_uses
from networks.options import LoraPatternOptions


def expert_loras(experts: Sequence[Expert], options: GenerationOptions) -> tuple[tuple[LoraUse, ...], ...]:
    """Return the LoRAs of each expert, in the order of `experts`; warn of those trained for another one.

    --lora_weight is for the expert for little noise or the only one, --lora_weight_high_noise for that for
    much noise. A file that holds a LoRA for each is used in both, whichever of the two options names it. The
    nth pattern is for the nth file of either. Raises OptionError if LoRAs are given for an expert that is
    not, and as `read_lora`.
    """
    patterns = options.lora_patterns
    given = lora_uses(options.lora, patterns)
    of_high = options.experts.loras
    high = lora_uses(of_high, _of_first(patterns, len(of_high.lora_weight or ())))
    names = [expert.name for expert in experts]
    if high and HIGH_NOISE not in names:
        raise OptionError("--lora_weight_high_noise is for --dit_high_noise, which is not given: add it")
    if names == [HIGH_NOISE] and any(not use.lora.parts for use in given):
        raise OptionError(
            "--lora_weight is for --dit, which is not given: use --lora_weight_high_noise, or add --dit"
        )
    return tuple(
        _of_expert(name, *((high, given) if name == HIGH_NOISE else (given, high))) for name in names
    )


def _of_expert(name: str, own: Sequence[LoraUse], others: Sequence[LoraUse]) -> tuple[LoraUse, ...]:
    """Return its own LoRAs, and its parts of files that are given to the other expert."""
    paths = {use.lora.path for use in own}
    shared = [use for use in others if use.lora.parts and use.lora.path not in paths]
    return tuple(use.for_expert(name) for use in (*own, *shared))


def _of_first(patterns: LoraPatternOptions, files: int) -> LoraPatternOptions:
    """Return the patterns of as many files."""
    return replace(
        patterns,
        include_patterns=(patterns.include_patterns or ())[:files] or None,
        exclude_patterns=(patterns.exclude_patterns or ())[:files] or None,
    )
