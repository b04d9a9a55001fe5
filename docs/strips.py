"""Draw the strips of docs/features.md: a clip without and with each feature, same prompt and seed.

    python docs/strips.py [NAME ...]

All are made with the pocket model by wan_generate_video.py; on two cores it takes a few minutes.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

import wan_generate_video  # noqa: E402
from modules.media.reading import Frame, video_frames  # noqa: E402
from modules.media.writing import write_png  # noqa: E402
from modules.parser import Parser  # noqa: E402

FOLDER = ROOT / "docs" / "features"
MODEL = ["--task", "t2v-1.3B", "--dit", "pocket/dit.safetensors", "--vae", "pocket/vae.safetensors"]
DEFAULT = {
    "--t5": "pocket/t5.safetensors",
    "--video_size": "64 64",
    "--video_length": "17",
    "--infer_steps": "20",
    "--sample_solver": "vanilla",
    "--flow_shift": "3",
    "--guidance_scale": "3",
    "--seed": "1",
    "--device": "cpu",
}
PROMPT = "a red circle moving left"
SHOWN, GAP = 6, 4  # frames of a row, pixels between them


@dataclass(frozen=True)
class Strip:
    """What a strip compares; options as typed. `both` are those of both rows."""

    after: str
    prompt: str = PROMPT
    both: str = ""
    before: str = ""
    prompt_after: str | None = None
    negative: str | None = None


RATIOS = (  # of the pocket model with 20 steps, as --magcache_calibration prints them
    "1.00000 1.04449 0.97501 0.98634 0.97591 0.97668 0.97496 0.96903 0.96821 0.96445 "
    "0.96144 0.95303 0.94330 0.93423 0.91887 0.90407 0.87627 0.84059 0.78352 0.70014"
)
STRIPS = {
    "guidance": Strip("--guidance_scale 3", before="--guidance_scale 1"),
    "cfg_zero": Strip("--cfgzerostar_scaling --cfgzerostar_init_steps 1", both="--guidance_scale 6"),
    "perp_neg": Strip("--perp_neg 1.5", both="--guidance_scale 5", negative="a blue circle moving left"),
    "skipped_layers": Strip("--slg_mode original --slg_layers 4 --slg_scale 2 --slg_end 0.6"),
    "schedule": Strip("--cfg_schedule 1-8"),
    "rescale": Strip("--guidance_rescale 0.7", both="--guidance_scale 7"),
    "nag": Strip("--nag_scale 5", both="--guidance_scale 1", negative="a blue square moving right"),
    "riflex": Strip("--riflex_index 2", both="--video_length 49 --rope_func comfy"),
    "weights": Strip("--prompt_weighting", prompt_after="a red (circle:0.2) moving left"),
    "magcache": Strip(f"--magcache_threshold 0.24 --magcache_mag_ratios {RATIOS}"),
    "lcm": Strip("--sample_solver lcm", both="--infer_steps 6"),
    "video_to_video": Strip(
        "--video_path BEFORE --v2v_denoise 0.7", prompt_after="a green square moving left"
    ),
}


def main() -> None:
    """Draw the strips that the command line names, all of them if it names none."""
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(STRIPS))
    names = parser.parse_args().names
    FOLDER.mkdir(exist_ok=True)
    for name in names or STRIPS:
        with tempfile.TemporaryDirectory() as folder:
            draw(STRIPS[name], Path(folder), FOLDER / f"{name}.png")


def draw(strip: Strip, folder: Path, path: Path) -> None:
    """Write a strip: the clip without the feature above the clip with it."""
    texts = [] if strip.negative is None else ["--negative_prompt", strip.negative]
    before = make(folder / "before", ["--prompt", strip.prompt, *texts], strip.both, strip.before)
    words = strip.after.replace("BEFORE", str(before))
    texts = ["--prompt", strip.prompt_after or strip.prompt, *texts]
    after = make(folder / "after", texts, strip.both, words)
    rows = [_row([*video_frames(clip)]) for clip in (before, after)]
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    write_png(path, np.concatenate([rows[0], gap, rows[1]]))


def make(folder: Path, texts: Sequence[str], *given: str) -> Path:
    """Generate a clip; later options replace earlier ones. Return its path."""
    options = dict(DEFAULT)
    for text in given:
        name = ""
        for word in text.split():
            if word.startswith("--"):
                name = word
                options[name] = ""
            else:
                options[name] = f"{options[name]} {word}".strip()
    words = [word for name, values in options.items() for word in (name, *values.split())]
    wan_generate_video.main([*MODEL, *words, *texts, "--save_path", str(folder)])
    (clip,) = folder.glob("*.mp4")
    return clip


def _row(frames: Sequence[Frame]) -> Frame:
    places = np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)
    gap = np.full((frames[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for place in places for part in (frames[place], gap)][:-1]
    return np.concatenate(parts, axis=1)


if __name__ == "__main__":
    main()
