"""The rows of benchmarks/gpu.py, the most important first; their results, goals and tables.

A row is a model and options as a user types them.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.atomic_write import write_text

TRAINING, GENERATION, LATENTS, TEXTS, LOADING = "training", "generation", "latents", "texts", "loading"
GROUPS = ("goals", "training", "generation", "caching", "loading")
CACHING = (LATENTS, TEXTS)

CHECKPOINTED = ("--gradient_checkpointing",)
FP8 = ("--fp8_base", "--fp8_scaled")
FP8_PRODUCTS = (*FP8, "--fp8_fast")
INT8 = ("--convrot_int8",)
NF4 = ("--nf4_base",)
OFFLOADED = ("--gradient_checkpointing_cpu_offload",)
COMPILED = ("--compile",)
KEPT = ("--gradient_checkpointing_keep", "attention")
SWAP_MOST = ("--blocks_to_swap", "38")  # 95 % of 40 blocks
THREE_QUARTERS = ("--blocks_to_swap", "30")
H3_SWAP = ("--blocks_to_swap", "48")  # of 50
FLUX_3_TOKENS = 320  # a multiple of 80, as its texts have
GENERATE_COMPILED = ("--compile", "--compile_args", "inductor", "default", "auto", "False")
GENERATE_FP8 = ("--fp8_scaled", "--fp8_fast")


@dataclass(frozen=True)
class Model:
    """A released model. `manifest`: the list of its tensors in tests/data/checkpoints."""

    name: str
    family: str  # in benchmarks/gpu_steps.py
    manifest: str
    words: tuple[str, ...] = ()  # options of both scripts that say which model it is
    high: str = ""  # manifest of the expert for much noise, if generation takes two
    vae: str = ""  # manifest of the VAE, if the family reads the size of latents from it


@dataclass(frozen=True)
class Size:
    """Size of a clip or image in pixels."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


@dataclass(frozen=True)
class Row:
    """A line of a table. `options` are those of the family's training or generation script."""

    name: str  # stable: of --rows and in result files
    kind: str
    model: Model
    size: Size
    about: str  # the options in words
    options: tuple[str, ...] = ()
    text_tokens: int = 256  # of a prompt, if the family does not pad it
    is_goal: bool = False
    seconds: float = 0.0  # that a run may take, a guess, if no operations are counted
    steps: int = 3  # of a generation that are timed
    card: float = 0.0  # GiB of the card that the row pretends to run on; 0: all that there is
    planned: float = 0.0  # bytes that the plan predicts for the device; 0: to be planned when it is measured

    @property
    def group(self) -> str:
        """Group of rows, for --group."""
        return "caching" if self.kind in CACHING else self.kind


WAN_14B = Model("Wan2.1 14B T2V", "wan", "wan2.1-t2v-14b", ("--task", "t2v-14B"))
WAN_14B_I2V = Model("Wan2.1 14B I2V", "wan", "wan2.1-i2v-14b", ("--task", "i2v-14B"))
WAN_1_3B = Model("Wan2.1 1.3B T2V", "wan", "wan2.1-t2v-1.3b", ("--task", "t2v-1.3B"))
WAN22_14B = Model("Wan2.2 14B T2V, one expert", "wan", "wan2.2-t2v-a14b", ("--task", "t2v-A14B"))
WAN22_BOTH = Model(
    *("Wan2.2 14B T2V, two experts", "wan", "wan2.2-t2v-a14b", ("--task", "t2v-A14B"), "wan2.2-t2v-a14b")
)
WAN22_5B = Model("Wan2.2 5B", "wan", "wan2.2-ti2v-5b", ("--task", "ti2v-5B"))
HUNYUAN = Model("HunyuanVideo", "hunyuan_video", "hunyuanvideo-t2v-dit")
FRAMEPACK = Model("FramePack", "framepack", "framepack-dit")
FLUX = Model("FLUX.1 dev", "flux", "flux1-dev-dit")
CHROMA = Model("Chroma", "flux", "chroma1-dit", ("--model_type", "chroma"))
HUNYUAN_IMAGE = Model("HunyuanImage-2.1", "hunyuan_image", "hunyuanimage2.1-dit")
LUMINA = Model("Lumina-Image-2.0", "lumina", "lumina2-dit")
QWEN_IMAGE = Model("Qwen-Image", "qwen_image", "qwen-image-dit")
QWEN_IMAGE_21 = Model("Qwen-Image-2.1", "qwen_image_21", "qwen-image-2.1-dit-diffusers")
FLUX_2 = Model("FLUX.2 dev", "flux_2", "flux2-dev-dit", ("--model_version", "dev"))
FLUX_3 = Model("FLUX 3 Klein base", "flux_3", "flux3-klein-base-dit")
KREA_2 = Model("Krea 2", "krea2", "krea2-dit")
Z_IMAGE = Model("Z-Image", "z_image", "z-image-dit")
MOSS_IMAGE = Model("MOSS-Image Base", "moss_image", "moss-image-dit-comfy")
H3 = Model("MiniMax-H3", "minimax_h3", "minimax-h3-dit")
SDXL = Model("Stable Diffusion XL", "sdxl", "sdxl-base-1.0")
SD_1_5 = Model("Stable Diffusion 1.5", "sd1", "sd1.5")
LTX_2 = Model("LTX-2.3", "ltx_2", "ltx2.3-dit", vae="ltx2.3-video-vae")
WAN_VAE = Model("Wan2.1 VAE", "wan", "wan2.1-vae")
WAN22_VAE = Model("Wan2.2 5B VAE", "wan", "wan2.2-vae")
HUNYUAN_VAE = Model("HunyuanVideo VAE", "hunyuan_video", "hunyuanvideo-vae")
UMT5 = Model("umT5", "wan", "umt5-xxl-enc-wan")
LLAMA = Model("Llama of HunyuanVideo", "hunyuan_video", "llava-llama3-single")

