"""Options of how videos are encoded. Standard library only."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class FormatOptions:
    """How videos are encoded."""

    codec: str  # h264, h265, prores
    container: str  # mp4, mkv
    keep_pngs: bool  # also keep every frame as PNG

    @property
    def suffix(self) -> str:
        """Suffix of a video file."""
        return suffix_of(self.codec, self.container)

    @property
    def is_deep(self) -> bool:
        """Whether the codec holds more than 8 bits a channel."""
        return holds_depth(self.codec)


def suffix_of(codec: str, container: str) -> str:
    """Return the suffix of a video file; ProRes needs Matroska."""
    return ".mkv" if codec == "prores" else f".{container}"


def holds_depth(codec: str) -> bool:
    """Return whether a codec holds more than 8 bits a channel."""
    return codec == "prores"


def add_format_arguments(
    parser: argparse.ArgumentParser, codec: str = "h264", container: str = "mp4"
) -> None:
    """Declare the options of `FormatOptions`. codec, container: their defaults."""
    group = parser.add_argument_group("video format")
    add_codec_arguments(group, codec, container)
    group.add_argument(
        "--keep_pngs", action="store_true", help="also keep the frames as PNG files in a folder `frames`"
    )


def add_codec_arguments(group: argparse._ArgumentGroup, codec: str, container: str) -> None:
    """Declare --codec and --container with their defaults."""
    group.add_argument(
        "--codec",
        type=str,
        default=codec,
        choices=["prores", "h264", "h265"],
        help="h264 plays everywhere, h265 is smaller, prores (10 bit, .mkv) is for editing",
    )
    group.add_argument(
        "--container", type=str, default=container, choices=["mkv", "mp4"], help="kind of video file"
    )
