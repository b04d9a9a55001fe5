"""Make the command lines that can follow a training: to go on, to generate and to convert; fill its page."""

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from generation.prompt_lines import SOLVERS
from modules.contract.family import Family
from modules.contract.requests import Prepared
from modules.contract.rules import ONE_EXPERT, Expert
from modules.devices import gib, host_peak
from modules.families import HIGH_NOISE
from modules.installation import command_words
from modules.options import Options, option_values, options_with
from modules.parser import add_options
from modules.planning.device_memory import MemoryWatch
from networks.module_names import read_family
from networks.names.layouts import TRAINED_ON
from networks.options import NetworkOptions
from training.options import TrainingOptions, training_parser
from training.plan import TrainingPlan
from training.reports.history import (
    HIGHEST,
    PREDICTED,
    History,
    PageCommand,
    Start,
    describe_process,
    history_path,
)
from training.reports.reporter import RunReporter
from training.saving.files import Names
from training.saving.options import LATEST_ONLY
from training.saving.states import state_pattern

if TYPE_CHECKING:  # it is loaded only if there are prompts
    from training.samples import Sampler

RESUMING = {"resume", "resume_from_huggingface", "resume_changed", "max_train_steps", "max_train_epochs"}
BAKED_RANK = 64  # of a plain LoRA made of a DoRA, whose change is of full rank
DORA_ELSEWHERE = (
    "A DoRA acts as trained here and in diffusers. ComfyUI takes it 3 to 24 % differently, unless "
    "convert_lora.py --target other --dit MODEL wrote it. musubi-tuner and sd-scripts leave its magnitudes "
    "out: they need a plain LoRA."
)
FACTORED = ("networks.loha", "networks.lokr")  # which ComfyUI reads, but not the tools of `converted_for`
STARTING = {"initial_step", "initial_epoch"}
PLAIN_IN_POWERSHELL = re.compile(r"[\w./\\:=+-]+")
# options of a generation -> names of a sample's values
OF_SAMPLES = {
    "--infer_steps": "steps",
    "--guidance_scale": "guidance_scale",
    "--guidance_scale_high_noise": "guidance_scale_high_noise",
    "--flow_shift": "flow_shift",
    "--sample_solver": "solver",
    "--seed": "seed",
    "--negative_prompt": "negative_prompt",
}


@dataclass(frozen=True)
class FamilyScripts:
    """Hold the scripts of a family and the options that they have besides the shared ones."""

    train: str = "the training script"
    records: tuple[type[Options], ...] = ()  # of those options
    # given a sample as `Request` names its values: the script and the options that generate
    generation: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
    learner: type[Options] = NetworkOptions
    # all shared options, as the script has them; None: `training_parser` with `learner`
    make_parser: Callable[[], argparse.ArgumentParser] | None = None


NO_SCRIPTS = FamilyScripts()


class GivenOption(NamedTuple):
    """Hold an option of a run, with the words to type for it."""

    name: str
    text: str
    words: Sequence[str]
    is_changed: bool  # it differs from its default


def given_options(options: TrainingOptions, own: Any, scripts: FamilyScripts) -> list[GivenOption]:
    """Return the options of a run; own: the family's. Keys and tokens are left out."""
    parser = scripts.make_parser() if scripts.make_parser else training_parser(None, scripts.learner)
    add_options(parser, *scripts.records)
    values = option_values(own) | option_values(options)
    secret = {*options_with(type(own), "secret", True), *options_with(TrainingOptions, "secret", True)}
    found = []
    for action in parser._actions:
        if action.dest not in values or action.dest in secret or not action.option_strings:
            continue
        # the value that needs no typing: the default, or the one of an option that is not given
        value, usual = values[action.dest], getattr(action, "not_given", action.default)
        texts = _texts(value)
        are_numbers = isinstance(value, (int, float)) and isinstance(usual, (int, float))
        is_changed = value != usual if are_numbers else texts != _texts(usual)
        name = next(each for each in action.option_strings if each.startswith("--"))
        words = [name] if action.nargs == 0 else _option(name, *texts)
        found.append(GivenOption(action.dest, " ".join(texts), words, is_changed))
    return found


def _option(name: str, *texts: str) -> list[str]:
    """Return the words of an option; a text that begins with - goes behind an equals sign."""
    is_dashed = len(texts) == 1 and texts[0].startswith("-")
    return [f"{name}={texts[0]}"] if is_dashed else [name, *texts]