LTX_CLIP = Size(768, 512, 49)
H3_CLIP = Size(832, 480, 124)  # five seconds, with sound
SHORT = Size(512, 512, 33)  # 9,216 tokens: products weigh more than attention
SMALL, WIDE, HD = Size(832, 480, 81), Size(960, 544, 129), Size(1280, 704, 121)
# tokens of rows that other programs publish: SimpleTuner's crops are square whatever their label says
RIVAL_CLIP, RIVAL_LTX_CLIP = Size(480, 480, 81), Size(720, 720, 49)
SECTION = Size(832, 480, 37)  # the start image and the 36 frames of a section of FramePack
SQUARE, LARGE = Size(1024, 1024), Size(2048, 2048)
SD_SQUARE = Size(512, 512)
NONE = Size(0, 0)


def _train(name: str, model: Model, size: Size, about: str, *options: str, **more: object) -> Row:
    return Row(name, TRAINING, model, size, about, (*CHECKPOINTED, *options), **more)  # type: ignore[arg-type]


def _generate(name: str, model: Model, size: Size, about: str, *options: str, **more: object) -> Row:
    return Row(name, GENERATION, model, size, about, options, **more)  # type: ignore[arg-type]


def _wan(name: str, about: str, *options: str, is_goal: bool = False) -> Row:
    return _train(f"wan14b-{name}", WAN_14B, SMALL, about, *options, is_goal=is_goal)


