"""Options of tools/dataset_report.py."""

from pathlib import Path

from dataset.options import DATASET_FILE
from modules.errors import OptionError
from modules.options import Options, option

STDOUT = "-"  # of --json without a value


class ReportOptions(Options, title="report"):
    """Which dataset the report covers, for which model, and where the report is written."""

    key_files = (DATASET_FILE,)

    dataset_config: Path = option("dataset configuration, .toml or .json", required=True, by_place=True)
    output: Path | None = option("the HTML page to write; it is one file", place="new file")
    json: Path | None = option(
        "write the same numbers as JSON; without PATH, or with -, to standard output",
        nargs="?",
        const=STDOUT,
        place="new file",
    )
    items: int = option(
        "most files with thumbnails on the page: those with remarks first, then an even choice; 0 for none",
        default=200,
        minimum=0,
        hint="0 for no thumbnails",
    )
    fps: float = option(
        "frames per second of the model, for tables with source_fps: 16 for Wan, 24 for HunyuanVideo, "
        "Wan2.2 TI2V-5B, LTX-2 and MiniMax-H3, 30 for FramePack",
        default=16.0,
        above=0,
    )
    pixel_step: int = option(
        "sides of buckets are multiples of this: 16, or 32 for Wan2.2 TI2V-5B, LTX-2 and MiniMax-H3",
        default=16,
        minimum=1,
        maximum=1024,
        hint="16, or 32 for Wan2.2 TI2V-5B, LTX-2 and MiniMax-H3",
    )
    frame_step: int = option(
        "clips have a multiple of this number of frames, and one more: 4, or 8 for LTX-2; 17 for MiniMax-H3, "
        "five more; 1 for models of images",
        default=4,
        choices=(1, 4, 8, 17),
    )
    references: int = option(
        "most reference images of an image that the model takes, for models that edit images; 0: it "
        "takes none, and control images are counted as those of FramePack and Fun-Control",
        default=0,
        minimum=0,
        maximum=1000,
        hint="0 for a model without any",
    )
    no_decode: bool = option(
        "read headers only, for very large datasets: nothing is measured and no copies are found; only "
        "files with thumbnails are decoded"
    )
    files: bool = option(
        "add each file to the JSON: how it is cropped, its caption, what is wrong with it, and whether its "
        "caches are still valid"
    )
    no_download: bool = option("download nothing: a file at an address that is not here counts as broken")
    num_workers: int | None = option(
        "threads that read files; default: all cores but one. The result does not depend on it",
        minimum=1,
        maximum=1024,
    )

    def __post_init__(self) -> None:
        if self.output is None and self.json is None:
            raise OptionError("nothing would be written: pass --output page.html, --json, or both")
        if self.files and self.json is None:
            raise OptionError("--files adds to the JSON: pass --json too")
        if self.output is not None and self.output.suffix.lower() not in {".html", ".htm"}:
            raise OptionError(f"--output {self.output}: name a file that ends in .html")
        if self.json is not None and not self.prints and self.json.suffix.lower() != ".json":
            raise OptionError(f"--json {self.json}: name a file that ends in .json")

    @property
    def prints(self) -> bool:
        """Whether the JSON report goes to standard output."""
        return self.json is not None and str(self.json) == STDOUT
