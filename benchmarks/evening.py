"""Try a released model on this machine: cache, plan, train, generate and score, and measure all of it.

    python tools/download.py --family wan --task t2v-1.3B --to models
    python benchmarks/evening.py --family wan --task t2v-1.3B --models models

The data are drawn, or come from a folder (--data), of which a copy is used. An interrupted command continues
when it is typed again. In the end, the folder `result` in --to has page.html and figures.json, which hold no
names, paths, prompts or captions, and with --data no samples. The rest, with the LoRA, is in `work`.
"""

import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks import evening_figures as figures  # noqa: E402
from benchmarks.evening_data import CONCEPT, draw_items  # noqa: E402
from benchmarks.evening_page import ShownSample, write_evening_page  # noqa: E402
from downloads.catalogue import ModelSet  # noqa: E402
from modules.atomic_write import write_text  # noqa: E402
from modules.command import command_line, did_you_mean, quote_command  # noqa: E402
from modules.errors import INTERRUPTED, OptionError, UserError  # noqa: E402
from modules.installation import (  # noqa: E402
    RUN_GOES_ON,
    SOURCES_LEFT_OUT,
    program_environment,
)
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES  # noqa: E402
from modules.parser import Parser  # noqa: E402
from modules.text_files import parse_json, parse_toml, read_text  # noqa: E402
from project.options import RUN_FILE, find_models, script_family  # noqa: E402
from protocols.families import with_scripts  # noqa: E402
from runtime.machine import GIB, describe_machine  # noqa: E402
from training.config_options import PROJECT_TABLE  # noqa: E402
from training.reports.history import (  # noqa: E402
    HIGHEST,
    PREDICTED,
    RunHistory,
    history_path,
    read_history,
    read_session,  # noqa: E402
)
from training.reports.scores import read_scores  # noqa: E402
from training.reports.sections import SAMPLES, scores_path  # noqa: E402

NAME = "evening"  # of the trained file
DRAWING = ("items", "size", "frames", "infer_steps")  # options of drawn data and of samples
OUTPUT = "output"
SCORE_MODEL = "score_clip"  # folder in --models, as tools/download.py fills it
MEASURED = "a training step, measured"
WARM_UP = 3  # steps that are left out of the seconds of a step
AVERAGED = 20  # steps of the first and of the last loss
TAIL = 15  # lines of a log in a message
_PLANNED = re.compile(r"^(?:Needs|Fits:|Does not fit:) ([\d.]+) GiB of tensors", re.MULTILINE)
_STEP = re.compile(r"^training step, (\d+)x(\d+)(?:, (\d+) frames)?", re.MULTILINE)
_COMPARED = re.compile(r"Memory: predicted ([\d.]+) GiB, measured ([\d.]+) GiB")
_GIB = re.compile(r"([\d.]+) GiB")


@dataclass
class PhaseRecord:
    """What is known of a phase so far. An attempt that was killed adds no seconds."""

    seconds: float = 0.0
    attempts: int = 0
    is_done: bool = False
    device_bytes: int | None = None
    host_bytes: int | None = None

    def note_peaks(self, device: int | None, host: int | None) -> None:
        """Raise the peaks to those of an attempt."""
        self.device_bytes = max(filter(None, (self.device_bytes, device)), default=None)
        self.host_bytes = max(filter(None, (self.host_bytes, host)), default=None)


@dataclass
class Evening:
    """The folder of an evening, and what has been done in it."""

    folder: Path
    request: Mapping[str, Any]  # what was asked for; another request needs another folder
    machine: figures.MachineFigures
    phases: dict[str, PhaseRecord] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Folder of logs, data and results that stay here."""
        return self.folder / "work"

    @property
    def data(self) -> Path:
        """Folder of the described data, in which the commands run."""
        return self.work / "data"

    @property
    def output(self) -> Path:
        """Folder of the training's results."""
        return self.data / OUTPUT

    @property
    def result(self) -> Path:
        """Folder that can be sent to others."""
        return self.folder / "result"

    def log_of(self, phase: str) -> Path:
        """Return the file with the output of a phase."""
        return self.work / f"{phase}.log"

    def save(self) -> None:
        """Write what was done, so that the same command continues."""
        phases = {name: asdict(record) for name, record in self.phases.items()}
        content = {"request": self.request, "machine": asdict(self.machine), "phases": phases}
        write_text(self.work / "evening.json", json.dumps(content, indent=1) + "\n")

    @staticmethod
    def open(folder: Path, request: Mapping[str, Any]) -> "Evening":
        """Make the folder of an evening, or read what was done in it.

        Raises:
            OptionError: If another evening is in the folder, or one on another machine.
        """
        evening = Evening(folder, request, figures.MachineFigures.of(describe_machine()))
        evening.work.mkdir(parents=True, exist_ok=True)
        path = evening.work / "evening.json"
        if path.exists():
            content = parse_json(read_text(path))
            if content["request"] != json.loads(json.dumps(request)):
                raise OptionError(f"--to {folder} has an evening with other options. Pass another folder")
            if content["machine"]["gpu"] != evening.machine.gpu:
                raise OptionError(f"--to {folder} has an evening on another GPU. Pass another folder")
            evening.phases = {name: PhaseRecord(**record) for name, record in content["phases"].items()}
        return evening


