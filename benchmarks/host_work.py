"""Measure what training, sampling and caching spend on the host outside of their networks.

    python benchmarks/host_work.py --families "wan t2v-1.3B" z_image sdxl

Each command runs a tiny model in this process, under Python's profiler. Printed are the fractions of a loop's
seconds in the network (with its backward pass), the optimizer, reading of batches without workers, and
everything else. A GPU waits for what is not the network. The profiler makes many short calls look longer than
they are: compare figures of this script with each other.
"""

import argparse
import cProfile
import os
import pstats
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

# the tiny models are imported in functions: they load what --help does not need, and torch makes a folder
if TYPE_CHECKING:
    from tests.tiny.families import TinyFamily

STEPS = 60
COPIES = 40  # of each item of a tiny data set
DEFAULT = ["wan t2v-1.3B", "z_image", "sdxl"]


@dataclass(frozen=True)
class Part:
    """A part of a loop: the functions whose seconds it takes, by their file and name."""

    name: str
    functions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Loop:
    """A loop of the program, and the parts of it that are named."""

    name: str
    function: tuple[str, str]
    parts: tuple[Part, ...]


TRAINING = Loop(
    "training",
    ("training/loop.py", "take_step"),
    (
        Part("network", (("training/loop.py", "_propagate"),)),
        Part("optimizer", (("training/loop.py", "_step_weights"),)),
        Part("reading", (("training/data/feed.py", "read"),)),
    ),
)
SAMPLING = Loop(
    "sampling",
    ("generation/denoise.py", "denoise"),
    (Part("network", (("generation/denoise.py", "predict"),)),),
)
CACHING = Loop(
    "caching",
    ("dataset/caching/work.py", "encode"),
    (Part("network", (("dataset/caching/latents.py", "encode"),)),),
)


def seconds_of(stats: Any, function: tuple[str, str]) -> float:
    """Return the cumulative seconds of a function of ours, given by its file and name.

    Of several with this name in the file, the one that takes longest calls the others.
    """
    file, name = function
    return max(
        figures[3]
        for (path, _, called), figures in stats.stats.items()
        if called == name and path.replace(os.sep, "/").endswith(f"/{file}")
    )


def measure(loop: Loop, command: Callable[[], None]) -> str:
    """Return a line with the seconds of a loop and the percentage of each part."""
    profile = cProfile.Profile()
    profile.enable()
    command()
    profile.disable()
    stats = pstats.Stats(profile)
    total = seconds_of(stats, loop.function)
    rest, words = 1.0, []
    for part in loop.parts:
        fraction = sum(seconds_of(stats, function) for function in part.functions) / total
        rest -= fraction
        words.append(f"{part.name} {100 * fraction:.1f} %")
    return f"{loop.name}: {total:.2f} s; {', '.join(words)}, rest {100 * rest:.1f} %"


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command of a checkout in a folder. Raises SystemExit with its last lines if it fails."""
    from tests.faults.messages import run_here

    code, said = run_here(*command, folder=folder)
    if code:
        raise SystemExit(f"{' '.join(command)}\n{said[-2000:]}")


def make_sdxl() -> "TinyFamily":
    """Return the commands of a tiny Stable Diffusion XL."""
    from tests.tiny.families import DATASET, TinyFamily
    from tests.tiny.project import write_plain_images
    from tests.tiny.stable_diffusion import tokenizer_folder, write_sdxl

    def prepare(folder: Path, *_: Any) -> None:
        write_plain_images(folder, side=64)
        write_sdxl(folder)
        tokenizer_folder(folder / "tokenizers")

    model = ["--pretrained_model_name_or_path", "sdxl.safetensors"]
    tokenizers = ["--tokenizer_cache_dir", "tokenizers"]
    network = ["--network_module", "networks.lora", "--network_dim", "4", "--network_train_unet_only"]
    return TinyFamily(
        name="sdxl",
        prepare=prepare,
        cache_latents=["sdxl_cache_latents.py", *DATASET, *model],
        cache_texts=["sdxl_cache_text_encoder_outputs.py", *DATASET, *model, *tokenizers],
        train=["sdxl_train_network.py", *DATASET, *model, *tokenizers, *network]
        + ["--cache_latents", "--cache_text_encoder_outputs"],
        generate=["sdxl_generate_image.py", *model, *tokenizers],
        another_run=[],
        changed_habit=[],
        train_full="",
    )


def multiply_items(folder: Path) -> None:
    """Copy each clip or image with its caption, so that caching is longer than its start."""
    for path in [*folder.iterdir()]:
        for number in range(COPIES):
            shutil.copy(path, path.with_name(f"{path.stem} copy {number}{path.suffix}"))


def measure_family(family: "TinyFamily") -> None:
    """Print the lines of a family."""
    from tests.tiny.families import OUTPUT

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        family.prepare(folder)
        multiply_items(folder / "clips")
        training = [*family.train, *OUTPUT, "--no_page", "--max_train_steps"]
        size = ["--image_size" if "image" in family.generate[0] else "--video_size", "32", "32"]
        made = ["--prompt", "a cat", "--seed", "3", "--output_type", "latent", *size, "--save_path", "made"]
        sampling = [*family.generate, *made, "--infer_steps"]

        print(f"{family.name}, {measure(CACHING, lambda: run(family.cache_latents, folder))}", flush=True)
        run(family.cache_texts, folder)
        for loop, command in ((TRAINING, training), (SAMPLING, sampling)):
            run([*command, "2"], folder)  # imports, and first calls of kernels
            line = measure(loop, lambda command=command: run([*command, str(STEPS)], folder))  # type: ignore[misc]
            print(f"{family.name}, {line}", flush=True)


def main() -> None:
    """Read the command line, and measure each family."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=DEFAULT, help="tiny models, by name, or sdxl")
    names = parser.parse_args().families

    from tests.tiny.families import family_called

    for name in names:
        measure_family(make_sdxl() if name == "sdxl" else family_called(name))


if __name__ == "__main__":
    main()
