"""Options of `networks/resize_lora.py`. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import NO_PIXELS, Options, not_needed, option
from networks.tool_options import PRECISIONS

RATIO, SHARE_OF_SUM, SHARE_OF_NORM = "sv_ratio", "sv_cumulative", "sv_fro"


class ResizeOptions(Options):
    """Which LoRA becomes smaller, and by which rule."""

    model: Path = option("LoRA file, of any dialect", place="there", required=True)
    save_to: Path = option(
        "safetensors file to write, in the dialect of --model",
        place="safetensors",
        spares="model",
        required=True,
    )
    new_rank: int = option(
        "rank of the new LoRA; with --dynamic_method the largest one. Modules of a smaller rank keep theirs",
        default=4,
        least=1,
    )
    new_conv_rank: int | None = option(
        "likewise for convolutions; default: --new_rank", least=1, hint="a rank"
    )
    dynamic_method: str | None = option(
        f"give each module a rank of its own. {RATIO}: the directions that are larger than the largest one "
        f"divided by --dynamic_param; {SHARE_OF_SUM}: the fewest whose sizes have this share of the sum of "
        f"all; {SHARE_OF_NORM}: the fewest whose change has this share of the Frobenius norm",
        choices=(RATIO, SHARE_OF_NORM, SHARE_OF_SUM),
        needs="dynamic_param",
        hint="for example 0.9, or 10 with sv_ratio",
    )
    dynamic_param: float | None = option(
        f"number of --dynamic_method: at least 1 with {RATIO}, a share above 0 and up to 1 with the others",
        above=0,
        needs="dynamic_method",
    )
    save_precision: str = option("type of the factors", default="float", choices=PRECISIONS)
    verbose: bool = option("print what is kept of each module", facts=NO_PIXELS)
    device = not_needed("it takes seconds on the CPU, in float64.", type=str)

    def __post_init__(self) -> None:
        if self.dynamic_method is None or self.dynamic_param is None:
            return
        if self.dynamic_method == RATIO and self.dynamic_param < 1:
            raise OptionError(
                f"--dynamic_param {self.dynamic_param:g}: with --dynamic_method {RATIO} the largest "
                "direction is divided by it, so it is at least 1. 10 is usual"
            )
        if self.dynamic_method != RATIO and self.dynamic_param > 1:
            raise OptionError(
                f"--dynamic_param {self.dynamic_param:g}: with --dynamic_method {self.dynamic_method} it is "
                "a share, up to 1. 0.9 is usual"
            )
