"""Advice for kinds of files that this program does not read. Standard library only."""

# what to do with files of other kinds
REMEDIES = {
    (".heic", ".heif"): "convert them to PNG, or `pip install pillow-heif`",
    (".psd", ".svg", ".jp2", ".j2k", ".jpx", ".jfif", ".exr", ".hdr", ".tga", ".ppm", ".ico"): (
        "convert them to PNG"
    ),
    (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw"): "develop them to PNG",
    (".avif", ".jxl"): "convert them to PNG, or install a plugin of Pillow that reads them",
    (".zip", ".rar", ".7z", ".tar", ".gz"): "unpack them",
    (".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".rm", ".rmvb", ".asf", ".divx"): (
        "convert them to .mp4"
    ),
    (".apng", ".y4m", ".f4v", ".hevc", ".h264", ".264", ".265", ".ivf"): "convert them to .mp4",
}


def find_remedy(suffix: str) -> str | None:
    """Return advice for converting media files with an unsupported suffix; None for any other suffix."""
    return next((text for ends, text in REMEDIES.items() if suffix in ends), None)
