"""Train a slider of the pocket model from captions alone, and measure what it does to eight prompts.

python -m pocket.slide FOLDER       red at strength 1, blue at -1; prints what clips at -1, 0 and 1 show

The scripts of training and generation run as users type them. The prompts name no color. Each is made with
one noise at three strengths; the detectors of the tests say what a clip shows.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
import wan_train_network
from modules.atomic_write import write_text
from modules.command import command_line
from modules.media.reading import video_frames
from pocket import drawing
from pocket.clips import write_clips, write_dataset
from pocket.concepts import draw_known
from pocket.measure import CLIP, IN_FLOAT32, POCKET, model_options
from tests.pocket.detectors import look, sight

CLIPS, BATCH = 16, 8
STEPS = 150
TAUGHT = (("circle", "left"), ("square", "right"), ("triangle", "up"), ("circle", "down"))
# half of them are of shapes and directions that the slider's captions have in no pair
PROMPTS = (
    *(("circle", "left"), ("square", "right"), ("triangle", "up"), ("circle", "down")),
    *(("square", "left"), ("triangle", "right"), ("circle", "up"), ("square", "down")),
)
FIRST_SEED = 600
STRENGTHS = (-1, 0, 1)
PATCH = 2  # pixels around the middle of the thing whose color is measured


@dataclass(frozen=True)
class Seen:
    """Measurements of a clip."""

    redness: float  # red minus blue in the middle of the thing, -1..1, mean over frames; NaN: there is none
    shape: str | None
    direction: str | None
    ground: tuple[float, ...]  # median color, 0..1


@dataclass(frozen=True)
class Row:
    """Effect of a strength on all prompts."""

    strength: int
    redness: float  # mean over prompts
    shapes: int  # clips with the shape of the prompt
    directions: int  # clips with its direction
    ground: float  # root mean square difference of the ground from strength 0, 0..1


def main(argv: Sequence[str] | None = None) -> None:
    """Train a slider in the given folder and print a table of what each strength does to the prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    args = parser.parse_args(argv)
    seen = slide(args.folder.resolve(), args.steps)
    lines = ["| strength | redness | shape kept | direction kept | ground moved |", "|---|---|---|---|---|"]
    for row in summarize(seen):
        counts = f"{row.shapes} of {len(PROMPTS)} | {row.directions} of {len(PROMPTS)}"
        lines.append(f"| {row.strength} | {row.redness:.2f} | {counts} | {row.ground:.3f} |")
    lines.append(
        f"{count_monotone(seen)} of {len(PROMPTS)} prompts are redder at 1 and bluer at -1 than at 0"
    )
    sys.stdout.write("\n".join([*lines, ""]))


def slide(folder: Path, steps: int = STEPS) -> dict[int, list[Seen]]:
    """Train the slider and make the clips; return what each prompt's clip shows, by strength."""
    lora = train(folder, steps)
    seen = {}
    for strength in STRENGTHS:
        made = folder / f"at_{strength}"
        make(made, lora, strength)
        seen[strength] = read_clips(made)
    return seen


def train(folder: Path, steps: int) -> Path:
    """Return the path of the slider; the clips only give latents to which noise is added."""
    write_clips(folder / "clips", CLIPS, seed=3, make=draw_known)
    dataset = ["--dataset_config", str(write_dataset(folder, BATCH))]
    model = [*model_options(POCKET), *IN_FLOAT32]
    vae = ["--vae", str(POCKET / "vae.safetensors"), "--vae_dtype", "float32"]
    wan_cache_latents.main([*dataset, *vae])
    wan_cache_text_encoder_outputs.main([*dataset, "--t5", str(POCKET / "t5.safetensors")])
    slider = folder / "slider.toml"
    write_text(slider, slider_file())
    network = "--network_module networks.lora_wan --network_dim 8 --network_alpha 8 --learning_rate 2e-3"
    times = "--timestep_sampling shift --discrete_flow_shift 3 --mixed_precision no --sdpa --seed 1"
    words = [*dataset, *model, *network.split(), *times.split(), "--max_train_steps", str(steps)]
    files = ["--output_dir", str(folder), "--output_name", "slider", "--max_data_loader_n_workers", "0"]
    wan_train_network.main([*words, *files, "--slider", str(slider)])
    return folder / "slider.safetensors"


