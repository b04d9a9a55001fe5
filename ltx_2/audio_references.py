"""Audio that the audio of clips is made after: tokens before theirs, clean, with positions of their own.

Source: ID-LoRA (arXiv 2603.10256), and the fork of musubi-tuner whose options these are.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from ltx_2.audio_reference_options import (
    NEGATIVE_POSITIONS,
    Ltx2AudioReferences,
    Ltx2GivenAudioReference,
    ReferenceStrategy,
)
from ltx_2.blocks import LtxAudioReferences
from ltx_2.model_options import AUDIO, VIDEO
from modules.control_codes import shorten
from modules.errors import DatasetError, MediaError, OptionError
from modules.media.samples import track_info
from modules.option_values import to_path
from modules.options import is_set, option_name, override_options
from modules.text_files import iterate_lora_metadata
from protocols.data import AUDIO_LATENTS, REFERENCE_AUDIO, REFERENCE_LATENTS, Batch, Conditions
from protocols.requests import Request
from protocols.steps import Overrides

logger = logging.getLogger(__name__)
REFERENCE_AUDIO_OPTION = "reference_audio"  # of a generation, and in `Request.extra`
TRUE, FALSE = "true", "false"  # in the metadata of LoRAs


@dataclass(frozen=True)
class RequestReferences:
    """Files of a request's references, stored in `Prepared.family_settings`."""

    images: tuple[Path, ...] = ()
    audio: Path | None = None

    @property
    def are_given(self) -> bool:
        """Return whether there are any references."""
        return bool(self.images) or self.audio is not None


@dataclass(frozen=True)
class AudioReferenceRules:
    """How the network attends to audio references."""

    ends_before_audio: bool = False  # references end before the audio begins; else they begin with it
    # the next two are set only in training
    is_hidden_from_video: bool = False  # the video does not attend to references
    is_without_text: bool = False  # references do not attend to the text
    identity_scale: float = 0.0  # weight of the guidance away from a pass without the reference

    def select(self, conditions: Conditions, overrides: Overrides) -> LtxAudioReferences:
        """Return the audio reference in one call's conditions, as an argument of the network."""
        latents = conditions.get(REFERENCE_AUDIO)
        if not isinstance(latents, Tensor) or overrides.drop_audio_reference:
            return LtxAudioReferences()
        trains = overrides.step_position is None  # the denoising loop sets it, in which nothing is hidden
        return LtxAudioReferences(
            (latents,),
            ends_before_audio=self.ends_before_audio,
            is_hidden_from_video=self.is_hidden_from_video and trains,
            is_without_text=self.is_without_text and trains,
        )


def make_audio_rules(options: Ltx2AudioReferences) -> AudioReferenceRules:
    """Return the rules for audio references that the training options set."""
    return AudioReferenceRules(
        options.ends_before_audio,
        options.is_hidden_from_video,
        options.is_without_text,
        options.identity_scale,
    )


def warn_about_unused_options(options: Ltx2AudioReferences, strategy: str) -> None:
    """Warn about audio-reference options if the training run's `strategy` uses no audio."""
    given = [f"--{option_name(field)}" for field in fields(options) if is_set(options, field)]
    if given:
        logger.warning("%s: ignored, because %s takes no audio reference", ", ".join(given), strategy)


def check_batch(batch: Batch, strategy: ReferenceStrategy, option: str) -> None:
    """Raise DatasetError if a batch lacks a reference that the strategy needs.

    Clips without audio need no audio reference. `option` is the strategy's option and value, for messages.
    """
    # a reference that dropout removed from this batch is not missing
    names = {**batch.tensors, **batch.undropped}
    missing = []
    if VIDEO in strategy.needs and not any(name.startswith(REFERENCE_LATENTS) for name in names):
        missing.append("reference_directory")
    if AUDIO in strategy.needs and AUDIO_LATENTS in names and REFERENCE_AUDIO not in names:
        missing.append("reference_audio_directory")
    if missing:
        raise DatasetError(
            f"{batch.keys[0]}: {option} needs a reference in each batch, but this one has none. Add a "
            f"file of the same name to {' and to '.join(missing)} of its table, and cache again"
        )


def find_audio_reference(request: Request) -> Path | None:
    """Return the path of a request's audio reference; None if it has none.

    Raises:
        OptionError: If there are several, or the file has no audio.
        MediaError: If the file cannot be opened.
    """
    names = [name for name in request.extra.get(REFERENCE_AUDIO_OPTION, "").split("\n") if name]
    if not names:
        return None
    if len(names) > 1:
        raise OptionError(
            f"--{REFERENCE_AUDIO_OPTION}: {len(names)} files, but only one is supported. Pass one of them"
        )
    path = to_path(f"--{REFERENCE_AUDIO_OPTION}", names[0])
    if not path.is_file():
        raise OptionError(f"--{REFERENCE_AUDIO_OPTION} {path}: no such file. Correct the path")
    try:
        info = track_info(path)
    except MediaError as error:
        raise MediaError(f"--{REFERENCE_AUDIO_OPTION} {error}") from error
    if info is None:
        raise OptionError(f"--{REFERENCE_AUDIO_OPTION} {path}: it has no audio. Pass a file with audio")
    return path


def resolve_reference_positions(
    options: Ltx2GivenAudioReference, loras: Sequence[Path]
) -> Ltx2GivenAudioReference:
    """Fill in an unset `ends_before_audio` from the metadata of LoRAs; return the options.

    Raises:
        OptionError: If LoRAs record different positions, or anything but true and false.
    """
    recorded: dict[str, Path] = {}
    for path, metadata in iterate_lora_metadata(loras):
        if NEGATIVE_POSITIONS in metadata:
            recorded[metadata[NEGATIVE_POSITIONS]] = path
    if len(recorded) > 1 or recorded.keys() - {TRUE, FALSE}:
        listed = " and ".join(f"{shorten(text, 20)} in {path}" for text, path in recorded.items())
        raise OptionError(
            f"--lora_weight: {NEGATIVE_POSITIONS} is {listed}: the values must be equal, and true "
            "or false. Pass one LoRA"
        )
    if not recorded:
        return options
    ((text, path),) = recorded.items()
    trained_value = text == TRUE
    prefix = "" if trained_value else "no-"
    if options.ends_before_audio is None:  # not typed
        logger.info("--%s%s, as %s says", prefix, NEGATIVE_POSITIONS, path.name)
        return override_options(options, {NEGATIVE_POSITIONS: trained_value})
    if options.ends_before_audio != trained_value:
        logger.warning("%s was trained with --%s%s", path, prefix, NEGATIVE_POSITIONS)
    return options
