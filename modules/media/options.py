"""Options of how videos are encoded. Standard library only."""

from modules.options import Options, option


class FormatOptions(Options, title="video format"):
    """How videos are encoded."""

    codec: str = option(
        "h264 plays everywhere, h265 is smaller, prores (10 bit, .mkv) is for editing",
        default="h264",
        choices=("prores", "h264", "h265"),
    )
    container: str = option("kind of video file", default="mp4", choices=("mkv", "mp4"))
    keep_pngs: bool = option("also keep the frames as PNG files in a folder `frames`")

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