def _texts(value: Any) -> list[str]:
    """Return an option's value as the words of a command line."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in _texts(each)]
    return [repr(value) if isinstance(value, float) else str(value)]


@dataclass(frozen=True)
class NextSteps:
    """Make the command lines that can follow a run. `sample`: of the first sample, see `FamilyScripts`."""

    given: Sequence[GivenOption]
    scripts: FamilyScripts
    options: TrainingOptions
    names: Names
    total_steps: int
    processes: int
    sample: Mapping[str, Any]
    sample_loras: Sequence[tuple[Path, float]] = ()  # that the samples have besides, with multipliers
    experts: Sequence[Expert] = ONE_EXPERT  # that are trained
    converted_for: str = ""  # the tool that reads LoRAs of this family only once they are converted

    def commands(self, best: Path | None, is_finished: bool) -> list[PageCommand]:
        """Return the commands: train on, generate with the best file, convert it if a tool needs that."""
        chosen = best or next(iter(self.names.files(self.names.name).values()))
        found = [self._resume(is_finished)]
        if self.scripts.generation is not None:
            found.append(self._generate(self.scripts.generation, chosen))
        if self.is_dora or (self.options.network is not None and self.converted_for):
            found += [self._convert(file) for file in self.names.files(self.names.stem_of(chosen)).values()]
        here = f"Commands here are typed in the folder {Path.cwd()}."
        found[0] = replace(found[0], note=" ".join(filter(None, (found[0].note, here))))
        return found

    @property
    def is_dora(self) -> bool:
        """Return whether a DoRA is trained, which tools other than diffusers do not take as it is meant."""
        return self.options.network is not None and self.options.network.decomposes

    def _convert(self, file: Path) -> PageCommand:
        """Return the command that makes a file for other tools; of a DoRA a plain LoRA."""
        title, end, note = f"Convert the LoRA for {self.converted_for}", self.converted_for.lower(), ""
        end = end if end.isalpha() else "converted"
        words = ["--target", "other" if self.converted_for else "default"]
        if self.is_dora:
            title, end, note = "Make a plain LoRA of the DoRA", "plain", DORA_ELSEWHERE
            is_high = bool(self.names.parts) and file.stem.endswith(HIGH_NOISE)
            dits = ("dit_high_noise",) if is_high else ("dit", "dit_high_noise")
            texts = {option.name: option.text for option in self.given}
            dit = next(filter(None, map(texts.get, dits)), "model.safetensors")
            words += ["--bake", str(BAKED_RANK), "--dit", dit]
        elif self.options.network is not None and self.converted_for != "ComfyUI":
            is_factored = self.options.network.network_module in FACTORED
            words += ["--bake", str(BAKED_RANK)] if is_factored else []
        files = ["--input", str(file), "--output", str(file.with_name(f"{file.stem}_{end}.safetensors"))]
        return _command(title, ["python", "convert_lora.py", *files, *words], note)

    def _resume(self, is_finished: bool) -> PageCommand:
        """Return the command that goes on; if there is no state, a new run that begins with the result."""
        words, steps = self._launch(), self.total_steps
        title, ending = "Go on after a stop", ["--resume", LATEST_ONLY]
        note = "Ctrl-C saves a state and ends the run; this goes on from the newest state."
        without, has_state = RESUMING, self._has_state()
        if is_finished and has_state:
            title, note = "Train longer", "From the newest state to twice as many steps."
            steps *= 2
        elif is_finished:
            title = "Train longer, as a new run from the trained file"
            note = (
                "No state was saved: a new run of as many steps begins with the trained weights. It saves a "
                "state, so that the next one can go on exactly."
            )
            is_network = self.options.network is not None
            parts = self.names.parts if is_network else [expert.name for expert in self.experts]
            start = "network_weights" if is_network else "dit"
            starts = [f"{start}_{HIGH_NOISE}" if part == HIGH_NOISE else start for part in parts] or [start]
            without, ending = RESUMING | STARTING | {*starts}, []
            for start, file in zip(starts, self.names.files(self.names.name).values(), strict=False):
                ending += [f"--{start}", str(file)]
            saving = self.options.saving
            if not (saving.save_state or saving.save_state_on_train_end):
                ending.append("--save_state_on_train_end")
        for option in self.given:
            words += option.words if option.is_changed and option.name not in without else ()
        return _command(title, [*words, "--max_train_steps", str(steps), *ending], note)

    def start_again(self) -> PageCommand:
        """Return the command that this run was started with, without keys and tokens."""
        words = [word for option in self.given if option.is_changed for word in option.words]
        return _command("This run, as it was started", [*self._launch(), *words])

    def _launch(self) -> list[str]:
        launcher = ["accelerate", "launch", "--quiet", "--num_processes", str(self.processes)]
        return [*(launcher if self.processes > 1 else ["python"]), self.scripts.train]

    def after_loss(self) -> str:
        """Return the command after a run that ended without saving."""
        if self._has_state():
            return f"Go on from the newest state: {self._resume(is_finished=False).bash}"
        return "No state was saved yet. Start the same command again; --save_state keeps one with each save."

    def _has_state(self) -> bool:
        pattern = state_pattern(self.names.name)
        return any(pattern.fullmatch(entry.name) for entry in self.names.folder.iterdir())

    def _generate(self, generation: Callable[[Mapping[str, Any]], Sequence[str]], file: Path) -> PageCommand:
        sample, words = self.sample, ["python", *generation(self.sample)]
        shown = "-ema" if self.options.average.sample_ema else ""  # what the samples show
        files = [*self.names.files(self.names.stem_of(file) + shown).values()]
        trained = {index for index, expert in enumerate(self.experts) if expert.name == HIGH_NOISE}
        # to each transformer the trained file of it, and the LoRAs of samples
        for end, indexes in (("", {*range(len(self.experts))} - trained), (f"_{HIGH_NOISE}", trained)):
            if f"--dit{end}" not in words:
                continue
            found, loras = [files[index if len(files) > 1 else 0] for index in sorted(indexes)], []
            if self.options.network is not None:
                loras = [(each, 1.0) for each in found]
            elif found:
                words[words.index(f"--dit{end}") + 1] = str(found[0])
            loras += self.sample_loras
            words += [f"--lora_weight{end}", *(str(path) for path, _ in loras)] if loras else []
            if self.sample_loras:
                words += [f"--lora_multiplier{end}", *(f"{number:g}" for _, number in loras)]
        return _command(
            "Generate with it",
            [*words, *say_sample(sample), "--save_path", str(file.parent / "generated")],
            "The first sample again; change the prompt." if sample else "",
        )


def say_sample(sample: Mapping[str, Any]) -> list[str]:
    """Return the words of shared options that make a sample; see `FamilyScripts.generation`."""
    words = _option("--prompt", sample.get("prompt") or "what it should show")
    size = [str(sample[side]) for side in ("height", "width") if sample.get(side)]
    words += ["--video_size", *size] if len(size) == 2 else []
    for name, key in OF_SAMPLES.items():
        words += [] if sample.get(key) is None else _option(name, _texts(sample[key])[0])
    return words


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


def sample_values(made: Prepared, is_seeded: bool, family: Family) -> dict[str, Any]:
    """Return the values of a sample, by the names of `Request`: see `FamilyScripts.generation`."""
    values = vars(made.asked) | {
        name: getattr(made, name) for name in ("frames", "steps", "embedded_guidance")
    }
    # the one of streams that have their own is said only if the sample says it: it replaces theirs
    values["guidance_scale"] = made.asked.guidance_scale if made.rules.streams else made.guidance_scale[0]
    for expert, scale in zip(family.experts, made.guidance_scale, strict=True):
        if expert.name == HIGH_NOISE:
            values[f"guidance_scale_{HIGH_NOISE}"] = scale
    values["seed"] = made.seed if is_seeded else None
    values["flow_shift"] = made.flow_shift if family.defaults.flow_shift is not None else None
    values["solver"] = next((name for name, one in SOLVERS.items() if one == made.asked.solver), None)
    return values


def plan_next_steps(plan: TrainingPlan, scripts: FamilyScripts, sampler: "Sampler | None") -> NextSteps:
    """Return a maker of the command lines that can follow the run."""
    found = read_family({TRAINED_ON: plan.family.name})
    values: dict[str, Any] = {}
    if sampler is not None and sampler.samples:
        first = sampler.samples[0]
        values = sample_values(first.prepared, first.is_seeded, plan.sampled)
    return NextSteps(
        given_options(plan.options, plan.family.options, scripts),
        scripts,
        plan.options,
        plan.names,
        plan.steps.total_steps,
        plan.accelerator.num_processes,
        values,
        () if sampler is None else plan.options.samples.loras(),
        plan.family.experts,
        "" if found is None else found.converted_for,
    )


def make_reporter(
    plan: TrainingPlan,
    following: NextSteps,
    sampler: "Sampler | None",
    memory: MemoryWatch | None,
) -> RunReporter:
    """Return the reporter of the run. With --no_page it keeps the last box."""
    progress, device, given = plan.progress, plan.accelerator.device, following.given
    is_main = plan.accelerator.is_main_process
    is_written = is_main and not plan.options.logs.no_page
    path = history_path(plan.names.folder, plan.names.name)
    return RunReporter(
        # other processes read nothing of it
        History(path, progress.session_id, progress.step if is_main else 0, is_written),
        Start(
            plan.family.name,
            following.total_steps,
            [(option.name, option.text) for option in given if option.is_changed],
            [(option.name, option.text) for option in given if not option.is_changed],
            True,
            describe_process(),
        ),
        {} if sampler is None else dict(enumerate(sampler.prompts)),
        progress.step,
        lambda best, is_finished: [*following.commands(best, is_finished), following.start_again()],
        lambda: list_memory(device, memory),
        lambda: plan.accelerator.trackers if is_main else (),  # they start later
    )


def list_memory(device: torch.device, watch: MemoryWatch | None) -> Sequence[tuple[str, str]]:
    """Return the page's lines on memory: names and values."""
    host = ("most host memory of this process so far, measured", f"{gib(host_peak())} GiB")
    if device.type != "cuda":
        return [host, ("device", f"{device.type}: a prediction is made for CUDA devices (--plan)")]
    sizes: tuple[int | None, ...] = (None, None, None)
    if watch is not None:
        sizes = watch.predicted, watch.measured, watch.highest
    labels = PREDICTED, "a training step, measured", HIGHEST
    shown = ["not known" if size is None else f"{gib(size)} GiB" for size in sizes]
    return [("device", torch.cuda.get_device_name(device)), *zip(labels, shown, strict=True), host]
