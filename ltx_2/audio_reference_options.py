"""Options of audio that a clip's audio is made after, and which references a LoRA learns. Standard library.

A strategy names the references that training takes; a preset of modules of the same name implies it.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_2.model_options import AUDIO, VIDEO
from modules.options import FREE, HABIT, REQUEST_SETTING, SAMPLES_ONLY, Options, make_request_facts, option

NEGATIVE_POSITIONS = "audio_ref_use_negative_positions"  # option, and key in the metadata of LoRAs
IDENTITY_SCALE = "audio_ref_identity_guidance_scale"


@dataclass(frozen=True)
class ReferenceStrategy:
    """Which dataset references a training run uses: clips or images, audio, or both."""

    takes_images: bool = False  # clips and images, of reference_directory
    takes_audio: bool = False  # of reference_audio_directory
    # streams of which each batch has to have a reference; the LoRA is for edits then
    needs: frozenset[str] = frozenset()
    streams: frozenset[str] = frozenset()  # that --ltx2_mode needs


AUTO, NONE = "auto", "none"
_BOTH = frozenset({VIDEO, AUDIO})
_AUDIO_ALONE = ReferenceStrategy(takes_audio=True, needs=frozenset({AUDIO}), streams=frozenset({AUDIO}))
# values of --ic_lora_strategy. Source: the documentation of musubi-tuner's fork for LTX-2
STRATEGIES: Mapping[str, ReferenceStrategy] = {
    AUTO: ReferenceStrategy(takes_images=True, takes_audio=True),
    NONE: ReferenceStrategy(),
    "v2v": ReferenceStrategy(takes_images=True, streams=frozenset({VIDEO})),
    "audio_ref_ic": _AUDIO_ALONE,
    "audio_ref_only_ic": _AUDIO_ALONE,  # older spelling
    "av_ic": ReferenceStrategy(takes_images=True, takes_audio=True, needs=_BOTH, streams=_BOTH),
    "video_ref_only_av": ReferenceStrategy(takes_images=True, needs=frozenset({VIDEO}), streams=_BOTH),
}
OLDER = {"audio_ref_only_ic": "audio_ref_ic"}


def find_strategy(typed: str, preset: str) -> tuple[str, ReferenceStrategy]:
    """Return the option that selects the strategy (with its value, for messages), and the strategy.

    Args:
        typed: Value of --ic_lora_strategy.
        preset: Value of --lora_target_preset.
    """
    if typed == AUTO and preset in STRATEGIES:
        return f"--lora_target_preset {preset}", STRATEGIES[preset]
    return f"--ic_lora_strategy {typed}", STRATEGIES[typed]


def _switch(text: str, default: bool | None, **relations: Any) -> Any:
    return option(text, default=default, action=argparse.BooleanOptionalAction, **relations)


def _identity(facts: Mapping[str, Any]) -> Any:
    return option(
        "guide audio away from predictions without its reference, which keeps a voice; about 3; 0: not at "
        "all. It costs one more pass in each step",
        name=IDENTITY_SCALE,
        default=0.0,
        minimum=0,
        facts=facts,
    )


class Ltx2AudioReferences(Options, title="audio references"):
    """Options of audio references that a training run uses, such as a speaker's voice (ID-LoRA)."""

    ends_before_audio: bool = _switch(
        "positions of the reference end before the audio begins; default: both begin at 0",
        False,
        name=NEGATIVE_POSITIONS,
        facts=HABIT,
    )
    is_hidden_from_video: bool = _switch(
        "the video does not attend to the reference",
        False,
        name=("audio_ref_mask_cross_attention_to_reference"),
        facts=HABIT,
    )
    is_without_text: bool = _switch(
        "the reference does not attend to the text",
        False,
        name=("audio_ref_mask_reference_from_text_attention"),
        facts=HABIT,
    )
    identity_scale: float = _identity({**FREE, **SAMPLES_ONLY})


class Ltx2GivenAudioReference(Options, title="audio references"):
    """Options for audio whose voice or style the generated audio follows."""

    reference_audio: Path | None = option(
        "reference file for the generated audio, such as a voice, with a LoRA trained for it; at most as "
        "long as the result",
        flags=("--reference-audio",),
        place="there",
        facts=make_request_facts("reference_audio"),
    )
    ends_before_audio: bool | None = _switch(
        "positions of the reference end before the audio begins; default: as the LoRA's metadata says, else "
        "both begin at 0",
        None,
        name=NEGATIVE_POSITIONS,
    )
    identity_scale: float = _identity(REQUEST_SETTING)
