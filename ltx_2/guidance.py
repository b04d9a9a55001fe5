"""Guidance of both streams: weights of texts, of skipped self-attention, and of the other stream.

Source: the released pipelines.
"""

from ltx_2.model_options import AUDIO, VIDEO, Ltx2GuidanceOptions
from modules.contract.rules import GuidanceRules, StreamGuidance
from modules.errors import OptionError


def guidance_rules(
    told: Ltx2GuidanceOptions, scale: float | None, blocks: int, perturbed: int, is_alone: bool = False
) -> GuidanceRules:
    """Return the weights of guidance: as given, else as released.

    scale: guidance scale for both streams, if given. blocks: number of blocks of the network. perturbed: the
    block whose self-attention the release skips. is_alone: sound is made without video. Raises OptionError if
    --stg_blocks names a block that does not exist.
    """
    steered = _given_or(1.0, told.stg_scale)
    scales = {VIDEO: told.video_cfg_scale, AUDIO: told.audio_cfg_scale}
    if scales[AUDIO] is None and scale is None:
        scales[AUDIO] = 7.0
    away = {VIDEO: told.video_modality_scale, AUDIO: told.audio_modality_scale}
    skipped = told.stg_blocks or (min(perturbed, blocks - 1),)
    if max(skipped) >= blocks:
        raise OptionError(f"--stg_blocks {max(skipped)}: the model has the blocks 0 to {blocks - 1}")

    def rule(stream: str) -> StreamGuidance:
        return StreamGuidance(
            text=scales[stream],
            perturbed=steered if told.stg_mode in (None, "both", stream) else 0.0,
            modality=1.0 if is_alone else _given_or(3.0, away[stream]),
            rescale=_given_or(0.7, told.rescaling(stream)),
        )

    of_picture = StreamGuidance(text=1.0) if is_alone else rule(VIDEO)
    return GuidanceRules(streams=(of_picture, rule(AUDIO)), perturbed_blocks=frozenset(skipped))


def _given_or(usual: float, given: float | None) -> float:
    return usual if given is None else given
