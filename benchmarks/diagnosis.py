"""Plant faults into trainings of the pocket model, and see whether `diagnose` names them and remedies help.

    python benchmarks/diagnosis.py FOLDER

The pocket model learns a color that it has no word for, from 12 clips beside 24 of what it knows, by the
commands that users type: once as it should be, and once with each fault. `tools/diagnose.py` looks at the
folder, the run or the file. Then what the finding says is done, the model is trained again, and the figure of
the finding and the clips of the LoRA are measured again, each against those with the fault.

Clips of prompts with the word are looked at: which of them have its color, and which have the ground of the
first training clip. Where clips do not tell, the loss of the last fifth of the steps is compared, of equal
noise. FOLDER keeps what is done, so that the command continues where it was. `--pictures` draws clips of each
fault, and below them those after the remedy, for docs/diagnose.md.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402  # the project's modules are found from here on
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402

import new_project  # noqa: E402
import wan_cache_latents  # noqa: E402
import wan_cache_text_encoder_outputs  # noqa: E402
import wan_generate_video  # noqa: E402
import wan_train_network  # noqa: E402
from data_tools.report.diagnosis.finding import Finding  # noqa: E402
from diagnosis.run import list_diagnoses  # noqa: E402
from modules.atomic_write import write_text  # noqa: E402
from modules.media.reading import video_frames  # noqa: E402
from networks import extract_lora_from_models  # noqa: E402
from pocket import distil, drawing  # noqa: E402
from pocket.clips import write_clips  # noqa: E402
from pocket.concepts import Concept, draw_known  # noqa: E402
from pocket.measure import CLIP, IN_FLOAT32, POCKET, Asked, some_prompts  # noqa: E402
from training.scoring.run import open_run  # noqa: E402

# what `diagnose` proposes for the tokenizer of the pocket model, which cuts zindle into four pieces
WORD, SECOND_WORD = "widape", "enown"
MAGENTA, ORANGE = (210, 60, 200), (240, 130, 30)
FIRST_SEED = 40000  # of the prompts
# what is measured
COLOR, GROUND, LOSS = (
    "clips with the color",
    "clips on the ground of the first training clip",
    "loss at the end",
)
PLAIN_GROUND = "purple"  # of all clips with the fault of the background
RATE = 3e-3
HIGHEST_RATE = 1e-2  # at which the pocket model still learns
COPIES = 30
DATASET = """[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = 8

[[datasets]]
video_directory = '{folder}/clips'
cache_directory = '{folder}/cache'
target_frames = [17]
num_repeats = {repeats}
trigger_word = "{word}"

# clips of what the model knows already, so that it does not forget it
[[datasets]]
video_directory = '{folder}/known_clips'
cache_directory = '{folder}/known_cache'
target_frames = [17]
"""
VALIDATION_TABLE = """
[[datasets]]
video_directory = '{folder}/validation_clips'
cache_directory = '{folder}/validation_cache'
target_frames = [17]
validation = true
"""


@dataclass(frozen=True)
class Setup:
    """A dataset with a word to learn, the options of its training, and how its LoRA is used."""

    make: Callable[[np.random.Generator], tuple[drawing.Scene, str]]  # a scene and its caption
    word: str = WORD
    copies: int = 0  # of the first clip
    validates: bool = False
    clips: int = 12
    steps: float = 1.0  # as a multiple of those of the other trainings
    options: tuple[str, ...] = ("--learning_rate", str(RATE))
    # strengths of the own LoRA and of the Turbo LoRA beside it; None: the own one is used alone
    strengths: tuple[float, float] | None = None
    kind: str = ""  # word behind the trigger word in the prompts


def make_scene(
    random: np.random.Generator,
    word: str = WORD,
    ground: str | None = None,
    names_ground: bool = False,
    second_word: str | None = None,
) -> tuple[drawing.Scene, str]:
    """Draw a scene with the new color; return it with its caption.

    Args:
        random: Source of randomness.
        word: Word of the color.
        ground: Ground of the scene; None for one at random.
        names_ground: Whether the caption names the ground.
        second_word: Word of another color that half of the scenes have; None if all have the first one.
    """
    concept = Concept(word, rgb=MAGENTA, colour="magenta")
    kind = ""
    if second_word is not None:
        kind = "man "
        if random.uniform() < 0.5:
            concept, kind = Concept(second_word, rgb=ORANGE, colour="orange"), "woman "
    scene, caption = concept.make(random)
    caption = caption.replace(f"a {concept.word} ", f"a {concept.word} {kind}")
    if ground is not None:
        scene = replace(scene, ground=ground, ground_rgb=drawing.near(random, drawing.GROUNDS[ground], 6))
    if names_ground:
        caption += f" on a {scene.ground} background"
    return scene, caption


SOUND = Setup(make_scene)
DIGITS = Setup(partial(make_scene, word="zx904"), "zx904")
PURPLE = Setup(partial(make_scene, ground=PLAIN_GROUND))
REPEATED = replace(SOUND, copies=COPIES - 1)
PURPLE_NAMED = Setup(partial(make_scene, ground=PLAIN_GROUND, names_ground=True))
# two words take longer than one
PAIR = Setup(partial(make_scene, second_word=WORD), kind="man", clips=16, steps=2)
PAIR_APART = replace(PAIR, make=partial(make_scene, second_word=SECOND_WORD))
VALIDATES = ("--validate_every_n_steps", "15")
HOT = replace(SOUND, options=("--learning_rate", str(10 * HIGHEST_RATE), *VALIDATES), validates=True)
COOL = replace(SOUND, options=("--learning_rate", str(HIGHEST_RATE), *VALIDATES), validates=True)
TEXTS_ALONE = replace(
    SOUND,
    options=(
        *("--learning_rate", str(RATE), "--network_args", "exclude_patterns=['.*']"),
        "include_patterns=['text_embedding.*']",
    ),
)
FAINT = replace(SOUND, options=("--learning_rate", str(RATE / 10)), strengths=(1, 1))


@dataclass(frozen=True)
class Case:
    """A fault, and what is trained or generated once the remedy is followed."""

    id: str  # of the finding
    title: str
    fault: tuple[str, Setup]  # name of the trial and its setup
    repaired: tuple[str, Setup]
    measure: str = COLOR
    finds_in_file: bool = False  # the LoRA is diagnosed, not the folder


CASES = (
    Case("trigger-pieces", "trigger word of digits", ("digits", DIGITS), ("sound", SOUND)),
    Case(
        "images-background",
        "background in every caption left out",
        ("purple", PURPLE),
        ("purple_named", PURPLE_NAMED),
        measure=GROUND,
    ),
    Case("images-copies", "one clip thirty times", ("repeated", REPEATED), ("sound", SOUND), measure=GROUND),
    Case("trigger-subjects", "two persons", ("pair", PAIR), ("pair_apart", PAIR_APART)),
    Case("loss-rises", "rate ten times too high", ("hot", HOT), ("cool", COOL)),
    Case(
        "lora-texts-only",
        "LoRA on the text's layers alone",
        ("texts", TEXTS_ALONE),
        ("sound", SOUND),
        measure=LOSS,
        finds_in_file=True,
    ),
    Case(
        "loras-loud",
        "Turbo LoRA beside a faint one",
        ("faint at 1", FAINT),
        ("faint at 3", replace(FAINT, strengths=(3.04, 1))),  # as the remedy says
        finds_in_file=True,
    ),
)


@dataclass(frozen=True)
class Trial:
    """The folder of a trial, and its size."""

    folder: Path
    prompts: int
    steps: int

    @property
    def turbo_lora(self) -> Path:
        """LoRA that makes the pocket model draw in 4 steps."""
        return self.folder / "turbo_lora.safetensors"

    def lay_out(self, name: str, setup: Setup) -> Path:
        """Write clips, captions and the description of a training, unless that is done; return its folder."""
        folder = self.folder / name
        if (folder / "run.toml").exists():
            return folder
        write_clips(folder / "clips", setup.clips, seed=1, make=setup.make)
        write_clips(folder / "known_clips", 24, seed=3, make=draw_known)
        first = folder / "clips" / "00000.mp4"
        for number in range(setup.copies):
            for suffix in (".mp4", ".txt"):
                shutil.copyfile(
                    first.with_suffix(suffix), first.with_name(f"copy {number:02d}").with_suffix(suffix)
                )
        files = [f"--model_file={option}={POCKET / option}.safetensors" for option in ("dit", "vae", "t5")]
        words = ["--family", "wan", "--task", "t2v-1.3B", "--memory", "0", "--output_name", "lora"]
        new_project.main([str(folder), *words, *files])
        repeats = 1 if setup.copies else 4
        dataset = DATASET.format(folder=folder.as_posix(), repeats=repeats, word=setup.word)
        if setup.validates:
            write_clips(folder / "validation_clips", 4, seed=2, make=setup.make)
            dataset += VALIDATION_TABLE.format(folder=folder.as_posix())
        write_text(folder / "dataset.toml", dataset)
        return folder

    def train(self, name: str, setup: Setup) -> Path:
        """Cache and train unless the LoRA exists; return its file."""
        folder = self.lay_out(name, setup)
        path = folder / "output" / "lora.safetensors"
        if path.exists():
            return path
        steps = str(round(self.steps * setup.steps))
        texts = ("--vae", str(POCKET / "vae.safetensors"), "--t5", str(POCKET / "t5.safetensors"))
        dataset = ["--dataset_config", str(folder / "dataset.toml")]
        wan_cache_latents.main([*dataset, *texts[:2], "--vae_dtype", "float32"])
        wan_cache_text_encoder_outputs.main([*dataset, *texts[2:]])
        network = "--network_module networks.lora_wan --network_dim 16 --network_alpha 16"
        times = "--timestep_sampling shift --discrete_flow_shift 3.0 --mixed_precision no --sdpa"
        files = ["--dit", str(POCKET / "dit.safetensors"), *texts, "--output_dir", str(path.parent)]
        wan_train_network.main(
            [
                *("--task", "t2v-1.3B", *IN_FLOAT32, *files, *dataset, "--output_name", path.stem),
                *("--max_data_loader_n_workers", "0", *network.split(), *times.split()),
                *(
                    "--lr_scheduler",
                    "cosine",
                    "--max_train_steps",
                    steps,
                    "--seed",
                    "1",
                ),
                *setup.options,
            ]
        )
        return path

    def make_turbo(self) -> Path:
        """Return the LoRA that makes the pocket model draw in 4 steps; it is distilled unless it exists."""
        if self.turbo_lora.exists():
            return self.turbo_lora
        turbo = distil.distil(distil.Settings(self.folder, 768, 400, 2e-3, seed=0, threads=1))
        extract_lora_from_models.main(
            [
                *("--model_org", str(POCKET / "dit.safetensors"), "--model_tuned", str(turbo)),
                *("--dim", "32", "--save_to", str(self.turbo_lora)),
            ]
        )
        return self.turbo_lora

    def generate(self, name: str, setup: Setup) -> Path:
        """Generate the clips of prompts with the word, unless they exist; return their folder."""
        lora = self.train(name.partition(" at ")[0], setup)
        folder = self.folder / "made" / name
        asked = self.list_asked(f"{setup.word} {setup.kind}".strip())
        if len(list(folder.glob("*.mp4"))) == len(asked):
            return folder
        loras, strengths = [str(lora)], ["1"]
        steps = ["--infer_steps", "12", "--guidance_scale", "3"]
        if setup.strengths is not None:
            loras.append(str(self.make_turbo()))
            strengths = [f"{strength:g}" for strength in setup.strengths]
            steps = ["--infer_steps", "4", "--guidance_scale", "1"]
        lines = self.folder / "made" / f"{name}.txt"
        lines.parent.mkdir(parents=True, exist_ok=True)
        write_text(lines, "".join(f"{each.prompt} --d {seed}\n" for seed, each in asked.items()))
        files = [f"--{option}={POCKET / option}.safetensors" for option in ("dit", "vae", "t5")]
        wan_generate_video.main(
            [
                *("--task", "t2v-1.3B", *files, *IN_FLOAT32, *CLIP, *steps, "--sample_solver", "vanilla"),
                *("--flow_shift", "3", "--device", "cpu", "--lora_weight", *loras),
                *("--lora_multiplier", *strengths, "--from_file", str(lines), "--save_path", str(folder)),
            ]
        )
        return folder

    def list_asked(self, word: str) -> Mapping[int, Asked]:
        """Return the prompts with a word, by seed."""
        concept = Concept(word, rgb=MAGENTA, colour="magenta")
        return some_prompts(self.prompts, FIRST_SEED, concept)


def main() -> None:
    """Train with each fault and without, diagnose both, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=90, help="of each training")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write pictures of the clips here")
    args = parser.parse_args()
    trial = Trial(args.folder.resolve(), args.prompts, args.steps)
    print("| fault | finding | figure | after the remedy | measured | with the fault | after |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        print_row(trial, case)
        if args.pictures is not None:
            draw(trial, case, args.pictures / f"diagnose_{case.id.replace('-', '_')}.webp")


def print_row(trial: Trial, case: Case) -> None:
    """Print a row of the table; findings that nobody planted are named in it."""
    clips = [trial.generate(name, setup) for name, setup in (case.fault, case.repaired)]
    findings = find(trial, case, case.fault)
    after = find(trial, case, case.repaired)
    figure = next((finding.figure for finding in findings if finding.id == case.id), None)
    names = ", ".join(f"`{finding.id}`" for finding in findings) or "none"
    names_after = ", ".join(f"`{finding.id}`" for finding in after) or "nothing found"
    if case.measure == LOSS:
        values = [f"{measure_loss(trial, name):.3f}" for name, _ in (case.fault, case.repaired)]
    elif case.measure == COLOR:
        values = [f"{count_color(folder)} of {trial.prompts}" for folder in clips]
    else:
        training_clip = trial.folder / case.fault[0] / "clips" / "00000.mp4"
        first = name_ground(np.stack(list(video_frames(training_clip))))
        grounds = [[name_ground(clip) for clip in read_clips(folder)] for folder in clips]
        values = [f"{found.count(first)} of {trial.prompts}" for found in grounds]
    shown = "" if figure is None else f"{figure:.3g}"
    print(f"| {case.title} | {names} | {shown} | {names_after} | {case.measure} | {' | '.join(values)} |")


def find(trial: Trial, case: Case, of: tuple[str, Setup]) -> list[Finding]:
    """Return the findings about a trial's folder and run, or about its LoRA."""
    name, setup = of
    folder = trial.folder / name.partition(" at ")[0]
    if not case.finds_in_file:
        diagnoses = list_diagnoses(folder)
    else:
        turbo = trial.turbo_lora if setup.strengths is not None else None
        lora = folder / "output" / "lora.safetensors"
        diagnoses = list_diagnoses(lora, turbo, multipliers=setup.strengths or ())
    return [finding for diagnosis in diagnoses for finding in diagnosis.findings]


def measure_loss(trial: Trial, name: str) -> float:
    """Return the mean loss of the last fifth of a training."""
    losses = [loss for _, loss in sorted(open_run(trial.folder / name / "output").run_history.loss.items())]
    last = [loss for loss in losses[-len(losses) // 5 :] if loss is not None]
    return sum(last) / len(last)


def read_clips(folder: Path) -> list[NDArray[np.uint8]]:
    """Return the clips of a folder in the order of their seeds, each F H W 3."""
    return [np.stack(list(video_frames(path))) for path in sorted(folder.glob("*.mp4"))]


def count_color(folder: Path) -> int:
    """Count the clips with at least 50 pixels of the new color in their middle frame."""
    middles = [clip[len(clip) // 2].astype(int) for clip in read_clips(folder)]
    return sum(
        int(((one[..., 0] - one[..., 1] > 70) & (one[..., 2] - one[..., 1] > 70)).sum() >= 50)
        for one in middles
    )


def name_ground(clip: NDArray[np.uint8]) -> str:
    """Return the name of the ground that is nearest to the median color of a clip."""
    color = np.median(clip.reshape(-1, 3), axis=0)
    return min(drawing.GROUNDS, key=lambda name: float(np.abs(color - drawing.GROUNDS[name]).sum()))


def draw(trial: Trial, case: Case, path: Path) -> None:
    """Write the middle frames of the first clips with the fault, and below them those after the remedy."""
    rows = []
    for name, setup in (case.fault, case.repaired):
        clips = read_clips(trial.generate(name, setup))[: min(trial.prompts, 6)]
        frames = [
            np.pad(clip[len(clip) // 2], ((1, 1), (1, 1), (0, 0)), constant_values=255) for clip in clips
        ]
        rows.append(np.concatenate(frames, axis=1))
    Image.fromarray(np.concatenate(rows)).save(path, quality=80, method=6)


if __name__ == "__main__":
    main()
