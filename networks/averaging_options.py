"""Options of the average of saved files (`lora_post_hoc_ema.py`). Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.output_files import check_output_file, refuse_replacing
from networks.options import require_files

# of a profile that weighs all files alike; Karras et al. 2023, arXiv 2312.02696, equation 123 at gamma = 0
LARGEST_SIGMA = 12**-0.5


@dataclass(frozen=True)
class AveragingOptions:
    """Options of `lora_post_hoc_ema.py`."""

    path: tuple[Path, ...]
    no_sort: bool  # else by step
    beta: float
    beta2: float | None
    sigma_rel: float | None
    output_file: Path

    def __post_init__(self) -> None:
        for name in ("beta", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise OptionError(f"--{name} {value}: give a number from 0 to 1, such as 0.9")
        if self.sigma_rel is not None and not 0 < self.sigma_rel <= LARGEST_SIGMA:
            raise OptionError(
                f"--sigma_rel {self.sigma_rel}: give a number above 0, up to {LARGEST_SIGMA:.4f} (where "
                "all files count alike); 0.2 is a good start"
            )
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


def add_averaging_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `AveragingOptions`."""
    parser.add_argument("path", nargs="+", help="saved files of one run, from any of its epochs or steps")
    parser.add_argument(
        "--no_sort",
        action="store_true",
        help="take the files in the order given; else by their step, or by time if they do not say it",
    )
    parser.add_argument(
        "--beta",
        type=float,
        default=0.95,
        help="share of the average so far at each further file; the first file keeps a large share",
    )
    parser.add_argument(
        "--beta2", type=float, help="that share at the last file; it changes evenly from --beta to this"
    )
    parser.add_argument(
        "--sigma_rel",
        type=float,
        help="instead of --beta: width of the average as a share of the run, 0.05 to 0.28 (power function)",
    )
    parser.add_argument("--output_file", required=True, help="safetensors file to write")