def slider_file() -> str:
    """Return the content of slider.toml."""
    tables = [
        f'[[sliders]]\npositive = "a red {shape} moving {direction}"\n'
        f'negative = "a blue {shape} moving {direction}"\nneutral = "a {shape} moving {direction}"\n'
        for shape, direction in TAUGHT
    ]
    return "\n".join(["guidance = 2.0\n", *tables])


def make(folder: Path, lora: Path, strength: int) -> None:
    """Make the clips of all prompts at a strength."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"a {shape} moving {direction} --d {FIRST_SEED + number}\n"
        for number, (shape, direction) in enumerate(PROMPTS)
    ]
    write_text(folder / "prompts.txt", "".join(lines))
    steps = "--infer_steps 20 --guidance_scale 3 --flow_shift 3 --sample_solver vanilla --device cpu"
    words = [*model_options(POCKET), *IN_FLOAT32, *CLIP, *steps.split()]
    slider = ["--lora_weight", str(lora), "--lora_multiplier", str(strength)] if strength else []
    files = ["--from_file", str(folder / "prompts.txt"), "--save_path", str(folder)]
    wan_generate_video.main([*words, *files, *slider])


def read_clips(folder: Path) -> list[Seen]:
    """Return the measurements of a folder's clips, in the order of PROMPTS."""
    by_seed = {}
    for path in folder.glob("*.mp4"):
        seed = re.search(r"_(\d+)$", path.stem)
        assert seed is not None, path
        by_seed[int(seed[1])] = read_clip(np.stack(list(video_frames(path))))
    return [by_seed[FIRST_SEED + number] for number in range(len(PROMPTS))]


def read_clip(clip: drawing.Clip) -> Seen:
    """Return the redness, shape, direction and ground of a clip F H W 3."""
    verdict = look(clip)
    ground = np.median(clip.reshape(-1, 3).astype(np.float32), axis=0)
    values = []
    for frame in clip.astype(np.float32):
        sighting = sight(frame, ground, drawing.SHAPES)
        if sighting is not None:
            x, y = (round(place) for place in sighting.center)
            patch = frame[max(0, y - PATCH) : y + PATCH + 1, max(0, x - PATCH) : x + PATCH + 1]
            values.append(float((patch[..., 0] - patch[..., 2]).mean() / 255))
    redness = float(np.mean(values)) if values else float("nan")
    return Seen(redness, verdict.shape, verdict.direction, tuple((ground / 255).tolist()))


def summarize(seen: Mapping[int, Sequence[Seen]]) -> list[Row]:
    """Return the effect of each strength from -1 to 1, one row each."""
    rows = []
    for strength in STRENGTHS:
        clips = seen[strength]
        moved = [
            np.subtract(clip.ground, default.ground) for clip, default in zip(clips, seen[0], strict=True)
        ]
        pairs = list(zip(clips, PROMPTS, strict=True))
        rows.append(
            Row(
                strength,
                redness=float(np.mean([clip.redness for clip in clips])),
                shapes=sum(clip.shape == shape for clip, (shape, _) in pairs),
                directions=sum(clip.direction == direction for clip, (_, direction) in pairs),
                ground=float(np.sqrt(np.mean(np.square(moved)))),
            )
        )
    return rows


def count_monotone(seen: Mapping[int, Sequence[Seen]]) -> int:
    """Return the number of prompts for which redness rises from strength to strength."""
    triples = zip(*(seen[strength] for strength in STRENGTHS), strict=True)
    return sum(low.redness < default.redness < high.redness for low, default, high in triples)


if __name__ == "__main__":
    command_line(main)
