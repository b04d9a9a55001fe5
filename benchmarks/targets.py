"""Measure which targets of docs/targets.md keep the few steps of a distilled model while it is trained.

    python benchmarks/targets.py FOLDER

The pocket model is distilled to 4 steps with guidance in it (`pocket/distil.py`). Then LoRAs are trained on a
color that it has no word for, from 12 clips in addition to 24 of what it knows, each with another target and
with several seeds, by the commands that users type. Clips of prompts with the word and without are generated
in 4 steps, of equal noise. Two things are measured:

A training adapter is made first, by plain training on clips of the distilled model itself, whose latents are
kept; another training has it in its steps (docs/training.md). Its own figures are those of a broken model in
4 steps, as it is to unlearn them.

- learned: the fraction of clips of the word that have the color, and that also have the shape and the
direction of the prompt, as the detectors of the tests see them
- kept: the distance of the clips without the word from those of the pocket model with guidance and 20 steps,
against the distance of the distilled model without a LoRA; and the fraction with the right shape, color and
direction

FOLDER keeps what is done, so that the command continues where it was.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402  # the project's modules are found from here on
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

import wan_cache_latents  # noqa: E402
import wan_cache_text_encoder_outputs  # noqa: E402
import wan_generate_video  # noqa: E402
import wan_train_network  # noqa: E402
from checkpoints.writing import save_tensors  # noqa: E402
from modules.atomic_write import write_text  # noqa: E402
from pocket import distil  # noqa: E402
from pocket.clips import write_clips  # noqa: E402
from pocket.concepts import CLIPS, CONCEPTS, KNOWN_CLIPS, draw_known  # noqa: E402
from pocket.measure import CLIP, IN_FLOAT32, POCKET, Asked, judge, read_verdicts, some_prompts  # noqa: E402

WORD = "zindle"
FIRST_SEED, FIRST_WORD_SEED, FIRST_OWN_SEED = 30000, 40000, 50000
OWN_CLIPS = 64  # that a training adapter is made of
DATASET = """[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = 8

[[datasets]]
video_directory = '{folder}/clips'
cache_directory = '{folder}/cache'
target_frames = [17]
num_repeats = 4
caption_dropout_rate = {dropout}

# clips of what the model knows already, so that it does not forget it
[[datasets]]
video_directory = '{folder}/known_clips'
cache_directory = '{folder}/known_cache'
target_frames = [17]
caption_dropout_rate = {dropout}
"""
OWN_DATASET = """[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = 8

[[datasets]]
video_directory = '{folder}/own'
cache_directory = '{folder}/own_cache'
target_frames = [17]
"""
DROPOUT = 0.3  # of the trainings with a teacher that knows more
PLAIN_DATA, DROPPED_DATA = "dataset.toml", "dropped.toml"
TEXTS = ("--vae", str(POCKET / "vae.safetensors"), "--t5", str(POCKET / "t5.safetensors"))
FEW_STEPS = ("--infer_steps", "4", "--guidance_scale", "1")
MANY_STEPS = ("--infer_steps", "20", "--guidance_scale", "3")
UNGUIDED = ("--infer_steps", "20", "--guidance_scale", "1")
BASE_LORA = (
    "{base_lora}"  # stands for the file of the LoRA that the base model has learned with the same seed
)
ADAPTER = "{adapter}"  # stands for the file of the training adapter


@dataclass(frozen=True)
class Way:
    """How a LoRA is trained and used."""

    name: str
    options: tuple[str, ...] = ()
    data: str = PLAIN_DATA
    is_of_base: bool = False  # learned by the model before it was distilled
    share_of_steps: float = 1.0


GUIDED = ("--guided_target", "3", "--guided_target_min_timestep", "150")
TEACHER = ("--teacher", "base", "--teacher_max_timestep", "750")
FOCUS = ("--timestep_focus", "0.5", "--timestep_focus_range", "400", "800")
TRANSFER = (
    *("--network_weights", BASE_LORA, "--teacher", "dit", "--teacher_dit", str(POCKET / "dit.safetensors")),
    *("--teacher_lora", BASE_LORA, "--teacher_weight", "1"),
)
WAYS = (
    Way("plain"),
    Way("with a training adapter", ("--training_adapter", ADAPTER)),
    Way("guided target 3, from 150 on", GUIDED),
    Way("teacher base with a band, captions dropped", TEACHER, DROPPED_DATA),
    Way("focus on 400 to 800", FOCUS),
    Way("LoRA of the base model, as it is", is_of_base=True),
    Way("the same, taught by the base model", TRANSFER, share_of_steps=0.5),
    Way("the same, with --teacher_delta", (*TRANSFER, "--teacher_delta"), share_of_steps=0.5),
)


@dataclass(frozen=True)
class Figures:
    """Figures of the clips of a LoRA, or without one."""

    learned: float  # share of clips of the word with its color
    whole: float  # also with the shape and direction of the prompt
    distance: float  # of clips without the word from the pocket model's, root mean square of the latents
    right: float  # share of clips without the word with shape, color and direction of the prompt


def main() -> None:
    """Train and measure all LoRAs, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, default=8, help="with the word, and as many without")
    parser.add_argument("--steps", type=int, default=48, help="of each training")
    parser.add_argument("--adapter_steps", type=int, default=150, help="of the training adapter's training")
    parser.add_argument("--ways", nargs="+", default=[], metavar="NAME", help="names of trainings to do")
    parser.add_argument("--only_report", action="store_true", help="print what is measured already")
    args = parser.parse_args()
    trial = Trial(args.folder.resolve(), args.prompts, args.steps, args.adapter_steps)
    ways = [way for way in WAYS if way.name in args.ways] if args.ways else WAYS
    if not args.only_report:
        trial.prepare()
        for seed in args.seeds:
            for way in ways:
                trial.measure(way, seed)
        if not args.ways or any(ADAPTER in way.options for way in ways):
            trial.measure_adapter()
    report(trial, args.seeds)


@dataclass(frozen=True)
class Trial:
    """The folder of a trial, and its size."""

    folder: Path
    prompts: int
    steps: int
    adapter_steps: int

    @property
    def turbo(self) -> Path:
        """File of the distilled model."""
        return self.folder / "turbo.safetensors"

    def prepare(self) -> None:
        """Distill the model, write and cache the clips, generate the clips to compare with."""
        distil.main([str(self.folder)])
        write_clips(self.folder / "clips", CLIPS, seed=1, make=CONCEPTS[WORD].make)
        write_clips(self.folder / "known_clips", KNOWN_CLIPS, seed=3, make=draw_known)
        for name, dropout in ((PLAIN_DATA, 0), (DROPPED_DATA, DROPOUT)):
            text = DATASET.format(folder=self.folder.as_posix(), dropout=dropout)
            write_text(self.folder / name, text)
            dataset = ["--dataset_config", str(self.folder / name), "--skip_existing"]
            wan_cache_latents.main([*dataset, *TEXTS[:2], "--vae_dtype", "float32"])
            wan_cache_text_encoder_outputs.main([*dataset, *TEXTS[2:], "--empty_prompt"])
        self.make("reference", POCKET / "dit.safetensors", MANY_STEPS, words=False)
        for words in (True, False):
            self.make("before", self.turbo, FEW_STEPS, words=words)
        self.make("base_few", POCKET / "dit.safetensors", FEW_STEPS, words=False)

    def measure(self, way: Way, seed: int) -> None:
        """Train a LoRA and generate its clips, unless that is done."""
        lora = self.train(way, seed)
        for words in (True, False):
            self.make(
                f"{_slug(way)}_{seed}", self.turbo, (*FEW_STEPS, "--lora_weight", str(lora)), words=words
            )

    def measure_adapter(self) -> None:
        """Generate clips with the training adapter alone in few and many steps, and without it in many."""
        use = ("--lora_weight", str(self.train_adapter()))
        self.make("adapter_few", self.turbo, (*FEW_STEPS, *use), words=False)
        self.make("adapter_many", self.turbo, (*MANY_STEPS, *use), words=False)
        self.make("adapter_unguided", self.turbo, (*UNGUIDED, *use), words=False)
        self.make("turbo_unguided", self.turbo, UNGUIDED, words=False)

    def train(self, way: Way, seed: int) -> Path:
        """Train a LoRA unless its file exists, and return the file."""
        output = self.folder / "loras" / f"{_slug(way)}_{seed}"
        path = output / "lora.safetensors"
        if path.exists():
            return path
        base_lora = self.folder / "loras" / f"{_slug(_base_way())}_{seed}" / "lora.safetensors"
        if BASE_LORA in way.options:
            base_lora = self.train(_base_way(), seed)
        options = [word.replace(BASE_LORA, str(base_lora)) for word in way.options]
        if ADAPTER in options:
            options[options.index(ADAPTER)] = str(self.train_adapter())
        dit = POCKET / "dit.safetensors" if way.is_of_base else self.turbo
        data = self.folder / way.data
        steps = round(self.steps * way.share_of_steps)
        run_training(dit, data, path, ["--max_train_steps", str(steps), "--seed", str(seed), *options])
        return path

    def train_adapter(self) -> Path:
        """Make a training adapter of clips that the distilled model makes, unless its file exists."""
        path = self.folder / "loras" / "adapter" / "lora.safetensors"
        if path.exists():
            return path
        data = self.folder / "own.toml"
        write_text(data, OWN_DATASET.format(folder=self.folder.as_posix()))
        own = self.folder / "own"
        asked = some_prompts(OWN_CLIPS, FIRST_OWN_SEED)
        make_clips(own, self.turbo, FEW_STEPS, asked)
        for clip in own.glob("*.mp4"):
            write_text(clip.with_suffix(".txt"), asked[int(clip.stem.split("_")[-1])].prompt)
        dataset = ["--dataset_config", str(data), "--skip_existing"]
        wan_cache_latents.main([*dataset, *TEXTS[:2], "--vae_dtype", "float32"])
        wan_cache_text_encoder_outputs.main([*dataset, *TEXTS[2:], "--empty_prompt"])
        keep_latents(own, self.folder / "own_cache")
        steps = ["--max_train_steps", str(self.adapter_steps), "--seed", "1", "--make_adapter", "own"]
        run_training(self.turbo, data, path, steps)
        return path

    def make(self, of: str, dit: Path, options: Sequence[str], words: bool) -> None:
        """Generate clips with or without the word, unless they exist; keep latents and videos."""
        folder = self.folder / "made" / of / ("word" if words else "known")
        asked = self.asked(words)
        if len(list(folder.glob("*.mp4"))) == len(asked):
            return
        make_clips(folder, dit, options, asked)

    def asked(self, words: bool) -> Mapping[int, Asked]:
        """Return the prompts with or without the word, by seed."""
        if words:
            return some_prompts(self.prompts, FIRST_WORD_SEED, CONCEPTS[WORD])
        return some_prompts(self.prompts, FIRST_SEED)

    def figures(self, name: str) -> Figures:
        """Return the figures of a LoRA's clips."""
        folder = self.folder / "made" / name
        of_word = judge(self.asked(True), read_verdicts(folder / "word"))
        known = judge(self.asked(False), read_verdicts(folder / "known"))
        return Figures(of_word.colour, of_word.all_three, self.distance(name), known.all_three)

    def is_measured(self, name: str) -> bool:
        """Return whether all clips of a name exist."""
        folders = [self.folder / "made" / name / kind for kind in ("word", "known")]
        return all(len(list(folder.glob("*.mp4"))) >= self.prompts for folder in folders)

    def figures_known(self, name: str) -> Figures:
        """Return the figures of clips that were generated without the word."""
        known = judge(self.asked(False), read_verdicts(self.folder / "made" / name / "known"))
        return Figures(0.0, 0.0, self.distance(name), known.all_three)

    def distance(self, name: str) -> float:
        """Return the distance of the latents without the word from the reference's, of equal noise."""
        made, reference = (_latents(self.folder / "made" / each / "known") for each in (name, "reference"))
        return float((made - reference).square().mean().sqrt())


def run_training(dit: Path, data: Path, path: Path, options: Sequence[str]) -> None:
    """Train a LoRA of rank 16 on the data and write it to `path`."""
    network = "--network_module networks.lora_wan --network_dim 16 --network_alpha 16 --learning_rate 3e-3"
    times = "--timestep_sampling shift --discrete_flow_shift 3.0 --mixed_precision no --sdpa"
    files = ["--dit", str(dit), *TEXTS, "--output_dir", str(path.parent), "--output_name", path.stem]
    dataset = ["--dataset_config", str(data), "--max_data_loader_n_workers", "0"]
    words = ["--task", "t2v-1.3B", *IN_FLOAT32, *files, *dataset, *network.split(), *times.split()]
    wan_train_network.main([*words, "--lr_scheduler", "cosine", *options])


def make_clips(folder: Path, dit: Path, options: Sequence[str], asked: Mapping[int, Asked]) -> None:
    """Generate the clips that prompts ask for; keep latents and videos."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lines = folder.parent / f"{folder.name}.txt"
    write_text(lines, "".join(f"{each.prompt} --d {seed}\n" for seed, each in asked.items()))
    files = ["--task", "t2v-1.3B", "--dit", str(dit), *TEXTS, *IN_FLOAT32]
    how = ["--sample_solver", "vanilla", "--flow_shift", "3", "--output_type", "both", "--device", "cpu"]
    wan_generate_video.main(
        [*files, *CLIP, *how, *options, "--from_file", str(lines), "--save_path", str(folder)]
    )


def keep_latents(made: Path, cache: Path) -> None:
    """Replace the latents of cached clips by those that they were decoded from."""
    for path in made.glob("*_latent.safetensors"):
        stem = path.stem.removesuffix("_latent")
        (entry,) = (one for one in cache.glob(f"{stem}_*_wan.safetensors"))
        tensors = load_file(entry)
        (name,) = (name for name in tensors if name.startswith("latents_"))
        tensors[name] = load_file(path)["latent"].to(tensors[name].dtype)
        save_tensors(entry, tensors)  # without the record, which is of what was encoded


def _base_way() -> Way:
    return next(way for way in WAYS if way.is_of_base)


def _slug(way: Way) -> str:
    return re.sub(r"[^a-z0-9]+", "_", way.name.lower())


def _latents(folder: Path) -> Tensor:
    """Return the latents of a folder's clips in the order of their seeds, N C F H W."""
    by_seed = {}
    for path in folder.glob("*_latent.safetensors"):
        seed = re.search(r"_(\d+)_latent$", path.stem)
        assert seed is not None, path
        by_seed[int(seed[1])] = load_file(path)["latent"]
    return torch.stack([by_seed[seed] for seed in sorted(by_seed)])


def report(trial: Trial, seeds: Sequence[int]) -> None:
    """Print mean and spread (lowest to highest) over seeds; distances relative to those before training."""
    before = trial.figures("before")
    rows = {
        "distilled model, no LoRA": [before],
        "pocket model in 4 steps": [trial.figures_known("base_few")],
    }
    for name, title in (
        ("turbo_unguided", "distilled model, 20 steps"),
        ("adapter_few", "training adapter alone, 4 steps"),
        ("adapter_unguided", "training adapter alone, 20 steps"),
        ("adapter_many", "training adapter alone, 20 steps with guidance"),
    ):
        if (trial.folder / "made" / name).exists():
            rows[title] = [trial.figures_known(name)]
    for way in WAYS:
        names = [f"{_slug(way)}_{seed}" for seed in seeds]
        rows[way.name] = [trial.figures(name) for name in names if trial.is_measured(name)]
    print("| trained | seeds | color learned | and shape, direction | distance of others | others right |")
    print("|---|---|---|---|---|---|")
    for name, figures in rows.items():
        if not figures:
            continue
        learned = [_percent(figures, attribute) for attribute in ("learned", "whole")]
        distance = _spread([each.distance / before.distance for each in figures], "{:.2f}")
        print(
            f"| {name} | {len(figures)} | {' | '.join(learned)} | {distance} | {_percent(figures, 'right')} |"
        )
    write_text(
        trial.folder / "figures.json",
        json.dumps({name: [asdict(each) for each in figures] for name, figures in rows.items()}, indent=1),
    )


def _percent(figures: Sequence[Figures], attribute: str) -> str:
    return _spread([100 * getattr(each, attribute) for each in figures], "{:.0f} %")


def _spread(values: Sequence[float], form: str) -> str:
    """Return the mean, and the lowest and the highest value in brackets."""
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    low, high = (form.format(value).removesuffix(" %") for value in (min(values), max(values)))
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
