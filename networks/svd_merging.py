"""Merge LoRAs into one LoRA of a smaller rank, which keeps the strongest directions of their exact sum."""

import logging
from pathlib import Path

from modules.options import Options, not_needed, option, unsupported
from modules.run_limits import temporary_folder
from networks.loading import WeightedLora, read_lora
from networks.merging import MERGED_FAMILIES, PRECISIONS, FullMergeOptions, check_ratios, save_sum
from networks.module_factors import CPU
from networks.resizing import ResizeOptions, resize_file

logger = logging.getLogger(__name__)


class SvdMergeOptions(Options):
    """Options of `networks/svd_merge_lora.py`."""

    models: tuple[Path, ...] = option(
        "LoRA files to merge, of any dialect", nargs="+", place="there", required=True
    )
    ratios: tuple[float, ...] = option("strength of each file of --models", nargs="+", required=True)
    save_to: Path = option("file to write", place="safetensors", must_not_replace="models", required=True)
    new_rank: int = option("rank of the merged LoRA", default=4, minimum=1)
    new_conv_rank: int | None = option(
        "the same for convolutions; default: --new_rank", minimum=1, hint="a rank"
    )
    save_precision: str = option("dtype of the factors", default="float", choices=PRECISIONS)
    family: str | None = option(
        "the model that the LoRAs are for, if neither their metadata nor their names and sizes show it",
        choices=MERGED_FAMILIES,
    )
    precision = not_needed("it is computed in float64.", choices=PRECISIONS)
    device = not_needed("it takes seconds on the CPU, in float64.", type=str)
    lbws = unsupported(
        "strengths of single blocks. Omit it, and pass one strength for each file to --ratios",
        "strengths of single blocks",
        nargs="*",
    )
    no_metadata = unsupported("the file always says its rank, and which files are merged in it")

    def __post_init__(self) -> None:
        check_ratios(self.models, self.ratios)


def merge_and_resize(options: SvdMergeOptions) -> None:
    """Write the weighted sum of LoRAs as one LoRA of rank `new_rank`.

    Raises:
        CheckpointError: If a file cannot be used, or if the files do not match each other.
    """
    pairs = list(zip(options.models, options.ratios, strict=True))
    weighted_loras = [WeightedLora(read_lora(path, with_texts=True), ratio) for path, ratio in pairs]
    logger.info("merging %s", ", ".join(f"{path} (strength {ratio:g})" for path, ratio in pairs))
    with temporary_folder() as folder:
        # with concat, the sum is exact and has all ranks; it is then resized to the new rank
        sum_path = folder / "sum.safetensors"
        summing = FullMergeOptions.from_defaults(
            models=options.models,
            ratios=options.ratios,
            save_to=sum_path,
            family=options.family,
            concat=True,
        )
        save_sum(summing, sum_path, weighted_loras, CPU)
        resize_file(
            ResizeOptions.from_defaults(
                model=sum_path,
                save_to=options.save_to,
                new_rank=options.new_rank,
                new_conv_rank=options.new_conv_rank,
                save_precision=options.save_precision,
            )
        )