def main() -> None:
    """Run the phases that are not done yet, then write the figures and the page."""
    parser = Parser(description=__doc__)
    parser.add_argument("--family", required=True, help="family of the model: tools/download.py --list")
    parser.add_argument("--task", required=True, help="its task")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the released files")
    parser.add_argument(
        "--model_file", action="append", default=[], help="file in another location: dit=my.safetensors"
    )
    parser.add_argument("--data", type=Path, help="folder to train on, which is copied; default: drawn data")
    parser.add_argument("--to", type=Path, default=Path("evening"), help="folder of the evening")
    parser.add_argument("--max_train_steps", type=int, default=200, help="length of the training")
    parser.add_argument("--memory", type=float, help="GiB of the card to choose options for; 0: a CPU")
    parser.add_argument("--items", type=int, default=12, help="number of drawn items")
    parser.add_argument("--size", type=int, help="width and height of drawn items; default: the model's")
    parser.add_argument("--frames", type=int, help="frames of drawn clips; default: the model's")
    parser.add_argument("--infer_steps", type=int, help="steps of a sample; default: the model's")
    args = parser.parse_args()
    model = _find_model(args.family, args.task)
    if args.data is not None and not args.data.is_dir():
        raise OptionError(f"--data {args.data}: there is no such folder")
    asked = ("family", "task", "models", "model_file", "data", "max_train_steps", "memory", *DRAWING)
    request = {name: getattr(args, name) for name in asked}
    request |= {name: str(value) for name, value in request.items() if isinstance(value, Path)}
    evening = Evening.open(args.to, request)
    _lay_out(evening, args, model)
    commands = _list_commands(evening)
    for phase in ("check", "latents", "texts", "plan"):
        _run_phase(evening, phase, commands[phase])
    _reject_too_large(evening)
    _run_phase(evening, "training", commands["training"])
    run_history = _read_run_history(evening)
    _run_phase(evening, "generation", _find_generation(run_history, commands))
    score_model = args.models.absolute() / SCORE_MODEL
    if score_model.is_dir():
        words = ["python", "tools/score.py", OUTPUT, "--model", str(score_model)]
        _run_phase(evening, "scores", [words])
    _write_result(evening, model, run_history)


def _find_model(family: str, task: str) -> ModelSet:
    names = {f"{model.family} {model.task}": model for model in find_models()}
    name = f"{family} {task}"
    if name not in names:
        raise OptionError(
            f"--family {family} --task {task} is not a model that a folder "
            f"trains.{did_you_mean(name, names)} tools/download.py --list shows all"
        )
    return names[name]


def _lay_out(evening: Evening, args: Any, model: ModelSet) -> None:
    """Make the data and let `new` describe them, unless that is done.

    Raises:
        OptionError: If files of the model are missing.
    """
    if (evening.data / RUN_FILE).exists():
        return
    drawn = args.data is None
    if drawn:
        draw_items(evening.data, model, args.items, args.size, args.frames)
    else:
        shutil.copytree(args.data, evening.data, dirs_exist_ok=True)
        (evening.data / RUN_FILE).unlink(missing_ok=True)
    words = ["new", str(evening.data), "--family", model.family, "--task", model.task, "--overwrite"]
    words += ["--models", str(args.models.absolute()), "--trigger_word", CONCEPT.word, "--train", "lora"]
    words += ["--output_name", NAME, "--max_train_steps", str(args.max_train_steps)]
    for each in args.model_file:
        name, _, path = each.partition("=")
        words += ["--model_file", f"{name}={Path(path).absolute()}"]
    if args.memory is not None:
        words += ["--memory", str(args.memory)]
    log = evening.log_of("new")
    done = subprocess.run(
        [sys.executable, str(ROOT / "reelsmith.py"), *words], capture_output=True, stdin=subprocess.DEVNULL
    )
    log.write_bytes(done.stdout + done.stderr)
    if done.returncode:
        raise UserError(f"`new` cannot describe the data:\n{_tail(log)}")
    if args.infer_steps is not None:
        prompts = evening.data / "prompts.txt"
        lines = read_text(prompts).splitlines()
        write_text(prompts, "".join(f"{line} --s {args.infer_steps}\n" for line in lines))