ROWS = (
    _wan("bf16-compiled", "bf16, compiled", *COMPILED, is_goal=True),
    _wan("fp8-products-compiled", "fp8 products, compiled", *COMPILED, *FP8_PRODUCTS, is_goal=True),
    _wan("bf16-swap30-compiled", "bf16, swap 30, compiled", *COMPILED, *THREE_QUARTERS, is_goal=True),
    _wan("bf16", "bf16, eager", is_goal=True),
    _generate("gen-wan14b-i2v", WAN_14B_I2V, SMALL, "bf16, compiled", *GENERATE_COMPILED),
    _generate(
        "gen-wan14b-i2v-fp8", WAN_14B_I2V, SMALL, "fp8 products, compiled", *GENERATE_COMPILED, *GENERATE_FP8
    ),
    Row("load-bf16", LOADING, WAN_1_3B, NONE, "bf16 to the device", seconds=60),
    Row("load-fp8", LOADING, WAN_1_3B, NONE, "rounded to fp8 on the device", FP8, seconds=60),
    Row(
        *("load-pinned", LOADING, WAN_1_3B, NONE, "bf16, swap 29: to pinned host memory"),
        ("--blocks_to_swap", "29"),
        seconds=60,
    ),
    Row("cache-wan-vae", LATENTS, WAN_VAE, SMALL, "bfloat16", seconds=45),
    Row("cache-hunyuan-vae", LATENTS, HUNYUAN_VAE, SMALL, "float16", seconds=60),
    Row("cache-umt5", TEXTS, UMT5, NONE, "texts of 256 tokens", seconds=35),
    Row("cache-llama", TEXTS, LLAMA, NONE, "texts of 256 tokens behind the template", seconds=40),
    _train("wan14b-short-bf16-compiled", WAN_14B, SHORT, "bf16, compiled", *COMPILED),
    _train(
        *("wan14b-short-fp8-products-compiled", WAN_14B, SHORT, "fp8 products, compiled"),
        *(*COMPILED, *FP8_PRODUCTS),
    ),
    _train(
        *("wan14b-short-bf16-swap30-compiled", WAN_14B, SHORT, "bf16, swap 30, compiled"),
        *(*COMPILED, *THREE_QUARTERS),
    ),
    _train("wan14b-short-int8-compiled", WAN_14B, SHORT, "int8 (ConvRot), compiled", *COMPILED, *INT8),
    _train("hunyuan-bf16-compiled", HUNYUAN, WIDE, "bf16, compiled", *COMPILED),
    _train("framepack-bf16-compiled", FRAMEPACK, SECTION, "bf16, compiled", *COMPILED),
    _train("wan1.3b-bf16-compiled", WAN_1_3B, SMALL, "bf16, compiled", *COMPILED),
    _train("flux-bf16-compiled", FLUX, SQUARE, "bf16, compiled", *COMPILED, text_tokens=512),
    _generate("gen-framepack", FRAMEPACK, SECTION, "bf16, eager, one section"),
    _generate("gen-flux", FLUX, SQUARE, "bf16, eager", text_tokens=512, steps=8),
    _wan("int8-compiled", "int8 (ConvRot), compiled", *COMPILED, *INT8),
    _train(
        "wan14b-nf4-12gib",
        WAN_14B,
        SMALL,
        "nf4, swap 34, offload, rank 16, on a card of 12 GiB",
        *NF4,
        *OFFLOADED,
        *("--blocks_to_swap", "34", "--network_dim", "16", "--optimizer_type", "adamw8bit"),
        card=12,
    ),
    _train("qwen-image-bf16", QWEN_IMAGE, SQUARE, "bf16, eager"),
    _train("krea2-bf16", KREA_2, SQUARE, "bf16, eager"),
    _train("ltx2.3-bf16", LTX_2, LTX_CLIP, "bf16, eager"),
    _train("krea2-bf16-compiled", KREA_2, SQUARE, "bf16, compiled", *COMPILED),
    _train("qwen-image-bf16-compiled", QWEN_IMAGE, SQUARE, "bf16, compiled", *COMPILED),
    _train("ltx2.3-rival-bf16-compiled", LTX_2, RIVAL_LTX_CLIP, "bf16, compiled", *COMPILED),
    _train("wan14b-rival-bf16-compiled", WAN_14B, RIVAL_CLIP, "bf16, compiled", *COMPILED),
    _train("wan1.3b-rival-bf16-compiled", WAN_1_3B, RIVAL_CLIP, "bf16, compiled", *COMPILED),
    _train("z-image-bf16-compiled", Z_IMAGE, SQUARE, "bf16, compiled", *COMPILED),
    _train("z-image-512-bf16", Z_IMAGE, SD_SQUARE, "bf16, eager"),
    _train("lumina-512-bf16", LUMINA, SD_SQUARE, "bf16, eager"),
    _train("z-image-bf16", Z_IMAGE, SQUARE, "bf16, eager"),
    _train("flux-int8", FLUX, SQUARE, "int8 (ConvRot), eager", *INT8, text_tokens=512),
    _train("flux-nf4", FLUX, SQUARE, "nf4, eager", *NF4, text_tokens=512),
    _train("qwen-image-nf4", QWEN_IMAGE, SQUARE, "nf4, eager", *NF4),
    _train("krea2-nf4", KREA_2, SQUARE, "nf4, eager", *NF4),
    _train("krea2-int8-compiled", KREA_2, SQUARE, "int8 (ConvRot), compiled", *COMPILED, *INT8),
    _train("ltx2.3-nf4", LTX_2, LTX_CLIP, "nf4, eager", *NF4),
    _train(
        *("h3-bf16-swap48-16gib", H3, H3_CLIP, "bf16, swap 48, offload, on a card of 16 GiB", *H3_SWAP),
        *OFFLOADED,
        card=16,
    ),
    _train(
        *("h3-int8-swap48-16gib", H3, H3_CLIP, "int8 (ConvRot), swap 48, offload, on a card of 16 GiB"),
        *(*INT8, *H3_SWAP, *OFFLOADED),
        card=16,
    ),
    _train("h3-int8-compiled", H3, H3_CLIP, "int8 (ConvRot), compiled", *COMPILED, *INT8),
    _generate("gen-h3-swap48-16gib", H3, H3_CLIP, "bf16, swap 48, on a card of 16 GiB", *H3_SWAP, card=16),
    _generate("gen-h3-int8", H3, H3_CLIP, "int8 (ConvRot), eager", *INT8),
    _generate("gen-h3", H3, H3_CLIP, "bf16, eager"),
    _train("sdxl-bf16", SDXL, SQUARE, "bf16, eager"),
    _train("sdxl-fp8-weights", SDXL, SQUARE, "fp8 weights, eager", "--fp8_base"),
    _train("sdxl-bf16-12gib", SDXL, SQUARE, "bf16, eager, on a card of 12 GiB", card=12),
    _train("sdxl-fp8-weights-8gib", SDXL, SQUARE, "fp8 weights, on a card of 8 GiB", "--fp8_base", card=8),
    _train("sdxl-bf16-compiled", SDXL, SQUARE, "bf16, compiled", *COMPILED),
    Row("sdxl-bf16-kept", TRAINING, SDXL, SQUARE, "bf16, eager, without checkpointing"),
    _train("sd1.5-bf16", SD_1_5, SD_SQUARE, "bf16, eager"),
    Row("sd1.5-bf16-kept", TRAINING, SD_1_5, SD_SQUARE, "bf16, eager, without checkpointing"),
    _train("flux3-bf16", FLUX_3, SQUARE, "bf16, eager", text_tokens=FLUX_3_TOKENS),
    _train(
        *("flux3-int8-compiled", FLUX_3, SQUARE, "int8 (ConvRot), compiled", *COMPILED, *INT8),
        text_tokens=FLUX_3_TOKENS,
    ),
    _train("qwen-image-2.1-bf16", QWEN_IMAGE_21, SQUARE, "bf16, eager"),
    _train(
        *("qwen-image-2.1-int8-compiled", QWEN_IMAGE_21, SQUARE, "int8 (ConvRot), compiled"),
        *(*COMPILED, *INT8),
    ),
    _train("moss-image-bf16", MOSS_IMAGE, SQUARE, "bf16, eager"),
    _train("moss-image-int8-compiled", MOSS_IMAGE, SQUARE, "int8 (ConvRot), compiled", *COMPILED, *INT8),
    _generate("gen-flux3", FLUX_3, SQUARE, "bf16, eager", text_tokens=FLUX_3_TOKENS, steps=6),
    _generate("gen-flux3-int8", FLUX_3, SQUARE, "int8, eager", *INT8, text_tokens=FLUX_3_TOKENS, steps=6),
    _generate("gen-qwen-image-2.1", QWEN_IMAGE_21, SQUARE, "bf16, eager", steps=6),
    _generate("gen-qwen-image-2.1-int8", QWEN_IMAGE_21, SQUARE, "int8 (ConvRot), eager", *INT8, steps=6),
    _generate("gen-moss-image", MOSS_IMAGE, SQUARE, "bf16, eager", steps=6),
    _generate("gen-wan1.3b-eager", WAN_1_3B, SMALL, "bf16, eager", steps=6),
    _generate(
        *("gen-wan1.3b-sage", WAN_1_3B, SMALL, "bf16, eager, SageAttention"),
        *("--attn_mode", "sageattn"),
        steps=6,
    ),
    _wan("fp8-swap38-offload", "fp8 weights, swap 38, offload", *FP8, *SWAP_MOST, *OFFLOADED),
    _wan(
        *("fp8-products-swap30-compiled", "fp8 products, swap 30, compiled", *COMPILED, *FP8_PRODUCTS),
        *THREE_QUARTERS,
    ),
    _wan("fp8-products", "fp8 products, eager", *FP8_PRODUCTS),
    _wan("fp8-weights-compiled", "fp8 weights, compiled", *COMPILED, *FP8),
    _wan("fp8-weights", "fp8 weights, eager", *FP8),
    _wan("bf16-swap30", "bf16, swap 30, eager", *THREE_QUARTERS),
    _wan("bf16-keep-compiled", "bf16, keep attention, compiled", *COMPILED, *KEPT),
    _wan("bf16-offload", "bf16, offload, eager", *OFFLOADED),
    _wan("bf16-offload-compiled", "bf16, offload, compiled", *COMPILED, *OFFLOADED),
    _wan("fp8-weights-swap30-compiled", "fp8 weights, swap 30, compiled", *COMPILED, *FP8, *THREE_QUARTERS),
    _train(
        "hunyuan-fp8-products-compiled", HUNYUAN, WIDE, "fp8 products, compiled", *COMPILED, *FP8_PRODUCTS
    ),
    _train("hunyuan-bf16", HUNYUAN, WIDE, "bf16, eager"),
    _train("wan1.3b-bf16", WAN_1_3B, SMALL, "bf16, eager"),
    _train("wan22-14b-bf16-compiled", WAN22_14B, SMALL, "bf16, compiled", *COMPILED),
    _train("wan22-5b-bf16-compiled", WAN22_5B, HD, "bf16, compiled", *COMPILED),
    _train("framepack-bf16", FRAMEPACK, SECTION, "bf16, eager"),
    _train("flux-bf16", FLUX, SQUARE, "bf16, eager", text_tokens=512),
    _train(
        *("flux-fp8-products-compiled", FLUX, SQUARE, "fp8 products, compiled", *COMPILED, *FP8_PRODUCTS),
        text_tokens=512,
    ),
    _train("chroma-bf16-compiled", CHROMA, SQUARE, "bf16, compiled", *COMPILED, text_tokens=512),
    _train("hunyuan-image-bf16-compiled", HUNYUAN_IMAGE, SQUARE, "bf16, compiled", *COMPILED),
    _train("lumina-bf16-compiled", LUMINA, SQUARE, "bf16, compiled", *COMPILED),
    _generate("gen-wan14b-t2v", WAN_14B, SMALL, "bf16, compiled", *GENERATE_COMPILED),
    _generate("gen-wan14b-t2v-swap30", WAN_14B, SMALL, "bf16, swap 30, eager", *THREE_QUARTERS),
    _generate("gen-wan22-14b", WAN22_BOTH, SMALL, "bf16, compiled", *GENERATE_COMPILED, steps=4),
    _generate("gen-wan22-5b", WAN22_5B, HD, "bf16, compiled", *GENERATE_COMPILED),
    _generate("gen-wan1.3b", WAN_1_3B, SMALL, "bf16, compiled", *GENERATE_COMPILED, steps=6),
    _generate("gen-hunyuan", HUNYUAN, WIDE, "bf16, compiled", *GENERATE_COMPILED),
    _generate("gen-chroma", CHROMA, SQUARE, "bf16, eager", text_tokens=512, steps=8),
    _generate("gen-hunyuan-image", HUNYUAN_IMAGE, LARGE, "bf16, eager", steps=6),
    _generate("gen-lumina", LUMINA, SQUARE, "bf16, eager", steps=8),
    Row("cache-wan22-vae", LATENTS, WAN22_VAE, HD, "bfloat16", seconds=60),
)
BY_NAME = {row.name: row for row in ROWS}


