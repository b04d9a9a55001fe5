"""The rows of benchmarks/gpu.py: models of real size, and the options of each as a user would type them."""

from dataclasses import dataclass

from benchmarks.flops import Work, hunyuan_work, wan_work
from hunyuan_model.configs import HunyuanVideoConfig
from wan.configs import TASKS, WanConfig

CHECKPOINTED = ("--gradient_checkpointing",)
FP8 = ("--fp8_base", "--fp8_scaled")
OFFLOADED = ("--gradient_checkpointing_cpu_offload",)
TRAIN_COMPILED = ("--compile",)
FAST = (*CHECKPOINTED, *TRAIN_COMPILED, *FP8, "--fp8_fast")
GENERATE_COMPILED = ("--compile", "--compile_args", "inductor", "default", "auto", "False")


@dataclass(frozen=True)
class Size:
    """Size of a clip in pixels."""

    width: int
    height: int
    frames: int

    @property
    def tokens(self) -> int:
        """Number of video tokens: the VAE's stride of 4 x 8 x 8 and patches of 2 x 2."""
        return ((self.frames - 1) // 4 + 1) * (self.height // 16) * (self.width // 16)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Model:
    """A released model. `manifest`: the list of its tensors in tests/data/checkpoints."""

    name: str
    manifest: str
    task: str | None  # for Wan only
    swappable: int  # largest value of --blocks_to_swap

    @property
    def is_wan(self) -> bool:
        return self.task is not None


@dataclass(frozen=True)
class Row:
    """A line of the table. options: of the family's training or generation script."""

    name: str
    model: Model
    size: Size
    options: tuple[str, ...]
    generates: bool = False
    text_tokens: int = 256  # in a prompt, if the family does not pad it


WAN_14B = Model("Wan 14B T2V", "wan2.1-t2v-14b", "t2v-14B", 39)
WAN_14B_I2V = Model("Wan 14B I2V", "wan2.1-i2v-14b", "i2v-14B", 39)
WAN_1_3B = Model("Wan 1.3B T2V", "wan2.1-t2v-1.3b", "t2v-1.3B", 29)
HUNYUAN = Model("HunyuanVideo T2V", "hunyuanvideo-t2v-dit", None, 38)
SMALL, WIDE = Size(832, 480, 81), Size(960, 544, 129)
MOST = ("--blocks_to_swap", "38")  # 95 % of 40 blocks
THREE_QUARTERS = ("--blocks_to_swap", "30")

ROWS = (
    Row("bf16, compiled", WAN_14B, SMALL, (*CHECKPOINTED, *TRAIN_COMPILED)),
    Row("fp8 products, compiled", WAN_14B, SMALL, FAST),
    Row("bf16, 75 % swapped, compiled", WAN_14B, SMALL, (*CHECKPOINTED, *TRAIN_COMPILED, *THREE_QUARTERS)),
    Row("fp8, 95 % swapped, offload", WAN_14B, SMALL, (*CHECKPOINTED, *OFFLOADED, *FP8, *MOST)),
    Row("bf16, compiled, 5 steps", WAN_14B_I2V, SMALL, GENERATE_COMPILED, generates=True),
    Row(
        "fp8 products, compiled, 5 steps",
        WAN_14B_I2V,
        SMALL,
        (*GENERATE_COMPILED, "--fp8_scaled", "--fp8_fast"),
        generates=True,
    ),
    Row("bf16, eager", WAN_14B, SMALL, CHECKPOINTED),
    Row(
        "fp8 products, 75 % swapped, compiled",
        WAN_14B,
        SMALL,
        (*CHECKPOINTED, *TRAIN_COMPILED, *FP8, "--fp8_fast", *THREE_QUARTERS),
    ),
    Row("bf16, compiled", WAN_1_3B, SMALL, (*CHECKPOINTED, *TRAIN_COMPILED)),
    Row("bf16, compiled", HUNYUAN, WIDE, (*CHECKPOINTED, *TRAIN_COMPILED)),
    Row("fp8 products, compiled", HUNYUAN, WIDE, FAST),
)


def work_of(row: Row, config: WanConfig | HunyuanVideoConfig) -> Work:
    """Return the operations of one forward pass of a row's model."""
    if isinstance(config, WanConfig):
        return wan_work(config, row.size.tokens)
    return hunyuan_work(config, row.size.tokens, row.text_tokens)


def sampling_steps(model: Model) -> int:
    """Return the default number of steps for a video of that model."""
    return TASKS[model.task].steps if model.task is not None else 50
