"""torch.compile for the blocks of a transformer, applied to it from outside.

Each block's `forward` is compiled in place, not the whole network: the blocks of a list share their code and
differ only in their weights, which are inputs of the compiled code, so a list of forty blocks costs one
compilation. It starts in seconds and is independent of the code around the blocks. A block is recompiled if
its structure differs (an input that needs no gradient, gradients on or off, a batch of one, LoRA on other
layers), and for new sizes according to `Compilation.dynamic`. In a U-Net, only the transformer layers are
compiled, for all sizes at once.
"""

import logging
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from modules.compile_options import INDUCTOR, Compilation
from modules.errors import OptionError
from modules.private_torch import (
    dynamo,
    has_cpp_compiler,
    has_triton,
    has_triton_package,
    shape_config,
)
from protocols.family import DitSpec

logger = logging.getLogger(__name__)

# variants of a part before torch runs it uncompiled; torch's default of 8 is too low for buckets and tiles
RECOMPILE_LIMIT = 32
# the same limit if each size is compiled separately: U-Net blocks of all widths share their code
VARIANTS_PER_SIZE = 256
# CUDA graphs need weights at fixed addresses, but all blocks share their code
NO_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs"}


def compile_blocks(dit: nn.Module, spec: DitSpec, choice: Compilation) -> DitSpec:
    """Compile each block's current `forward`. Call it after adding LoRAs and before checkpointing.

    Compilation runs when a block is first called, and its seconds are logged before the next pass. Call
    `check_compilation` before.

    Returns:
        The spec for checkpointing and other wrappers: with it, a compiled block is recomputed as a whole.
    """
    compiled_modules: Sequence[nn.Module] = [*chain.from_iterable(spec.blocks(dit).values())]
    outer_spec = replace(spec, checkpointed_layers_attribute="")
    if spec.compiled_layers_attribute and choice.dynamic is False:  # whole blocks, a variant for each size
        choice = replace(choice, variants=choice.variants or VARIANTS_PER_SIZE)
    elif spec.compiled_layers_attribute:  # compile layers of the blocks one by one, with dynamic sizes
        outer_spec = spec
        compiled_modules = [
            layer
            for block in compiled_modules
            for layer in getattr(block, spec.compiled_layers_attribute, ())
        ]
        choice = replace(choice, dynamic=True)
    compile_each(compiled_modules, choice)
    dit.register_forward_pre_hook(_find_clock().report)
    logger.info("The blocks are compiled with %s at their first use, which takes some time.", choice.backend)
    return outer_spec


class CompileClock:
    """Adds up and logs the time spent in torch.compile, which compiles each part at its first call."""

    def __init__(self) -> None:
        """Start with no compilation time."""
        self._begun = 0.0
        self._seconds = 0.0

    def start(self, _: object) -> None:
        """Record the time at which a compilation starts; torch calls this."""
        self._begun = time.perf_counter()

    def stop(self, _: object) -> None:
        """Add the seconds of a compilation that has ended; torch calls this."""
        self._seconds += time.perf_counter() - self._begun

    def report(self, *_: object) -> None:
        """Log the compilation time since the last report, if any; runs as a hook before each network pass."""
        if self._seconds:
            logger.info("Compiling took %.1f s.", self._seconds)
            self._seconds = 0.0


def _find_clock() -> CompileClock:
    """Return the process's only compile clock; the first call registers it with torch."""
    callbacks = dynamo().callback_handler
    for callback in callbacks.start_callbacks:
        owner = getattr(callback, "__self__", None)
        if isinstance(owner, CompileClock):
            return owner
    clock = CompileClock()
    callbacks.register_start_callback(clock.start)
    callbacks.register_end_callback(clock.stop)
    return clock


def compile_each(parts: Iterable[nn.Module], choice: Compilation) -> None:
    """Compile the current `forward` of each part of a network in place."""
    config = dynamo().config
    config.recompile_limit = choice.variants or max(config.recompile_limit, RECOMPILE_LIMIT)
    if choice.dynamic:
        # else torch would take a length that equals a width for that width, which is a constant
        shape_config().use_duck_shape = False
    mode = NO_GRAPHS.get(choice.mode, choice.mode)  # without CUDA graphs
    for part in parts:
        part.forward = torch.compile(
            part.forward,
            backend=choice.backend,
            mode=mode,
            dynamic=choice.dynamic,
            fullgraph=choice.fullgraph,
        )


def check_compilation(choice: Compilation | None, device: torch.device) -> None:
    """Raise OptionError if blocks cannot be compiled for this device, before anything large is loaded."""
    if choice is None:
        return
    if not dynamo().is_dynamo_supported():
        raise OptionError(
            f"torch {torch.__version__} does not compile with Python {sysconfig.get_python_version()}: omit "
            "--compile and --dynamo_backend"
        )
    # any registered backend is accepted; the message names only two of the debugging backends
    if choice.backend not in torch.compiler.list_backends(exclude_tags=()):
        backend_names = ", ".join(sorted({*torch.compiler.list_backends(), "eager", "aot_eager"}))
        raise OptionError(
            f"torch.compile has no backend {choice.backend} here: install the package that provides it, or "
            f"use one of {backend_names}"
        )
    if choice.backend == INDUCTOR:
        missing_tools = missing_for_inductor(device)
        if missing_tools:
            raise OptionError(
                f"compiling with inductor for {device.type} needs {missing_tools}. Or omit --compile and "
                "--dynamo_backend"
            )


def missing_for_inductor(device: torch.device) -> str:
    """Return the parts of torch's compiler that are missing, and how to install them; "" if none is."""
    if device.type == "mps":
        return ""  # Metal's compiler is part of the system
    if device.type == "cpu":
        return _explain_missing_headers() if has_cpp_compiler() else _explain_missing_cpp_compiler()
    # The parts of Triton, which compiles for GPUs, that are missing; "" if none is
    if not has_triton_package():
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"Triton: pip install {package}, in the version that fits torch {torch.__version__}"
    if not has_triton():
        return "a GPU that Triton supports (NVIDIA from compute capability 7.0 on)"
    if sys.platform == "win32":
        return ""  # triton-windows includes a compiler
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang", "cc"))):
        return "a C compiler, which Triton needs to build its launchers: install gcc or clang"
    return _explain_missing_headers()


def _explain_missing_cpp_compiler() -> str:
    if sys.platform == "win32":
        return (
            "Microsoft's C++ compiler: install the Build Tools for Visual Studio and start from "
            "their command prompt"
        )
    return "a C++ compiler: install g++ or clang++"


def _explain_missing_headers() -> str:
    if Path(sysconfig.get_path("include"), "Python.h").is_file():
        return ""
    return "the header files of Python: install python3-dev, or a Python that includes them"