def _list_commands(evening: Evening) -> dict[str, list[list[str]]]:
    """Return the commands of each phase but generation and scores, from run.toml.

    Raises:
        OptionError: If files of the model are missing.
    """
    table = parse_toml(read_text(evening.data / RUN_FILE))[PROJECT_TABLE]
    download, *others = table["commands"]
    missing = [file for file in table["files"] if not (evening.data / file).exists()]
    if missing:
        raise OptionError(f"{missing[0]} is missing. Download it: {quote_command(download)}")
    training = [*others[-1], "--resume", "latest"]
    steps = str(evening.request["max_train_steps"])
    checks = [words for words in others if "--check" in words]
    caching = [words for words in others[:-1] if "--check" not in words]
    return {
        "check": checks,
        "latents": [words for words in caching if words[1].endswith("cache_latents.py")],
        "texts": [words for words in caching if words[1].endswith("cache_text_encoder_outputs.py")],
        "plan": [[*training, "--plan"]],
        "training": [[*training, "--sample_every_n_steps", steps]],
    }


def _run_phase(evening: Evening, phase: str, commands: Sequence[Sequence[str]]) -> None:
    """Run the commands of a phase in the data's folder, measured, unless it is done.

    Raises:
        UserError: If a command fails.
        KeyboardInterrupt: After Ctrl-C, when the command has ended.
    """
    record = evening.phases.setdefault(phase, PhaseRecord())
    if record.is_done or not commands:
        return
    record.attempts += 1
    evening.save()
    log = evening.log_of(phase)
    print(f"{phase}: {log}", flush=True)
    started = time.monotonic()
    code = 0
    try:
        with log.open("wb") as file:
            for words in commands:
                code = _run_measured(evening, words, file, record)
                if code and not (code == SOURCES_LEFT_OUT and phase in ("check", "latents", "texts")):
                    break
    finally:
        record.seconds += time.monotonic() - started
        evening.save()
    if code == INTERRUPTED:
        raise KeyboardInterrupt("The same command continues.")
    if code not in (0, SOURCES_LEFT_OUT):
        raise UserError(
            f"{phase} failed with code {code}. The same command continues. {log} ends:\n{_tail(log)}"
        )
    record.is_done = True
    evening.save()
    print(f"  {record.seconds:.1f} s", flush=True)


def _run_measured(evening: Evening, words: Sequence[str], log: Any, record: PhaseRecord) -> int:
    """Run a command and add its peaks of memory to a record. Returns its exit code."""
    peaks = (evening.work / "peaks.json").absolute()
    peaks.unlink(missing_ok=True)
    measured = ROOT / "benchmarks" / "evening_phase.py"
    program = [sys.executable, str(measured), str(peaks), *words[1:]]
    environment = program_environment(**{RUN_GOES_ON: "1", "PYTHONUTF8": "1"})
    with subprocess.Popen(
        program, cwd=evening.data, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    ) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it reaches the command too, which saves its state first
            process.wait()
            code = INTERRUPTED
    if peaks.exists():
        found = parse_json(read_text(peaks))
        record.note_peaks(found["device"], found["host"])
    return code


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])


def _reject_too_large(evening: Evening) -> None:
    """Raise OptionError if the plan says that the training does not fit."""
    text = read_text(evening.log_of("plan"))
    if "\nDoes not fit:" in text:
        evening.phases["plan"].is_done = False  # it is made again for other options
        evening.save()
        raise OptionError(
            f"{text[text.index('Does not fit:') :].rstrip()}\nWrite these options into [training] of "
            f"{evening.data / RUN_FILE} and type the same command again"
        )


def _read_run_history(evening: Evening) -> RunHistory:
    path = history_path(evening.output, NAME)
    session = read_session(path)
    if session is None:
        raise UserError(f"{path} is missing or damaged. Remove {evening.folder} and run again")
    return read_history(path, session)


def _find_generation(
    run_history: RunHistory, commands: Mapping[str, Sequence[Sequence[str]]]
) -> list[list[str]]:
    """Return the command that generates with the trained file, as its page shows it, if it is complete."""
    latents = next((words for words in commands["latents"] if "--check" not in words), None)
    if latents is None:
        return []
    script = f"{with_scripts()[script_family(latents)].generation_script}.py"
    for command in run_history.commands:
        words = shlex.split(command.bash)
        if not command.missing and len(words) > 1 and Path(words[1]).name == script:
            return [["python", script, *words[2:]]]
    return []


