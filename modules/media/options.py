"""Options for encoding videos, and the default thresholds of edge detection. Standard library only."""

from modules.options import Options, option

EDGE_THRESHOLDS = (63, 191)  # of Canny's method, low and high, as gen_img.py has always had them


class CodecOptions(Options, title="video format"):
    """Options for the codec and container of videos."""

    codec: str = option(
        "h264 plays everywhere, h265 is smaller, prores (10 bit, .mkv) is for editing",
        default="h264",
        choices=("prores", "h264", "h265"),
    )
    container: str = option("kind of video file", default="mp4", choices=("mkv", "mp4"))

    @property
    def suffix(self) -> str:
        """Suffix of videos: the container's, or .mkv for ProRes."""
        return ".mkv" if self.codec == "prores" else f".{self.container}"

    @property
    def is_deep(self) -> bool:
        """Whether the codec stores more than 8 bits per channel."""
        return self.codec == "prores"


class FormatOptions(CodecOptions, title="video format"):
    """How videos are encoded."""

    keep_pngs: bool = option("also keep the frames as PNG files in a folder `frames`")
