"""Make the command lines that can follow a training: to go on, to generate and to convert; fill its page."""

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modules.contract.rules import HIGH_NOISE, ONE_EXPERT, Expert
from modules.installation import command_words
from modules.options import Options, option_values, options_with
from modules.planning.device_memory import MemoryWatch, host_peak
from modules.planning.memory_plan import gib
from networks.module_names import read_family
from networks.names.layouts import TRAINED_ON
from networks.options import NetworkOptions
from training.options import TrainingOptions, training_parser
from training.plan import TrainingPlan
from training.reports.history import History, history_path
from training.reports.page import PageCommand, PageFacts, page_path
from training.reports.reporter import NoReports, RunReporter
from training.samples import NoSampler, Sampler
from training.saving.options import LATEST_ONLY
from training.saving.states import state_pattern
from training.training_run import NoMemoryWatch

RESUMING = {"resume", "resume_from_huggingface", "resume_changed", "max_train_steps", "max_train_epochs"}
BAKED_RANK = 64  # of a plain LoRA made of a DoRA, whose change is of full rank
DORA_ELSEWHERE = (
    "A DoRA acts as trained here and in diffusers. ComfyUI takes it 3 to 14 % differently, musubi-tuner and "
    "sd-scripts leave its magnitudes out: they need a plain LoRA."
)
STARTING = {"initial_step", "initial_epoch"}
PLAIN_IN_POWERSHELL = re.compile(r"[\w./\\:=+-]+")


@dataclass(frozen=True)
class FamilyScripts:
    """Hold the scripts of a family and the options that they have besides the shared ones."""

    train: str = "the training script"
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    # given a sample as `Request` names its values: the script and the options that generate
    generation: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
    learner: type[Options] = NetworkOptions
    # all shared options, as the script has them; None: `training_parser` with `learner`
    make_parser: Callable[[], argparse.ArgumentParser] | None = None


NO_SCRIPTS = FamilyScripts()


@dataclass(frozen=True)
class GivenOptions:
    """Hold all options of a run by name, with their defaults and how they are typed."""

    actions: Sequence[argparse.Action]
    values: Mapping[str, Any]

    def rows(self, is_changed: bool) -> list[tuple[str, str]]:
        """Return names and values of the options that differ from their defaults, or of those that do not."""
        return [
            (action.dest, " ".join(_texts(self.values[action.dest])))
            for action in self.actions
            if _is_default(self.values[action.dest], _usual(action)) != is_changed
        ]

    def words(self, without: set[str]) -> list[str]:
        """Return the words to type for the same options."""
        words: list[str] = []
        for action in self.actions:
            value = self.values[action.dest]
            if action.dest not in without and not _is_default(value, _usual(action)):
                words += _typed(action, value)
        return words


def given_options(options: TrainingOptions, own: Any, scripts: FamilyScripts) -> GivenOptions:
    """Return the options of a run; own: the family's. Keys and tokens are left out."""
    make = scripts.make_parser or (lambda: training_parser(None, scripts.learner))
    parser = make()
    scripts.add_arguments(parser)
    values = option_values(own) | option_values(options)
    secret = {*options_with(type(own), "secret", True), *options_with(TrainingOptions, "secret", True)}
    known = [
        action
        for action in parser._actions
        if action.dest in values and action.dest not in secret and action.option_strings
    ]
    return GivenOptions(known, values)