def choose(names: Sequence[str], groups: Sequence[str]) -> list[Row]:
    """Return the rows of these names or numbers, then those of these groups; all if none are given.

    Raises SystemExit, with the list of rows, for an unknown name.
    """
    found = [_row(name) for name in names]
    found += [row for row in ROWS if row.group in groups or (row.is_goal and "goals" in groups)]
    return list(dict.fromkeys(found)) or list(ROWS)


def _row(name: str) -> Row:
    if name.isdecimal() and int(name) < len(ROWS):
        return ROWS[int(name)]
    if name not in BY_NAME:
        raise SystemExit(f"--rows {name}: there is no such row. The rows: {', '.join(BY_NAME)}")
    return BY_NAME[name]


# --- The result file of benchmarks/gpu.py, how long rows will take, and the goals
# ------------------------------------------------------------------------------------------------------------

Figures = dict[str, Any]
GIB = 1 << 30
PEAK_SHARE, FP8_SPEED, SWAP_COST, PLAN_ERROR, LOSS_ERROR = 0.65, 1.2, 0.05, 0.07, 0.01
# assumed for a prediction of how long a row takes, on a card of 790 TFLOP/s; all are guesses
SPEED = 450e12  # operations per second
COMPILING, STARTING, READING = 50.0, 25.0, 2e9  # seconds, seconds, bytes per second


