"""Whether and how torch compiles the blocks of the transformer."""

import argparse

from modules.options import add_unsupported

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


def add_training_compile_arguments(group: argparse._ArgumentGroup) -> None:
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


def add_generation_compile_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the compile options of the generation scripts."""
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