@dataclass(frozen=True)
class NextSteps:
    """Make the command lines that can follow a run. `sample`: of the first sample, see `FamilyScripts`."""

    given: GivenOptions
    scripts: FamilyScripts
    options: TrainingOptions
    file: Path  # that the run ends with
    total_steps: int
    processes: int
    sample: Mapping[str, Any]
    sample_loras: Sequence[tuple[Path, float]] = ()  # that the samples have besides, with multipliers
    experts: Sequence[Expert] = ONE_EXPERT  # that are trained
    parts: Sequence[str] = ()  # what ends the names of files that belong together, see `Names`
    converted_for: str = ""  # the tool that reads LoRAs of this family only once they are converted

    def commands(self, best: Path | None, is_finished: bool) -> list[PageCommand]:
        """Return the commands: train on, generate with the best file, convert it if a tool needs that."""
        chosen = best or self.file
        found = [self._resume(is_finished)]
        if self.scripts.generation is not None:
            found.append(self._generate(self.scripts.generation, chosen))
        if self.is_dora or (self.options.network is not None and self.converted_for):
            found += [self._convert(file) for file in self._together(chosen)]
        return found

    @property
    def is_dora(self) -> bool:
        """Return whether a DoRA is trained, which tools other than diffusers do not take as it is meant."""
        return self.options.network is not None and self.options.network.decomposes

    def _convert(self, file: Path) -> PageCommand:
        """Return the command that makes a file for other tools; of a DoRA a plain LoRA."""
        title, end, note = f"Convert the LoRA for {self.converted_for}", self.converted_for.lower(), ""
        words = ["--target", "other" if self.converted_for else "default"]
        if self.is_dora:
            title, end, note = "Make a plain LoRA of the DoRA", "plain", DORA_ELSEWHERE
            is_high = bool(self.parts) and file.stem.endswith(HIGH_NOISE)
            dits = map(self.given.values.get, ("dit_high_noise",) if is_high else ("dit", "dit_high_noise"))
            dit = next(filter(None, dits), "model.safetensors")
            words += ["--bake", str(BAKED_RANK), "--dit", str(dit)]
        files = ["--input", str(file), "--output", str(file.with_name(f"{file.stem}_{end}.safetensors"))]
        return _command(title, ["python", "convert_lora.py", *files, *words], note)

    def _resume(self, is_finished: bool) -> PageCommand:
        words = ["python", self.scripts.train]
        if self.processes > 1:
            launcher = ["accelerate", "launch", "--quiet", "--num_processes", str(self.processes)]
            words = [*launcher, self.scripts.train]
        if is_finished and not self._has_state():
            return self._begin_with_files(words)
        steps = ["--max_train_steps", str(self.total_steps * (2 if is_finished else 1))]
        words += [*self.given.words(RESUMING), *steps, "--resume", LATEST_ONLY]
        if not is_finished:
            note = "Ctrl-C saves a state and ends the run; this goes on from the newest state."
            return _command("Go on after a stop", words, note)
        return _command("Train longer", words, "From the newest state to twice as many steps.")

    def after_loss(self) -> str:
        """Return the command after a run that ended without saving."""
        if self._has_state():
            return f"Go on from the newest state: {self._resume(is_finished=False).bash}"
        return "No state was saved yet. Start the same command again; --save_state keeps one with each save."

    def _has_state(self) -> bool:
        pattern = state_pattern(self._split(self.file)[0])
        return any(pattern.fullmatch(entry.name) for entry in self.file.parent.iterdir())

    def _begin_with_files(self, words: Sequence[str]) -> PageCommand:
        """Return the command that trains on from the result, with steps and an optimizer of its own."""
        is_network, files = self.options.network is not None, self._together(self.file)
        parts = self.parts if is_network else [expert.name for expert in self.experts]
        start = "network_weights" if is_network else "dit"
        starts = [f"{start}_{HIGH_NOISE}" if part == HIGH_NOISE else start for part in parts] or [start]
        given = self.given.words(RESUMING | STARTING | {*starts})
        words = [*words, *given, "--max_train_steps", str(self.total_steps)]
        for option, file in zip(starts, files, strict=False):
            words += [f"--{option}", str(file)]
        if "--save_state" not in given and "--save_state_on_train_end" not in given:
            words.append("--save_state_on_train_end")
        note = (
            "No state was saved: a new run of as many steps begins with the trained weights. It saves a "
            "state, so that the next one can go on exactly."
        )
        return _command("Train longer, as a new run from the trained file", words, note)

    def _generate(self, generation: Callable[[Mapping[str, Any]], Sequence[str]], file: Path) -> PageCommand:
        sample, words = self.sample, ["python", *generation(self.sample)]
        for end in ("", f"_{HIGH_NOISE}"):
            if f"--dit{end}" in words:
                words = self._with_file(words, end, file)
        words += _option("--prompt", sample.get("prompt") or "what it should show")
        size = [str(sample[side]) for side in ("height", "width") if sample.get(side)]
        words += ["--video_size", *size] if len(size) == 2 else []
        for name, key in (
            ("--infer_steps", "steps"),
            ("--guidance_scale", "guidance_scale"),
            ("--guidance_scale_high_noise", "guidance_scale_high_noise"),
            ("--flow_shift", "flow_shift"),
            ("--seed", "seed"),
            ("--negative_prompt", "negative_prompt"),
        ):
            words += [] if sample.get(key) is None else _option(name, _texts(sample[key])[0])
        return _command(
            "Generate with it",
            [*words, "--save_path", str(file.parent / "generated")],
            "The first sample again; change the prompt." if sample else "",
        )

    def _together(self, file: Path) -> tuple[Path, ...]:
        """Return the files that were saved together with one of them, in the order of `experts`."""
        stem, end = self._split(file)
        parts = self.parts if end else ()
        return tuple(file.with_name(f"{stem}_{part}.safetensors") for part in parts) or (file,)

    def _split(self, file: Path) -> tuple[str, str]:
        """Split a file's name before the ending of its expert: `_high_noise`, or nothing."""
        end = next((f"_{part}" for part in self.parts if file.stem.endswith(f"_{part}")), "")
        return file.stem.removesuffix(end), end

    def _with_file(self, words: Sequence[str], end: str, file: Path) -> list[str]:
        """Add the trained file, and the LoRAs of samples, for the transformer of --dit or --dit_high_noise.

        end: of the names of its options.
        """
        trained = [index for index, expert in enumerate(self.experts) if expert.name == HIGH_NOISE]
        indexes = trained if end else [index for index in range(len(self.experts)) if index not in trained]
        files = self._together(file)
        found = [files[index if len(files) > 1 else 0] for index in indexes]
        if self.options.average.sample_ema:  # what the samples show
            found = [self._average_of(each) for each in found]
        words, loras = [*words], [*self.sample_loras]
        if self.options.network is not None:
            loras = [*((each, 1.0) for each in found), *loras]
        elif found:
            words[words.index(f"--dit{end}") + 1] = str(found[0])
        words += [f"--lora_weight{end}", *(str(path) for path, _ in loras)] if loras else []
        if self.sample_loras:
            words += [f"--lora_multiplier{end}", *(f"{number:g}" for _, number in loras)]
        return words

    def _average_of(self, file: Path) -> Path:
        stem, end = self._split(file)
        return file.with_name(f"{stem}-ema{end}.safetensors")


