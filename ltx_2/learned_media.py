"""Options of a generation for media that a LoRA of LTX-2 learned to be given. Standard library only."""

from collections.abc import Mapping
from typing import Any

from ltx_2.given_options import Ltx2GivenParts
from modules.option_values import Placeholder, Repeated

ANY_SHARE = 1e-9  # fraction of clips above 0
GENERATED = 8  # latent frames that a printed command generates beside those that are given
AUDIO_LATENTS = 25  # a second


def list_learned_media(given: Ltx2GivenParts, direction: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a generation for media that a LoRA was trained to be given.

    Args:
        given: The parts of clips that the training gives.
        direction: Value of --ltx2_train_direction.
        sample: The sample that the generation repeats, by the field names of `Request`.

    Returns:
        Values by option; files that the training does not know are placeholders.
    """
    example = sample.get("example")
    # a sample's line says itself what it is made from, unless the LoRA has never seen a clip without it
    least = 1.0 if example is None else ANY_SHARE
    prefix, suffix = given.ltx2_extend_prefix_frames, given.ltx2_extend_suffix_frames
    prefix_p = given.ltx2_extend_p if given.ltx2_extend_prefix_p is None else given.ltx2_extend_prefix_p
    suffix_p = given.ltx2_extend_p if given.ltx2_extend_suffix_p is None else given.ltx2_extend_suffix_p
    learned: dict[str, Any] = {}
    extended = 0  # latent frames that are given
    if prefix and prefix_p >= least:
        learned |= {"--extend_prefix": Placeholder("CLIP_FILE"), "--extend_prefix_frames": 8 * prefix - 7}
        extended += prefix
    if suffix and suffix_p >= least:
        learned |= {
            "--extend_suffix": Placeholder("LATER_CLIP_FILE"),
            "--extend_suffix_frames": 8 * suffix + 1,
        }
        extended += suffix
    if extended and not sample.get("frames"):
        learned["--video_length"] = 8 * (extended + GENERATED) + 1
    is_cropped = given.ltx2_spatial_crop and given.ltx2_spatial_crop_p >= least
    is_masked = given.ltx2_inpaint_mask and given.ltx2_inpaint_mask_p >= least
    if is_cropped and not given.ltx2_spatial_crop_invert:
        region = None if example is None else example.spatial_crop_region
        text: str = Placeholder("X,Y,WIDTH,HEIGHT")
        if region is not None:
            top, left, bottom, right = region
            text = f"{left},{top},{right - left},{bottom - top}"
        learned |= {"--outpaint_source": Placeholder("SOURCE_FILE"), "--outpaint_region": text}
    elif is_cropped or is_masked:
        learned |= {
            "--inpaint_source": Placeholder("SOURCE_FILE"),
            "--inpaint_mask": Placeholder("MASK_FILE"),
        }
        learned["--inpaint_invert"] = is_masked and given.ltx2_inpaint_mask_invert
    if given.video_anchor_training and given.video_anchor_probability >= least:
        learned["--latent_frame"] = Placeholder("0:IMAGE_FILE")
    if given.keyframe_endpoint_training and given.keyframe_first_frame_p >= least:
        learned["--keyframe"] = Placeholder("0:IMAGE_FILE")
    for name, is_keyframe in (("--keyframe", True), ("--latent_frame", False)):
        texts = [
            Placeholder(f"{guide.index}:GUIDE_FILE:{guide.strength:g}")
            for guide in (() if example is None else example.guides)
            if guide.is_keyframe == is_keyframe
        ]
        if texts:
            learned[name] = Repeated(texts)
    return learned | _list_learned_audio(given, direction, least)


def _list_learned_audio(given: Ltx2GivenParts, direction: str, least: float) -> dict[str, Any]:
    """Return the options for audio that a LoRA was trained to be given in at least this share of clips."""
    if direction == "a2v":
        return {"--drive_audio": Placeholder("AUDIO_FILE")}
    prefix, shared_p = given.ltx2_audio_extend_prefix_frames, given.ltx2_audio_extend_p
    prefix_p = shared_p if given.ltx2_audio_extend_prefix_p is None else given.ltx2_audio_extend_prefix_p
    if prefix and prefix_p >= least:
        return {"--audio_prefix": Placeholder("AUDIO_FILE"), "--audio_prefix_seconds": prefix / AUDIO_LATENTS}
    suffix_p = shared_p if given.ltx2_audio_extend_suffix_p is None else given.ltx2_audio_extend_suffix_p
    gives_suffix = given.ltx2_audio_extend_suffix_frames > 0 and suffix_p >= least
    if gives_suffix or (given.ltx2_audio_inpaint_mask and given.ltx2_audio_inpaint_mask_p >= least):
        return {
            "--audio_inpaint_audio": Placeholder("AUDIO_FILE"),
            "--audio_inpaint_interval": Placeholder("START,END"),
        }
    return {}
