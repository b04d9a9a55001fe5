"""What is asked of output files, for tests of saving."""

from pathlib import Path

from generation.script_options import OutputOptions
from modules.media.options import FormatOptions


def output_options(
    folder: Path,
    output_type: str = "video",
    trim: int = 0,
    codec: str = "h264",
    container: str = "mp4",
    pngs: bool = False,
    numbered: bool = False,
    last: bool = False,
) -> OutputOptions:
    return OutputOptions(
        save_path=folder,
        output_type=output_type,
        no_metadata=False,
        trim_tail_frames=trim,
        no_progressive_save=False,
        prompt_in_name=False,
        save_last_frame=last,
        numbers_single=numbered,
        pictures=False,
        naming="",
        format=FormatOptions(codec=codec, container=container, keep_pngs=pngs),
    )
