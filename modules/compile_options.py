"""Options for compiling the blocks of the transformer with torch."""

from dataclasses import dataclass
from typing import Any

from modules.errors import OptionError
from modules.options import FREE, HABIT, NO_PIXELS, Options, option, unsupported

# accelerate's DynamoBackend, literal because option files import nothing heavy; lower case is accepted too
DYNAMO_BACKENDS = (
    "NO", "EAGER", "AOT_EAGER", "INDUCTOR", "AOT_TS_NVFUSER", "NVPRIMS_NVFUSER", "CUDAGRAPHS", "OFI",
    "FX2TRT", "ONNXRT", "TENSORRT", "AOT_TORCHXLA_TRACE_ONCE", "TORCHXLA_TRACE_ONCE", "TVM", "IPEX",
    "HPU_BACKEND", "NEURON",
)  # fmt: skip
INDUCTOR = "inductor"  # torch's own compiler, which writes Triton kernels for a GPU and C++ for a CPU
DEFAULT_MODE = "default"
MODES = (DEFAULT_MODE, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_ARGS = ("BACKEND", "MODE", "DYNAMIC", "FULLGRAPH")
GENERATION_ARGS = (INDUCTOR, DEFAULT_MODE, "False", "False")
TRAINING_ARGS = (INDUCTOR, DEFAULT_MODE, "auto", "False")
SWITCHES = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclass(frozen=True)
class Compilation:
    """Settings for torch.compile of transformer blocks. Imports nothing heavy, because options use it."""

    backend: str = INDUCTOR  # name of a torch backend
    mode: str = DEFAULT_MODE
    # None: a size becomes dynamic at its second value; True: all sizes are dynamic; False: no size is dynamic
    dynamic: bool | None = None
    fullgraph: bool = False  # uncompilable parts are errors; False: Python runs them
    variants: int | None = None  # recompilation limit of a list of blocks; None: enough for all

    def __post_init__(self) -> None:
        """Raise OptionError if the mode is unknown, or if mode and backend cannot be used in this program."""
        if self.mode not in MODES:
            raise OptionError(
                f"--compile_args: the mode {self.mode} is unknown: use one of {', '.join(MODES)}"
            )
        if self.mode != DEFAULT_MODE and self.backend != INDUCTOR:
            raise OptionError(
                f"the compile mode {self.mode} needs inductor; the backend {self.backend} has no modes. Use "
                f"{DEFAULT_MODE}"
            )
        if self.mode == "reduce-overhead" or self.backend == "cudagraphs":
            raise OptionError(
                f"{self.backend} {self.mode} records CUDA graphs, which need weights at fixed addresses, "
                "but here all blocks share their code: no GPU has produced correct results. Use inductor "
                "default"
            )


_COMPILE = (
    "compile the transformer's blocks: the first step takes longer, the others are faster; needs Triton on a "
    "GPU, a C++ compiler on a CPU"
)
_ARGS = (
    "how to compile, default {}; DYNAMIC: auto compiles once more if sizes change, true makes all sizes "
    "dynamic at once, false compiles for each size"
)


def _args_option(default: tuple[str, ...]) -> Any:
    """Return the field of --compile_args with its default words."""
    return option(
        _ARGS.format(" ".join(default)),
        default=default,
        nargs=4,
        metavar=COMPILE_ARGS,
        needs="compile",
        facts=FREE,
    )


class CompileOptions(Options):
    """Options for torch.compile of blocks: the four words of --compile_args, or one option for each word."""

    compile: bool = option(_COMPILE, often=True, facts=HABIT)
    compile_args: tuple[str, ...] = _args_option(GENERATION_ARGS)
    compile_backend: str = option(
        "the same as BACKEND of --compile_args", default=INDUCTOR, needs="compile", facts=FREE
    )
    compile_mode: str = option(
        "the same as MODE of --compile_args; reduce-overhead is rejected",
        default=DEFAULT_MODE,
        choices=MODES,
        needs="compile",
        facts=FREE,
    )
    compile_dynamic: str | None = option(
        "the same as DYNAMIC of --compile_args",
        choices=("true", "false", "auto"),
        needs="compile",
        facts=FREE,
    )
    compile_fullgraph: bool = option("the same as FULLGRAPH of --compile_args", needs="compile", facts=FREE)
    compile_cache_size_limit: int | None = option(
        "how many variants of a block (sizes, gradients on or off) are compiled before the rest runs "
        "uncompiled; default: at least 32",
        minimum=1,
        hint="omit it for enough",
        needs="compile",
        facts={**NO_PIXELS, **FREE},
    )

    def compilation(self, default: tuple[str, ...]) -> Compilation:
        """Return the settings for compiling blocks.

        Args:
            default: The default of --compile_args.

        Raises:
            OptionError: If a word is unknown, or if two options set the same value.
        """
        settings = dict(zip(COMPILE_ARGS, self.compile_args, strict=True))
        settings |= self._read_separate_options(default)  # these take precedence
        dynamic = settings["DYNAMIC"]
        is_dynamic = None
        if dynamic.strip().lower() not in {"auto", "none"}:
            is_dynamic = _switch("DYNAMIC", dynamic, "true, false or auto")
        return Compilation(
            backend=settings["BACKEND"].lower(),
            mode=settings["MODE"].lower(),
            dynamic=is_dynamic,
            fullgraph=_switch("FULLGRAPH", settings["FULLGRAPH"], "true or false"),
            variants=self.compile_cache_size_limit,
        )

    def _read_separate_options(self, default: tuple[str, ...]) -> dict[str, str]:
        """Return the values of --compile_backend, --compile_mode, ..., by their names in `COMPILE_ARGS`."""
        # `default` is the value of --compile_args if it is not typed.
        settings: dict[str, str] = {}
        if self.compile_backend != INDUCTOR:
            settings["BACKEND"] = self.compile_backend
        if self.compile_mode != DEFAULT_MODE:
            settings["MODE"] = self.compile_mode
        if self.compile_dynamic is not None:
            settings["DYNAMIC"] = self.compile_dynamic
        if self.compile_fullgraph:
            settings["FULLGRAPH"] = "true"
        if settings and self.compile_args != default:
            raise OptionError(
                f"--compile_args and --compile_{next(iter(settings)).lower()} both set how to compile: pass "
                "either all four values to --compile_args, or an option for each"
            )
        return settings


class TrainingCompileOptions(CompileOptions):
    """Options for compiling blocks in training: the options of generation, and accelerate's."""

    dynamo_backend: str = option(
        "compile the blocks with this torch.compile back end, as accelerate names it: inductor, eager, ...; "
        "no: do not compile",
        default="NO",
        choices=(*DYNAMO_BACKENDS, *(name.lower() for name in DYNAMO_BACKENDS)),
        metavar="BACKEND",
        facts=HABIT,
    )
    dynamo_mode: str | None = option(
        "compile mode of inductor; max-autotune tries more kernels and starts slowly, reduce-overhead "
        "is rejected",
        choices=("default", "reduce-overhead", "max-autotune"),
        facts=FREE,
    )
    dynamo_fullgraph: bool = option("stop if a part of a block cannot be compiled", facts=FREE)
    dynamo_dynamic: bool = option(
        "make all sizes dynamic from the start; without it a size becomes dynamic at its second value",
        facts=FREE,
    )
    compile_args: tuple[str, ...] = _args_option(TRAINING_ARGS)

    def __post_init__(self) -> None:
        has_backend = self.dynamo_backend.lower() != "no"
        has_settings = bool(self.dynamo_mode or self.dynamo_fullgraph or self.dynamo_dynamic)
        if self.compile and (has_backend or has_settings):
            raise OptionError(
                "--compile and --dynamo_backend (here or given to accelerate launch) both set how to "
                "compile. Pass either --compile with --compile_args, or the --dynamo_ options"
            )
        if has_settings and not has_backend:
            raise OptionError(
                "--dynamo_mode, --dynamo_fullgraph and --dynamo_dynamic do nothing without --dynamo_backend: "
                "add --dynamo_backend inductor"
            )
        _ = self.choice

    @property
    def choice(self) -> Compilation | None:
        """Return the settings for torch.compile; None if the blocks are not compiled."""
        if self.compile:
            return self.compilation(TRAINING_ARGS)
        backend = self.dynamo_backend.lower()
        if backend == "no":
            return None
        return Compilation(
            backend,
            self.dynamo_mode or DEFAULT_MODE,
            True if self.dynamo_dynamic else None,
            self.dynamo_fullgraph,
        )


class GenerationCompileOptions(CompileOptions):
    """Options for compiling the blocks in generation."""

    optimized_compile = unsupported(
        "pass --compile, which compiles whole blocks, attention and positions with them, once for all blocks "
        "of a list",
        "compile attention, positions and embeddings only",
    )

    def __post_init__(self) -> None:
        _ = self.choice

    @property
    def choice(self) -> Compilation | None:
        """Settings for compiling the blocks; None if --compile is off."""
        return self.compilation(GENERATION_ARGS) if self.compile else None


def _switch(name: str, text: str, choices: str) -> bool:
    value = SWITCHES.get(text.strip().lower())
    if value is None:
        raise OptionError(f"--compile_args: {name} is {text!r}, use {choices}")
    return value
