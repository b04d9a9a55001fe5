"""Options of mixed precision and several processes."""

from modules.errors import OptionError
from modules.options import FREE, HABIT, Options, option

PRECISIONS = ("no", "fp16", "bf16")


class AcceleratorOptions(Options, title="precision and processes"):
    """Options of the precision and of several processes.

    Without --mixed_precision this is the launcher's setting.
    """

    mixed_precision: str = option(
        "autocast; when not given, the setting of accelerate launch, else no",
        default="no",
        choices=PRECISIONS,
        often=True,
        facts=HABIT,
    )
    fp16_accumulation: bool = option(
        "sum fp16 matrix products in fp16: faster on some GPUs, less exact", facts=HABIT
    )
    cuda_allow_tf32: bool = option(
        "compute float32 products and convolutions in TF32 on a CUDA device: faster, three digits "
        "instead of seven; bf16 and fp16 stay as they are",
        facts=HABIT,
    )
    cuda_cudnn_benchmark: bool = option(
        "let cuDNN try its convolutions at each new size and take the fastest; runs may then differ in "
        "the last digits",
        facts=HABIT,
    )
    ddp_timeout: int | None = option(
        "minutes that processes wait for each other; default: a day",
        least=1,
        most=525_600,
        hint="minutes; the most is a year",
        facts=FREE,
    )
    ddp_gradient_as_bucket_view: bool = option(
        "accepted; gradients are averaged without a DDP wrapper", facts=FREE
    )
    ddp_static_graph: bool = option("accepted; gradients are averaged without a DDP wrapper", facts=FREE)

    def __post_init__(self) -> None:
        if self.mixed_precision not in PRECISIONS:  # from the launcher; argparse checks the rest
            raise OptionError(
                f"accelerate launch asks for mixed precision {self.mixed_precision}: give --mixed_precision "
                f"{', '.join(PRECISIONS)}"
            )
