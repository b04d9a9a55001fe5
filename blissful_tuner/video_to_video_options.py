"""Options of videos that start from another video. Standard library only."""

import argparse

from modules.options import add_unsupported

STRENGTH = 0.8  # of --video_path, where nothing is said


def add_video_to_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --video_path and --strength."""
    group = parser.add_argument_group("video to video")
    group.add_argument(
        "--video_path",
        type=str,
        default=None,
        help="video, or folder of images, to start from instead of noise",
    )
    text = "with --video_path: share of the steps that are made; 1 replaces the video completely"
    group.add_argument("--strength", type=float, default=STRENGTH, help=text)


def refuse_video_to_video(parser: argparse.ArgumentParser) -> None:
    """Declare video-to-video for scripts that do not support it yet; using it is refused with its reason."""
    group = parser.add_argument_group("video to video")
    reason = "videos start from noise; use an image-to-video or a Fun-Control task"
    add_unsupported(group, "--video_path", type=str, default=None, reason=reason, help="video to start from")
    add_unsupported(
        group, "--v2v_denoise", type=float, default=0.5, reason=reason, help="how much of it is made anew"
    )
    add_unsupported(
        group, "--v2v_extra_noise", type=float, default=None, reason=reason, help="noise added to it"
    )
    add_unsupported(group, "--v2v_pad_mode", type=str, default="end", choices=["front", "end"], reason=reason)
    add_unsupported(
        group,
        "--v2v_noise_mode",
        type=str,
        default="traditional",
        choices=["traditional", "direct"],
        reason=reason,
    )
    parser.set_defaults(strength=None)
