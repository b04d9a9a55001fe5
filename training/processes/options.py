"""Options of mixed precision and several processes."""

import argparse
from dataclasses import dataclass, field

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import FREE, HABIT

PRECISIONS = ("no", "fp16", "bf16")
MOST_MINUTES = 525_600  # a year


@dataclass(frozen=True)
class AcceleratorOptions:
    """Options of the precision and of several processes.

    Without --mixed_precision this is the launcher's setting.
    """

    mixed_precision: str = field(metadata=HABIT)
    fp16_accumulation: bool = field(metadata=HABIT)
    cuda_allow_tf32: bool = field(metadata=HABIT)
    cuda_cudnn_benchmark: bool = field(metadata=HABIT)
    ddp_timeout: int | None = field(metadata=FREE)  # minutes
    ddp_gradient_as_bucket_view: bool = field(metadata=FREE)
    ddp_static_graph: bool = field(metadata=FREE)

    def __post_init__(self) -> None:
        if self.mixed_precision not in PRECISIONS:  # from the launcher; argparse checks the rest
            raise OptionError(
                f"accelerate launch asks for mixed precision {self.mixed_precision}: give --mixed_precision "
                f"{', '.join(PRECISIONS)}"
            )
        check_at_least("--ddp_timeout", self.ddp_timeout, 1, "minutes that processes wait for each other")
        check_at_most("--ddp_timeout", self.ddp_timeout, MOST_MINUTES, "minutes; that is a year")


def add_accelerator_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `AcceleratorOptions`."""
    group = parser.add_argument_group("precision and processes")
    group.add_argument(
        "--mixed_precision",
        default="no",
        choices=PRECISIONS,
        help="autocast; when not given, the setting of accelerate launch, else no",
    )
    group.add_argument(
        "--fp16_accumulation",
        action="store_true",
        help="sum fp16 matrix products in fp16: faster on some GPUs, less exact",
    )
    group.add_argument(
        "--cuda_allow_tf32",
        action="store_true",
        help="compute float32 products and convolutions in TF32 on a CUDA device: faster, three digits "
        "instead of seven; bf16 and fp16 stay as they are",
    )
    group.add_argument(
        "--cuda_cudnn_benchmark",
        action="store_true",
        help="let cuDNN try its convolutions at each new size and take the fastest; runs may then differ in "
        "the last digits",
    )
    group.add_argument(
        "--ddp_timeout", type=int, help="minutes that processes wait for each other; default: a day"
    )
    group.add_argument(
        "--ddp_gradient_as_bucket_view",
        action="store_true",
        help="accepted; gradients are averaged without a DDP wrapper",
    )
    group.add_argument(
        "--ddp_static_graph",
        action="store_true",
        help="accepted; gradients are averaged without a DDP wrapper",
    )