@dataclass
class Results:
    """Figures measured on one device. `head` has the device, torch, the date and the device's peaks."""

    head: Figures
    rows: dict[str, Figures] = field(default_factory=dict)
    path: Path | None = None  # rewritten after each row

    def note(self, name: str, figures: Figures) -> None:
        """Store a row's figures, also in the file, so that an interruption loses at most one row."""
        self.rows[name] = figures
        if self.path is not None:
            text = json.dumps({"head": self.head, "rows": self.rows}, indent=1)
            write_text(self.path, text + "\n")

    @property
    def peak(self) -> float:
        """Operations per second of a bf16 matrix product."""
        return float(self.head["matmul"])


def read_results(path: Path) -> Results:
    """Read a result file. Raises SystemExit if it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Results(found["head"], found["rows"], path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a result file of benchmarks/gpu.py: {error}") from None


def continue_results(path: Path | None, head: Figures) -> Results:
    """Return the content of a result file to be continued, or empty results.

    The peaks are those of this run; each row keeps that of the run that measured it. Raises SystemExit if the
    file is of another device or another torch.
    """
    if path is None or not path.exists():
        return Results(head, path=path)
    found = read_results(path)
    for name in ("device", "torch"):
        if found.head.get(name) != head[name]:
            raise SystemExit(
                f"{path} was measured with {found.head.get(name)}, this is {head[name]}: "
                "give another --output"
            )
    return Results(head, found.rows, path)


def missing(rows: Sequence[Row], results: Results, again: bool) -> list[Row]:
    """Return the rows to measure; with `again`, also those that failed."""
    return [
        row for row in rows if row.name not in results.rows or (again and "failed" in results.rows[row.name])
    ]


# How long


@dataclass(frozen=True)
class Expected:
    """Estimate of a row before it is measured."""

    operations: float  # of a timed call
    size: float  # bytes of its file
    seconds: float


def expect(row: Row, operations: float, size: float, speed: float = SPEED) -> Expected:
    """Estimate the seconds of a row from its operations and the bytes that it loads."""
    if not operations:
        return Expected(0.0, size, row.seconds)
    call = operations / speed
    calls = 1 + max(2, min(5, 1 + int(25 // call)))
    compiling = COMPILING if "--compile" in row.options else 0.0
    return Expected(operations, size, STARTING + size / READING + compiling + calls * call)


def correction(results: Results) -> float:
    """Return the factor for expected seconds, from the rows that are measured."""
    found = [
        row["took"] / row["expected"]
        for row in results.rows.values()
        if row.get("took") and row.get("expected") and "failed" not in row
    ]
    return min(max(statistics.median(found), 0.3), 3.0) if found else 1.0


# Rates


def rate(figures: Mapping[str, Any], which: str = "operations") -> float:
    """Return operations per second; 0 if none are counted."""
    return float(figures.get(which, 0)) / float(figures["seconds"])


def per_unit(figures: Mapping[str, Any]) -> float:
    """Return the seconds of a step, clip, text or GB."""
    return float(figures["seconds"]) / float(figures["per"])


def plan_error(figures: Mapping[str, Any]) -> float | None:
    """Return how far the plan is off, as a fraction of the peak; None if either is not known."""
    if not figures.get("planned") or not figures.get("device"):
        return None
    return float(figures["planned"]) / float(figures["device"]) - 1


def difference(figures: Mapping[str, Any], other: Mapping[str, Any], which: str = "losses") -> float | None:
    """Return the largest relative difference of losses or norms of the same steps; None without any.

    It is infinite if one of them is NaN or infinite.
    """
    pairs = list(zip(figures.get(which, ()), other.get(which, ()), strict=False))
    return max((_apart(one, two) for one, two in pairs), default=None)


def _apart(one: float, two: float) -> float:
    if one == two and math.isfinite(one):
        return 0.0
    return abs(one / two - 1) if math.isfinite(one) and math.isfinite(two) and two else math.inf


# Goals


@dataclass(frozen=True)
class Goal:
    """A goal with the measured figure; `is_met` is None if the rows that it needs are not measured."""

    text: str
    is_met: bool | None
    found: str

    def __str__(self) -> str:
        verdict = {True: "met", False: "missed", None: "not measured"}[self.is_met]
        return f"{verdict}: {self.text}" + (f" ({self.found})" if self.found else "")


PAIRS_FP8 = (
    ("wan14b-fp8-products-compiled", "wan14b-bf16-compiled"),
    ("wan14b-fp8-products", "wan14b-bf16"),
    ("wan14b-short-fp8-products-compiled", "wan14b-short-bf16-compiled"),
    ("hunyuan-fp8-products-compiled", "hunyuan-bf16-compiled"),
    ("flux-fp8-products-compiled", "flux-bf16-compiled"),
)
PAIRS_SWAP = (
    ("wan14b-bf16-swap30-compiled", "wan14b-bf16-compiled"),
    ("wan14b-bf16-swap30", "wan14b-bf16"),
    ("wan14b-short-bf16-swap30-compiled", "wan14b-short-bf16-compiled"),
    ("wan14b-fp8-products-swap30-compiled", "wan14b-fp8-products-compiled"),
    ("wan14b-fp8-weights-swap30-compiled", "wan14b-fp8-weights-compiled"),
)


def goals_of(results: Results) -> list[Goal]:
    """Compare the figures with the goals."""
    rows = {name: row for name, row in results.rows.items() if "failed" not in row}
    found = [_peak_goal(rows, results.peak)]
    for faster, plain in PAIRS_FP8:
        if faster in rows and plain in rows:
            found.append(_fp8_goal(faster, rows[faster], rows[plain]))
    for swapped, plain in PAIRS_SWAP:
        if swapped in rows and plain in rows:
            found.append(_swap_goal(swapped, rows[swapped], rows[plain]))
    return [*found, _plan_goal(rows)]


def _peak_goal(rows: Mapping[str, Figures], peak: float) -> Goal:
    """Compare the fastest row of Wan 14B in bf16."""
    text = f"{PEAK_SHARE:.0%} of the bf16 peak in LoRA training of Wan 14B in bf16, recomputation counted"
    shares = {
        name: rate(row) / row.get("matmul", peak)
        for name, row in rows.items()
        if name.startswith("wan14b-bf16")
    }
    if not shares:
        return Goal(text, None, "")
    best = max(shares, key=lambda name: shares[name])
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return Goal(text, shares[best] >= PEAK_SHARE, listed)


def _fp8_goal(name: str, faster: Figures, plain: Figures) -> Goal:
    speed, error = plain["seconds"] / faster["seconds"], difference(faster, plain)
    norms = difference(faster, plain, "norms")
    text = f"{name} at least {FP8_SPEED} times as fast as bf16, losses within {LOSS_ERROR:.0%}"
    is_met = speed >= FP8_SPEED and error is not None and error <= LOSS_ERROR
    parts = [
        f"{name} {'unknown' if each is None else f'{each:.2%} apart'}"
        for name, each in (("losses", error), ("norms of gradients", norms))
    ]
    return Goal(text, is_met, f"{speed:.2f} times, {', '.join(parts)}")


def _swap_goal(name: str, swapped: Figures, plain: Figures) -> Goal:
    cost = swapped["seconds"] / plain["seconds"] - 1
    return Goal(f"{name} at most {SWAP_COST:.0%} slower than without", cost <= SWAP_COST, f"{cost:+.1%}")


def _plan_goal(rows: Mapping[str, Figures]) -> Goal:
    text = f"the plan within {PLAN_ERROR:.0%} of the peak in all rows"
    errors = {
        name: error
        for name, row in rows.items()
        if row["kind"] in (TRAINING, GENERATION) and (error := plan_error(row)) is not None
    }
    if not errors:
        return Goal(text, None, "")
    worst = max(errors, key=lambda name: abs(errors[name]))
    return Goal(text, abs(errors[worst]) <= PLAN_ERROR, f"worst {worst}: {errors[worst]:+.1%}")


# --- The tables of benchmarks/gpu.py: Markdown on the screen, and between two marks in the documents
# ------------------------------------------------------------------------------------------------------------

# figures of a row, the device's peak -> what stands in the column
Cell = Callable[[Mapping[str, Any], float], str]
BEGIN, END = "<!-- gpu.py: tables -->", "<!-- gpu.py: end -->"
UNKNOWN = "-"


def gib(size: float | None) -> str:
    """Return bytes as GiB; a placeholder if they are not known."""
    return f"{size / GIB:.1f}" if size else UNKNOWN


def _share(which: str) -> Cell:
    """Return a column of the rate and its fraction of the peak."""

    def cell(row: Mapping[str, Any], peak: float) -> str:
        found = rate(row, which)
        return f"{found / 1e12:.0f} ({found / peak:.0%})" if found else UNKNOWN

    return cell


def _plan(row: Mapping[str, Any], peak: float) -> str:
    error = plan_error(row)
    return gib(row.get("planned")) + ("" if error is None else f" ({error:+.1%})")


def _loading(row: Mapping[str, Any], peak: float) -> str:
    return f"{row['loading']:.0f} ({row['loading'] / (row['loaded'] / 1e9):.2f} a GB)"


def _video(row: Mapping[str, Any], peak: float) -> str:
    return f"{per_unit(row) * row['whole']:.0f} for {row['whole']:.0f} steps ({row['per']:.0f} measured)"


def _spread(row: Mapping[str, Any], peak: float) -> str:
    return f"{row['spread']:.1%} of {row['calls']}"


def _forgotten(row: Mapping[str, Any], peak: float) -> str:
    return UNKNOWN if row["forgotten"] is None else f"{row['forgotten'] / row['per']:.2f}"


MEMORY: dict[str, Cell] = {
    "device GiB": lambda row, peak: gib(row["device"]),
    "planned": _plan,
    "host GiB": lambda row, peak: gib(row["host"]),
}
TIMES: dict[str, Cell] = {
    "spread": _spread,
    "first call s": lambda row, peak: f"{row['warm_up']:.0f}",
}
COLUMNS: dict[tuple[str, ...], dict[str, Cell]] = {
    (TRAINING,): {
        "seconds a step": lambda row, peak: f"{row['seconds']:.2f}",
        "TFLOP/s, recomputation counted": _share("operations"),
        "without": _share("model_operations"),
        **MEMORY,
        "loading s": _loading,
        **TIMES,
    },
    (GENERATION,): {
        "seconds": _video,
        "seconds a step": lambda row, peak: f"{per_unit(row):.2f}",
        "TFLOP/s": _share("operations"),
        **MEMORY,
        "loading s": _loading,
        **TIMES,
    },
    (LATENTS, TEXTS): {
        "a second": lambda row, peak: f"{1 / per_unit(row):.2f}",
        "unit": lambda row, peak: "clips" if row["kind"] == LATENTS else "texts",
        "device GiB": MEMORY["device GiB"],
        "host GiB": MEMORY["host GiB"],
        "loading s": _loading,
        **TIMES,
    },
    (LOADING,): {
        "seconds a GB, file in the system's cache": lambda row, peak: f"{per_unit(row):.2f}",
        "after asking it to forget the file": _forgotten,
        "file GB": lambda row, peak: f"{row['loaded'] / 1e9:.1f}",
        "device GiB": MEMORY["device GiB"],
        "host GiB": MEMORY["host GiB"],
        **TIMES,
    },
}
TITLES = {
    (TRAINING,): "Training steps of a LoRA of rank 32, batch 1",
    (GENERATION,): "Denoising, with the guidance that is usual; text encoders and VAE are not in the time",
    (LATENTS, TEXTS): "Caching: the networks alone, without decoding videos and writing files",
    (LOADING,): "Loading a transformer from a file of real bytes",
}


def tables(results: Results) -> str:
    """Return all tables of a result file, with the device and the goals."""
    parts = [head_line(results.head)]
    for kinds, columns in COLUMNS.items():
        rows = {name: row for name, row in ordered(results.rows).items() if row["kind"] in kinds}
        if rows:
            parts.append(f"{TITLES[kinds]}:\n\n{table(rows, columns, results.peak)}")
    parts.append("\n".join(["Goals:", "", *(f"- {goal}" for goal in goals_of(results))]))
    return "\n\n".join(parts) + "\n"


def head_line(head: Mapping[str, Any]) -> str:
    """Return the device, with the peaks of the same run."""
    peaks = f"bf16 matrix product {head['matmul'] / 1e12:.0f} TFLOP/s, "
    if head.get("copy"):
        peaks += f"copy on the device {head['copy'] / 1e12:.1f} TB/s read and written, "
    peaks += f"pinned upload {head['upload'] / 1e9:.0f} GB/s"
    return f"{head['date']}, {head['device']}, torch {head['torch']}. Measured in the same run: {peaks}."


def ordered(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the rows in the order of their list; unknown rows come last."""
    known = [row.name for row in ROWS if row.name in rows]
    return {name: rows[name] for name in [*known, *(name for name in rows if name not in BY_NAME)]}


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Cell], peak: float) -> str:
    """Return a Markdown table."""
    lines = [f"| model | size | options | {' | '.join(columns)} |", "|---|---|---|" + "---|" * len(columns)]
    return "\n".join([*lines, *(line_of(row, columns, peak) for row in rows.values())])