def _write_result(evening: Evening, model: ModelSet, run_history: RunHistory) -> None:
    """Write the figures, and the page from the figures alone and samples of drawn data."""
    evening.result.mkdir(exist_ok=True)
    found = collect_figures(evening, model, run_history)
    checked = figures.write_figures(evening.result / "figures.json", found)
    samples = _list_samples(evening, run_history) if checked.data == figures.DRAWN else []
    page = evening.result / "page.html"
    write_evening_page(page, checked, samples)
    print(f"\n{page} shows the evening. The folder {evening.result} can be sent: docs/proven.md says how.")


def collect_figures(evening: Evening, model: ModelSet, run_history: RunHistory) -> figures.EveningFigures:
    """Return the figures of a finished evening."""
    training = parse_toml(read_text(evening.data / RUN_FILE))["training"]
    plan = read_text(evening.log_of("plan"))
    shape = _STEP.search(plan)
    width, height, frames = (int(text or 1) for text in shape.groups()) if shape else (0, 0, 0)
    planned = _PLANNED.search(plan)
    memory = dict(run_history.memory)
    is_drawn = evening.request["data"] is None
    evening.phases["training"].note_peaks(_parse_gib(memory.get(HIGHEST, "")), None)
    losses = [loss for _, loss in sorted(run_history.loss.items()) if loss is not None]
    precision = str(training.get("mixed_precision", "no"))
    predicted = _parse_gib(memory.get(PREDICTED, ""))
    if predicted is None and planned is not None:
        predicted = round(float(planned[1]) * GIB)
    return figures.EveningFigures(
        version=figures.VERSION,
        family=model.family,
        task=model.task,
        data=figures.DRAWN if is_drawn else figures.OWN,
        items=_count_items(evening.data),
        width=width,
        height=height,
        frames=frames,
        steps=max(run_history.loss, default=0),
        precision=precision if precision in figures.PRECISIONS else "no",
        options={
            name: training[name]
            for name in figures.SPEED_OPTIONS
            if isinstance(training.get(name), (bool, int))
        },
        machine=evening.machine,
        phases=tuple(
            figures.PhaseFigures(
                name=name,
                seconds=round(record.seconds, 3),
                attempts=record.attempts,
                device_bytes=record.device_bytes,
                host_bytes=record.host_bytes,
            )
            for name in figures.PHASES
            if (record := evening.phases.get(name)) is not None and record.is_done
        ),
        step=summarize_steps(
            [seconds for _, seconds in sorted(run_history.seconds.items()) if seconds is not None]
        ),
        training_memory=figures.MemoryFigures(predicted, _parse_gib(memory.get(MEASURED, ""))),
        generation_memory=_compare_generation(evening),
        first_loss=_mean(losses[:AVERAGED]),
        last_loss=_mean(losses[-AVERAGED:]),
        scores=_collect_scores(evening),
    )


def summarize_steps(seconds: Sequence[float]) -> figures.StepFigures:
    """Return the median and the tenths of the seconds of steps, without those of the warm-up."""
    kept = sorted(seconds[min(WARM_UP, max(len(seconds) - 1, 0)) :])
    if not kept:
        return figures.StepFigures(0.0, 0.0, 0.0, 0)
    last = len(kept) - 1
    low, high = kept[round(0.1 * last)], kept[round(0.9 * last)]
    return figures.StepFigures(statistics.median(kept), low, high, len(kept))


def _count_items(folder: Path) -> int:
    media = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    left_out = {"cache", OUTPUT, "control"}
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in media)
    return sum(not left_out & set(path.relative_to(folder).parts) for path in paths)


def _compare_generation(evening: Evening) -> figures.MemoryFigures:
    log = evening.log_of("generation")
    found = _COMPARED.search(read_text(log)) if log.exists() else None
    if found is None:
        return figures.MemoryFigures(None, None)
    planned, measured = (round(float(text) * GIB) for text in found.groups())
    return figures.MemoryFigures(planned, measured)


def _collect_scores(evening: Evening) -> figures.ScoreFigures | None:
    scores = read_scores(scores_path(evening.output, NAME))
    if scores is None or not scores.rows:
        return None
    first, last = scores.rows[0], scores.rows[-1]
    return figures.ScoreFigures(first.clip, last.clip, first.likeness, last.likeness)


def _list_samples(evening: Evening, run_history: RunHistory) -> list[ShownSample]:
    """Return the samples of the first and the last step that has some."""
    rows = [run_history.samples[key] for key in sorted(run_history.samples)]
    shown = []
    for row in rows[:1] + rows[1:][-1:]:
        paths = [evening.output / SAMPLES / name for _, name in sorted(row.files.items())]
        shown += [ShownSample(row.step, path) for path in paths if path.is_file()]
    return shown


def _parse_gib(text: str) -> int | None:
    found = _GIB.fullmatch(text)
    return None if found is None else round(float(found[1]) * GIB)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


if __name__ == "__main__":
    command_line(main)
