"""Options of the average of saved files (`lora_post_hoc_ema.py`). Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option
from modules.output_files import check_output_file, refuse_replacing
from networks.options import require_files

# of a profile that weighs all files alike; Karras et al. 2023, arXiv 2312.02696, equation 123 at gamma = 0
LARGEST_SIGMA = 12**-0.5


class AveragingOptions(Options):
    """Options of `lora_post_hoc_ema.py`."""

    path: tuple[Path, ...] = option(
        "saved files of one run, from any of its epochs or steps", positional=True, nargs="+"
    )
    no_sort: bool = option(
        "take the files in the order given; else by their step, or by time if they do not say it"
    )
    beta: float = option(
        "share of the average so far at each further file; the first file keeps a large share",
        default=0.95,
        least=0,
        most=1,
        hint="such as 0.9",
    )
    beta2: float | None = option(
        "that share at the last file; it changes evenly from --beta to this",
        least=0,
        most=1,
        hint="such as 0.9",
    )
    sigma_rel: float | None = option(
        "instead of --beta: width of the average as a share of the run, 0.05 to 0.28 (power function)",
        above=0,
        most=LARGEST_SIGMA,
        hint="there all files count alike; 0.2 is a good start",
    )
    output_file: Path = option("safetensors file to write", required=True)

    def __post_init__(self) -> None:
        files = self.files()
        if len(files) < 2:
            raise OptionError(f"{files[0]} is a single file: give two or more of one run")
        require_files("path", files, folders="its files end in .safetensors")
        refuse_replacing("--output_file", self.output_file, files)
        check_output_file("--output_file", self.output_file)

    def files(self) -> list[Path]:
        """Return the files, each once; patterns such as `x-*.safetensors` are expanded: not all shells do."""
        found: dict[Path, None] = {}
        for path in self.path:
            if path.exists():
                found[path] = None
                continue
            named = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not named:
                raise OptionError(f"{path}: no such file. Give files that a training has saved")
            found |= dict.fromkeys(named)
        return list(found)
