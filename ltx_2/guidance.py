"""Guidance of both streams: weights of texts, of skipped self-attention, and of the other stream.

Source: the released pipelines.
"""

from dataclasses import replace

from ltx_2.model_options import AUDIO, VIDEO, Ltx2GuidanceOptions
from modules.errors import OptionError
from protocols.rules import GuidanceRules, StreamGuidance


def guidance_rules(
    options: Ltx2GuidanceOptions,
    scale: float | None,
    num_blocks: int,
    perturbed_block: int,
    audio_only: bool = False,
    identity_scale: float = 0.0,
) -> GuidanceRules:
    """Return the guidance weights for the video and audio streams; unset ones get the release's defaults.

    Args:
        options: The options.
        scale: Guidance scale for both streams; None if not given.
        num_blocks: Number of blocks of the network.
        perturbed_block: Block whose self-attention the release skips in the weakened pass.
        audio_only: Whether audio is generated without video.
        identity_scale: Weight of the guidance away from a pass without the reference voice; for audio only.

    Raises:
        OptionError: If --stg_blocks names a block that does not exist.
    """
    perturbed_scale = _select_weight(options.stg_scale, 1.0)
    text_scales = {VIDEO: options.video_cfg_scale, AUDIO: options.audio_cfg_scale}
    if text_scales[AUDIO] is None and scale is None:
        text_scales[AUDIO] = 7.0  # as in the release, like the other defaults here
    modality_scales = {VIDEO: options.video_modality_scale, AUDIO: options.audio_modality_scale}
    # a network smaller than the release may lack the block
    skipped_blocks = options.stg_blocks or (min(perturbed_block, num_blocks - 1),)
    if max(skipped_blocks) >= num_blocks:
        raise OptionError(
            f"--stg_blocks {max(skipped_blocks)}: the model has the blocks 0 to {num_blocks - 1}"
        )

    def make_stream_guidance(stream: str) -> StreamGuidance:
        return StreamGuidance(
            text_scale=text_scales[stream],
            perturbed_scale=perturbed_scale if options.stg_mode in (None, "both", stream) else 0.0,
            modality_scale=1.0 if audio_only else _select_weight(modality_scales[stream], 3.0),
            rescale=_select_weight(options.rescaling(stream), 0.7),
        )

    # without video there is nothing to guide in its stream
    image = StreamGuidance(text_scale=1.0) if audio_only else make_stream_guidance(VIDEO)
    audio = replace(make_stream_guidance(AUDIO), identity_scale=identity_scale)
    return GuidanceRules(streams=(image, audio), perturbed_blocks=frozenset(skipped_blocks))


def _select_weight(typed: float | None, default: float) -> float:
    return default if typed is None else typed
