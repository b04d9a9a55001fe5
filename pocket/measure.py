"""Measure how often the pocket model draws what the prompt asks for.

Prompts in the plain wording go through wan_generate_video.py; the detectors of the tests judge the clips.

    python -m pocket.measure --prompts 100 --save_path build/measured [--model FOLDER]
                                                [options of wan_generate_video.py]
    python -m pocket.measure --word blorp ... --lora_weight LORA
                                                prompts with a made-up word of pocket/concepts.py
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

import wan_generate_video
from modules.atomic_write import write_text
from modules.command import command_line
from modules.media.reading import video_frames
from modules.seeds import derive_seed
from pocket import drawing
from pocket.concepts import CONCEPTS, Concept
from tests.pocket.detectors import Verdict, look

POCKET = Path(__file__).resolve().parent
# forms that the detectors distinguish
FORMS = (*drawing.SHAPES, *(concept.form for concept in CONCEPTS.values() if concept.form))
CLIP = ("--video_size", "64", "64", "--video_length", "17")
# most processors multiply bfloat16, as in the file, several times more slowly
IN_FLOAT32 = ("--dit_dtype", "float32")


@dataclass(frozen=True)
class Asked:
    """Color, shape and direction that a prompt asks for, as the detectors name them, and made-up words."""

    colour: str
    shape: str
    direction: str
    words: Mapping[str, str] = field(default_factory=dict)  # cross: blorp

    @property
    def prompt(self) -> str:
        """The caption of this clip, with made-up words in place of the names that they stand for."""
        color, shape = (self.words.get(name, name) for name in (self.colour, self.shape))
        return f"a {color} {shape} moving {self.direction}"


@dataclass(frozen=True)
class Accuracy:
    """Shares of clips that are right, 0..1."""

    clips: int
    shape: float
    colour: float
    direction: float
    all_three: float
    colour_in_every_frame: float


def main(argv: Sequence[str] | None = None) -> None:
    """Generate clips for drawn prompts, let the detectors look at them, and write their counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--first_seed", type=int, default=1000)
    parser.add_argument("--model", type=Path, default=POCKET, help="folder of dit, vae and t5")
    parser.add_argument("--word", choices=sorted(CONCEPTS), help="ask for the concept of this made-up word")
    parser.add_argument("--save_path", type=Path, required=True)
    args, others = parser.parse_known_args(argv)
    asked = some_prompts(args.prompts, args.first_seed, CONCEPTS.get(args.word))
    args.save_path.mkdir(parents=True, exist_ok=True)
    lines = args.save_path / "prompts.txt"
    write_text(lines, "".join(f"{each.prompt} --d {seed}\n" for seed, each in asked.items()))
    clip = ["--from_file", str(lines), "--save_path", str(args.save_path / "clips")]
    wan_generate_video.main([*model_options(args.model), *IN_FLOAT32, *CLIP, *clip, *others])
    accuracy = judge(asked, read_verdicts(args.save_path / "clips"))
    text = json.dumps({"word": args.word, "options": others, **asdict(accuracy)})
    write_text(args.save_path / "accuracy.json", text + "\n")
    sys.stdout.write(text + "\n")


def model_options(folder: Path) -> list[str]:
    """Return the options of wan_generate_video.py for the pocket model in `folder`."""
    return [
        "--task",
        "t2v-1.3B",
        *(
            part
            for name in ("dit", "vae", "t5")
            for part in (f"--{name}", str(folder / f"{name}.safetensors"))
        ),
    ]


def some_prompts(count: int, first_seed: int, concept: Concept | None = None) -> dict[int, Asked]:
    """Return prompts to ask for, by seed.

    The color or form of `concept` is in every prompt.
    """
    asked = {}
    for seed in range(first_seed, first_seed + count):
        random = np.random.default_rng(derive_seed("asked", seed))
        values = (
            drawing.pick(random, tuple(names))
            for names in (drawing.COLOURS, drawing.SHAPES, drawing.DIRECTIONS)
        )
        asked[seed] = Asked(*values)
        if concept is not None:
            taught = {"shape": concept.form} if concept.form else {"colour": concept.colour}
            asked[seed] = replace(asked[seed], **taught, words=dict.fromkeys(taught.values(), concept.word))
    return asked


def read_verdicts(folder: Path) -> dict[int, Verdict]:
    """Return a verdict on each clip in a folder, by the seed at the end of its name."""
    found = {}
    for path in sorted(folder.glob("*.mp4")):
        seed = re.search(r"_(\d+)$", path.stem)
        if seed:
            found[int(seed[1])] = look(np.stack(list(video_frames(path))), FORMS)
    return found


def judge(asked: Mapping[int, Asked], verdicts: Mapping[int, Verdict]) -> Accuracy:
    """Return the accuracy of clips against what was asked for.

    Raises:
        KeyError: If a clip is missing.
    """
    pairs = [(each, verdicts[seed]) for seed, each in asked.items()]
    rows = np.array(
        [(v.shape == a.shape, v.colour == a.colour, v.direction == a.direction) for a, v in pairs]
    )
    steady = np.mean([verdict.keeps_color and verdict.colour == each.colour for each, verdict in pairs])
    shape, color, direction = rows.mean(0).tolist()
    return Accuracy(len(pairs), shape, color, direction, float(rows.all(1).mean()), float(steady))


if __name__ == "__main__":
    command_line(main)