def line_of(row: Mapping[str, Any], columns: Mapping[str, Cell], peak: float) -> str:
    """Return a row of a table; for a failed row the reason. `peak` is used unless the row has its own."""
    start = [row["model"], row["size"], row["about"]]
    if "failed" in row:
        reason = row["failed"].replace("|", "/")
        return f"| {' | '.join(start)} | failed: {reason[:160]} |" + " |" * (len(columns) - 1)
    own = row.get("matmul", peak)
    return f"| {' | '.join([*start, *(cell(row, own) for cell in columns.values())])} |"


def columns_of(kind: str) -> Mapping[str, Cell]:
    """Return the columns of the table for a kind of row."""
    return next(columns for kinds, columns in COLUMNS.items() if kind in kinds)


def write_tables(files: Sequence[Results], documents: Sequence[Path]) -> None:
    """Put the tables of all result files between the marks of each document.

    Raises SystemExit if a document does not have the marks once, in their order; then none is changed.
    """
    text = "\n".join(tables(results) for results in files)
    changed = {}
    for document in documents:
        old = document.read_text(encoding="utf-8")
        if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
            raise SystemExit(f"{document} must have the lines {BEGIN} and {END} once each, in this order")
        before, rest = old.split(BEGIN)
        _, after = rest.split(END)
        changed[document] = f"{before}{BEGIN}\n\n{text}\n{END}{after}"
    for document, new in changed.items():
        write_text(document, new)
