"""Options that trade speed, memory and exactness: attention back ends, fp8 weights, block swap, compilation. Declared for training
and for generation; what is not there yet is refused by name."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from modules.options import add_unsupported

NO_ATTENTION = "attention runs through torch's scaled_dot_product_attention; use --sdpa or leave the option out"
NO_FP8 = "weights are kept in the dtype of the file; leave the option out"
NO_SWAP = "the whole model stays on the device; leave the option out, --gradient_checkpointing saves memory in training"
NO_COMPILE = "the model runs uncompiled; leave the option out"

# accelerate's DynamoBackend, literal because option files import nothing heavy; lower case is accepted too
DYNAMO_BACKENDS = (
    "NO",
    "EAGER",
    "AOT_EAGER",
    "INDUCTOR",
    "AOT_TS_NVFUSER",
    "NVPRIMS_NVFUSER",
    "CUDAGRAPHS",
    "OFI",
    "FX2TRT",
    "ONNXRT",
    "TENSORRT",
    "AOT_TORCHXLA_TRACE_ONCE",
    "TORCHXLA_TRACE_ONCE",
    "TVM",
    "IPEX",
    "HPU_BACKEND",
    "NEURON",
)


@dataclass(frozen=True)
class TrainingSpeedOptions:
    """What training can choose today."""

    sdpa: bool  # the only back end there is, so the flag only says so

    @property
    def attention(self) -> str:
        """The mode of `modules.attention.attend`."""
        return "sdpa"


@dataclass(frozen=True)
class GenerationSpeedOptions:
    """What generation can choose today."""

    attn_mode: str
    fp16_accumulation: bool

    def __post_init__(self) -> None:
        if self.attn_mode not in {"torch", "sdpa"}:
            raise OptionError(
                f"--attn_mode {self.attn_mode} is not supported yet: {NO_ATTENTION.replace('--sdpa', '--attn_mode torch')}"
            )

    @property
    def attention(self) -> str:
        """The mode of `modules.attention.attend`."""
        return "sdpa"


def add_training_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `TrainingSpeedOptions`, and those that are refused."""
    group = parser.add_argument_group("attention")
    group.add_argument("--sdpa", action="store_true", help="torch's scaled_dot_product_attention (also when no other is chosen)")
    add_unsupported(group, "--flash_attn", reason=NO_ATTENTION, action="store_true", help="FlashAttention 2")
    add_unsupported(group, "--sage_attn", reason=NO_ATTENTION, action="store_true", help="SageAttention; it has no backward pass")
    add_unsupported(group, "--xformers", reason=NO_ATTENTION, action="store_true", help="xFormers")
    add_unsupported(group, "--flash3", reason=NO_ATTENTION, action="store_true", help="FlashAttention 3")
    add_unsupported(group, "--split_attn", reason=NO_ATTENTION, action="store_true", help="attention one sample at a time")
    group = parser.add_argument_group("memory and speed")
    add_unsupported(group, "--fp8_base", reason=NO_FP8, action="store_true", help="store the model's weights in fp8")
    add_unsupported(group, "--fp8_scaled", reason=NO_FP8, action="store_true", help="scale fp8 weights per tensor")
    add_unsupported(group, "--upcast_quantization", reason=NO_FP8, action="store_true", help="compute fp8 scales in float32")
    add_unsupported(group, "--blocks_to_swap", reason=NO_SWAP, type=int, help="keep this many blocks on the CPU")
    add_unsupported(group, "--img_in_txt_in_offloading", reason=NO_SWAP, action="store_true", help="keep input layers on the CPU")
    add_dynamo_arguments(group)


def add_dynamo_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the compile options of the trainers."""
    backends = (*DYNAMO_BACKENDS, *(name.lower() for name in DYNAMO_BACKENDS))
    add_unsupported(
        group,
        "--dynamo_backend",
        reason=NO_COMPILE,
        harmless=("no",),
        default="NO",
        choices=backends,
        metavar="BACKEND",
        help="torch.compile back end",
    )
    add_unsupported(
        group, "--dynamo_mode", reason=NO_COMPILE, choices=("default", "reduce-overhead", "max-autotune"), help="compile mode"
    )
    add_unsupported(group, "--dynamo_fullgraph", reason=NO_COMPILE, action="store_true", help="compile as one graph")
    add_unsupported(group, "--dynamo_dynamic", reason=NO_COMPILE, action="store_true", help="compile for changing shapes")


def add_generation_speed_arguments(parser: argparse.ArgumentParser, blocks_to_swap: int | None = 0) -> None:
    """Add the arguments of `GenerationSpeedOptions`, and those that are refused. blocks_to_swap: its default, which means none."""
    group = parser.add_argument_group("memory and speed")
    modes = ("flash", "flash2", "flash3", "torch", "sageattn", "xformers", "sdpa")
    group.add_argument(
        "--attn_mode", default="torch", choices=modes, help="attention back end; torch = sdpa, the only one supported yet"
    )
    group.add_argument(
        "--fp16_accumulation", action="store_true", help="sum fp16 matrix products in fp16: faster on some GPUs, less exact"
    )
    add_unsupported(group, "--fp8", reason=NO_FP8, action="store_true", help="store the model's weights in fp8")
    add_unsupported(group, "--fp8_scaled", reason=NO_FP8, action="store_true", help="store them in fp8 with a scale per tensor")
    add_unsupported(group, "--fp8_fast", reason=NO_FP8, action="store_true", help="multiply in fp8")
    add_unsupported(group, "--upcast_linear", reason=NO_FP8, action="store_true", help="compute fp8 layers in float32")
    add_unsupported(group, "--upcast_quantization", reason=NO_FP8, action="store_true", help="compute fp8 scales in float32")
    add_unsupported(
        group, "--blocks_to_swap", reason=NO_SWAP, type=int, default=blocks_to_swap, help="keep this many blocks on the CPU"
    )
    add_unsupported(group, "--compile", reason=NO_COMPILE, action="store_true", help="compile the blocks")
    add_unsupported(
        group,
        "--compile_args",
        reason=NO_COMPILE,
        nargs=4,
        metavar=("BACKEND", "MODE", "DYNAMIC", "FULLGRAPH"),
        default=["inductor", "default", "False", "False"],
        help="how to compile",
    )