def quote_for_powershell(words: Sequence[str]) -> str:
    """Return a command as it is typed into PowerShell: in single quotes nothing but these has a meaning."""
    return " ".join(
        word
        if PLAIN_IN_POWERSHELL.fullmatch(word)
        else "'" + re.sub("(['\u2018-\u201b])", r"\1\1", word) + "'"
        for word in words
    )


def _command(title: str, words: Sequence[str], note: str = "") -> PageCommand:
    words = command_words(words)
    return PageCommand(title, shlex.join(words), quote_for_powershell(words), note)


def _option(name: str, text: str) -> list[str]:
    """Return the words of an option; a text that begins with - goes behind an equals sign."""
    return [f"{name}={text}"] if text.startswith("-") else [name, text]


def _typed(action: argparse.Action, value: Any) -> list[str]:
    name = next(each for each in action.option_strings if each.startswith("--"))
    if action.nargs == 0:
        return [name]
    texts = _texts(value)
    return _option(name, texts[0]) if len(texts) == 1 else [name, *texts]


def _texts(value: Any) -> list[str]:
    """Return an option's value as the words of a command line."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in _texts(each)]
    return [repr(value) if isinstance(value, float) else str(value)]


def _usual(action: argparse.Action) -> Any:
    """Return the value that needs no typing: the default, or the one of an option that is not given."""
    return getattr(action, "not_given", action.default)


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, (int, float)) and isinstance(default, (int, float)):
        return value == default
    return _texts(value) == _texts(default)


def plan_next_steps(plan: TrainingPlan, scripts: FamilyScripts, sampler: Sampler | NoSampler) -> NextSteps:
    """Return a maker of the command lines that can follow the run."""
    names = read_family({TRAINED_ON: plan.family.name})
    return NextSteps(
        given_options(plan.options, plan.family.options, scripts),
        scripts,
        plan.options,
        plan.names.file(plan.output_name),
        plan.steps.total_steps,
        plan.accelerator.num_processes,
        _first_sample(plan, sampler),
        plan.options.samples.loras() if sampler.prompts else (),
        plan.family.experts,
        plan.names.parts,
        "" if names is None else names.converted_for,
    )


def make_reporter(
    plan: TrainingPlan,
    following: NextSteps,
    sampler: Sampler | NoSampler,
    memory: MemoryWatch | NoMemoryWatch,
) -> RunReporter | NoReports:
    """Return the reporter of the run, in the main process. With --no_page it keeps the last box."""
    if not plan.accelerator.is_main_process:
        return NoReports()
    folder, name, progress = plan.output_dir, plan.output_name, plan.progress
    facts = PageFacts(
        name,
        plan.family.name,
        folder,
        following.total_steps,
        following.given.rows(is_changed=True),
        following.given.rows(is_changed=False),
        following.commands,
        lambda: list_memory(plan.accelerator.device, memory),
    )
    is_written = not plan.options.logs.no_page
    history = History(history_path(folder, name), progress.session_id, progress.step, is_written)
    prompts = dict(enumerate(sampler.prompts))
    return RunReporter(
        page_path(folder, name),
        facts,
        history,
        prompts,
        progress.step,
        lambda: plan.accelerator.trackers,  # they start later
    )


def list_memory(device: torch.device, watch: MemoryWatch | NoMemoryWatch) -> Sequence[tuple[str, str]]:
    """Return the page's lines on memory: names and values."""
    host = ("most host memory of this process so far, measured", f"{gib(host_peak())} GiB")
    if device.type != "cuda":
        return [host, ("device", f"{device.type}: a prediction is made for CUDA devices (--plan)")]
    found = (
        (watch.predicted, watch.measured, watch.highest) if isinstance(watch, MemoryWatch) else (None,) * 3
    )
    labels = (
        "a training step, predicted",
        "a training step, measured",
        "highest of the run with samples, measured",
    )
    sizes = zip(labels, map(_gib, found), strict=True)
    return [("device", torch.cuda.get_device_name(device)), *sizes, host]


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{gib(size)} GiB"


def _first_sample(plan: TrainingPlan, sampler: Sampler | NoSampler) -> Mapping[str, Any]:
    """Return the values of the first sample, by the names of `Request`."""
    if not sampler.samples:
        return {}
    sample = sampler.samples[0]
    made = sample.prepared
    settled = {
        name: getattr(made, name) for name in ("width", "height", "frames", "steps", "embedded_guidance")
    }
    settled["guidance_scale"] = made.guidance_scale[0]
    for expert, scale in zip(plan.sampled.experts, made.guidance_scale, strict=True):
        if expert.name == HIGH_NOISE:
            settled[f"guidance_scale_{HIGH_NOISE}"] = scale
    settled["seed"] = made.seed if sample.is_seeded else None
    settled["flow_shift"] = made.flow_shift if plan.family.defaults.flow_shift is not None else None
    return vars(made.asked) | settled
