"""Make the command lines that can follow a training: continue, generate, convert."""

import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset.batches.example import find_example
from dataset.batches.items import NO_COMMANDS, CachingCommands
from dataset.cache.commands import recall_options
from modules.command import quote_for_powershell, typed_words
from modules.console import quiet
from modules.extensions import list_named
from modules.installation import EXTENSIONS, find_script
from modules.limits import MAX_EXAMPLE_CHARACTERS
from modules.option_values import Placeholder, missing_words, option_argv
from modules.options import STARTS, option_name, option_values, options_with
from modules.repeated_options import RepeatedOption, accepted_options, fill_options
from networks.formats.comfyui import describe_kind
from networks.formats.effects import NOTES
from networks.kinds.contract import NetworkKind
from networks.module_names import read_family
from networks.names.layouts import DIFFUSERS, KNOWN, TRAINED_ON
from networks.options import NetworkOptions
from protocols.families import HIGH_NOISE, FamilyEntry
from protocols.family import Family
from protocols.full_model import trains_checkpoint
from runtime.options import say_for_generation
from training.options import ScriptOption, TrainingOptions
from training.plan import TrainingPlan
from training.reports.history import AVERAGE, THIS_RUN, PageCommand
from training.saving.files import state_pattern
from training.saving.options import LATEST_ONLY

if TYPE_CHECKING:  # it is loaded only if there are prompts
    from training.samples import Sampler

RESUMING = {"resume", "resume_from_huggingface", "resume_changed", "max_train_steps", "max_train_epochs"}
BAKED_RANK = 64  # rank of a plain LoRA that is converted from a network of full rank
EXTRACTED_RANK = 32  # rank of a LoRA that is extracted from a whole model
COMFYUI_TOOL = "ComfyUI"
STARTING = {"initial_step", "initial_epoch"}
SCALES = ("guidance_scale", f"guidance_scale_{HIGH_NOISE}")
# generation options that reproduce a sample, and the fields of `Request` that have other names
SAMPLE_OPTION_NAMES = (
    *("infer_steps", *SCALES, "cfg_schedule"),
    *("flow_shift", "sample_solver", "seed", "negative_prompt"),
)
FIELD_BY_OPTION = {"infer_steps": "steps", "sample_solver": "solver"}


@dataclass(frozen=True)
class TrainingCommand:
    """Command line of a training run, from which commands for caching and for the next steps are derived."""

    script: str = "the training script"
    script_options: Sequence[ScriptOption] = ()
    family_entry: FamilyEntry | None = None  # None: no script caches for this model or generates with it
    family_options: Any = None  # record of the family's options
    family: str = ""  # name by which cache folders remember the options of its caching commands

    @property
    def typed_flags(self) -> dict[str, str]:
        """Return the flag that the user typed for each option, by the option's public name."""
        flags = {}
        for option in self.script_options:
            if option.is_changed:
                flags[option.name] = (
                    option.arguments[0].partition("=")[0] if option.arguments else f"--{option.name}"
                )
        return flags

    def caching_commands(self, options: TrainingOptions, family: Family) -> CachingCommands:
        """Return the commands that make missing caches.

        They contain the options that follow from the checkpoint, but not the files of existing caches, which
        may belong to another model.
        """
        if self.family_entry is None:  # no script makes caches for this model
            return NO_COMMANDS
        return CachingCommands(
            partial(
                self.family_entry.caching_commands,
                self.family_options,
                options.loop.dataset_config,
                family.caching_switches,
                self.typed_flags,
                options.features.condition_set,
            )
        )


NO_COMMAND = TrainingCommand()


@dataclass(frozen=True)
class NextSteps:
    """Suggest commands to run after training, such as generating, resuming and converting."""

    plan: TrainingPlan
    command: TrainingCommand
    # values of the first sample, by the field names of `Request`; without samples, the caption and the files
    # of a training item
    sample: Mapping[str, Any]
    sample_loras: Sequence[tuple[Path, float]] = ()  # additional LoRAs of samples, with multipliers
    # options that made the caches, see `recall_options`; empty with samples, whose options name the files
    cache_options: Sequence[RepeatedOption] = ()

    @cached_property
    def converted_for(self) -> str:
        """Tool that reads LoRAs of this family only after a conversion; empty if no conversion is needed."""
        family_names = read_family({TRAINED_ON: self.plan.family.name})
        return "" if family_names is None else family_names.converted_for

    def commands(self, saved: Path | None, is_finished: bool) -> list[PageCommand]:
        """Return the suggested commands: resume, generate, convert or extract, start again.

        1. Continue the run. Generate with the file, if the model has a script.
        2. Extract a LoRA, if the whole model was trained and a file is saved.
        3. Convert a LoRA: kinds that other programs do not know to a plain LoRA, or only its tensor names.

        Args:
            saved: The file to use: the best one, or the newest. With None, if nothing is saved yet, the
                commands name the file that the end of the run will save.
            is_finished: Whether the run has completed all its steps.
        """
        file = saved or [*self.plan.names.model_files(self.plan.names.name).values()][0]
        resume = self._resume(is_finished)
        notes = [resume.note, f"Commands here are typed in the folder {Path.cwd()}."]
        values = option_values(self.plan.options)
        # options that start programs are accepted only as typed, so they are in no file that resumes the run
        for name in options_with(type(self.plan.options), "reach", STARTS["reach"]):
            if values[name] is not None:
                notes.append(f"--{name} is written into no file: add it if you want it again.")
        if self._is_of_extension:
            notes.append(f"They need {EXTENSIONS}={','.join(list_named())} in the environment.")
        commands = [replace(resume, note=" ".join(filter(None, notes)))]
        entry = self.command.family_entry
        if entry is not None and find_script(f"{entry.generation_script}.py") is not None:
            generate = self._generate(file)
            if saved is None and not file.exists():
                generate = replace(generate, note=f"{generate.note} {file.name} is not saved yet.".lstrip())
            commands.append(generate)
        # the model itself, not a network added to it
        trains_model = self.plan.options.network is None
        if trains_model and saved is not None and self._can_extract:
            commands.append(self._extract(file))
        lora = self.plan.network_spec.lora_options
        if lora is not None:
            # kinds that other programs read only after conversion to a plain LoRA
            plain_kind = next((kind for kind in lora.kinds if kind.needs_weight), None)
            if plain_kind is not None:
                commands += [self._make_plain(path, plain_kind) for path in self._list_files(file)]
            elif self.converted_for and self._needs_conversion(lora):
                commands += [self._convert_names(path) for path in self._list_files(file)]
        return [*commands, _command(THIS_RUN, self._run_arguments())]

    def _list_files(self, file: Path, suffix: str = "") -> Iterable[Path]:
        """Return the files of the save that `file` belongs to: one, or one for each expert."""
        return self.plan.names.model_files(self.plan.names.get_stem(file) + suffix).values()

    def _needs_conversion(self, lora: NetworkOptions) -> bool:
        """Return whether `converted_for` reads the saved LoRA only after a conversion."""
        lora_format = self.plan.lora_format
        if lora_format is None or lora_format.name == KNOWN:
            return True
        # saved with the names of other programs, which all read except kinds that only ComfyUI knows
        return describe_kind(lora.kind).is_only_reader and self.converted_for != COMFYUI_TOOL

    def _make_plain(self, file: Path, kind: NetworkKind) -> PageCommand:
        """Return the command that converts a trained network, such as a LoKr, to a plain LoRA."""
        # the LoRA depends on the model's weights
        arguments = ["--bake", str(BAKED_RANK), "--dit", self._find_dit(file)]
        title = f"Make a plain LoRA of the {kind.name}"
        return self._convert(file, "plain", arguments, title, NOTES.get(kind, ""))

    def _convert_names(self, file: Path) -> PageCommand:
        """Return the command that converts a LoRA for `converted_for`, such as ComfyUI."""
        network = self.plan.options.network
        tool = self.converted_for.lower()
        name_suffix = tool if tool.isalpha() else "converted"  # no spaces or signs in a file name
        arguments: list[str] = []
        # only ComfyUI reads these kinds; other tools need them as the factors of a LoRA
        is_comfyui_kind = network is not None and describe_kind(network.kind).is_only_reader
        if is_comfyui_kind and self.converted_for != COMFYUI_TOOL:
            arguments = ["--bake", str(BAKED_RANK)]
        return self._convert(file, name_suffix, arguments, f"Convert the LoRA for {self.converted_for}")

    def _convert(
        self, file: Path, name_suffix: str, arguments: Sequence[str], title: str, note: str = ""
    ) -> PageCommand:
        output = file.with_name(f"{file.stem}_{name_suffix}.safetensors")
        files = ["--input", str(file), "--output", str(output)]
        # some pipelines of diffusers load nothing under ComfyUI's prefix
        target = {"": "default", DIFFUSERS: DIFFUSERS}.get(self.converted_for, "other")
        words = ["python", "convert_lora.py", *files, "--target", target, *arguments]
        return _command(title, words, note)

    @property
    def _can_extract(self) -> bool:
        """Return whether a LoRA can be extracted: this needs two single files with equal tensor shapes."""
        family = self.plan.family
        if not trains_checkpoint(family):
            return True
        return family.is_single_file and bool(self.plan.names.suffix) and family.keeps_shapes

    def _extract(self, file: Path) -> PageCommand:
        """Return the command that extracts a LoRA from the difference of trained model and base model."""
        output = file.with_name(f"{self.plan.names.full_stem(file)}_lora.safetensors")
        files = ["--model_org", self._find_dit(file), "--model_tuned", str(file), "--save_to", str(output)]
        arguments = ["python", "networks/extract_lora_from_models.py", *files, "--dim", str(EXTRACTED_RANK)]
        note = "The difference to the base at this rank; the command says how much of it the LoRA keeps."
        return _command("Extract a LoRA from it", arguments, note)

    def _find_dit(self, file: Path) -> str:
        """Return the path of the base transformer for which a LoRA file was trained."""
        dit_files = self.plan.family.dit_files  # little noise first
        if not dit_files:
            return Placeholder("DIT_FILE")
        is_high = bool(self.plan.names.expert_names) and file.stem.endswith(HIGH_NOISE)
        return str(dit_files[-1] if is_high else dit_files[0])

    def _resume(self, is_finished: bool) -> PageCommand:
        """Return the command that continues the run or, if it has no state, starts a new one from its files.

        Args:
            is_finished: Whether the run has reached its last step.
        """
        has_state = self._has_state()
        steps = self.plan.steps.total_steps
        if is_finished and not has_state:
            return self._start_from_trained_files(steps)
        title = "Continue after a stop"
        note = "Ctrl-C saves a state and ends the run; this continues from the newest state."
        if is_finished:
            title, note = "Train longer", "From the newest state to twice as many steps."
            steps *= 2
        arguments = [*self._run_arguments(RESUMING), "--max_train_steps", str(steps), "--resume", LATEST_ONLY]
        return _command(title, arguments, note)

    def _start_from_trained_files(self, steps: int) -> PageCommand:
        """Return the command that starts a new run of `steps` steps from the trained files."""
        # the option that reads trained weights: --network_weights for a LoRA, --dit for a whole model
        start_option = "network_weights"
        if self.plan.network_spec.custom is not None:
            start_option = self.plan.network_spec.custom.start_option
        elif self.plan.options.network is None:  # the option that names the file of the trained weights
            entry, family_options = self.command.family_entry, self.command.family_options
            start_option = "dit"
            if entry is not None and family_options is not None:
                names = (
                    option_name(field) for field in fields(family_options) if field.name == entry.trained
                )
                start_option = next(names, "dit")
        experts: Sequence[str] = self.plan.names.expert_names
        if self.plan.options.network is None:
            experts = [expert.name for expert in self.plan.family.experts]
        # with a file for each expert, the file of the high-noise expert has its own option
        start_options = [
            f"{start_option}_{HIGH_NOISE}" if expert == HIGH_NOISE else start_option for expert in experts
        ] or [start_option]
        replaced_options = RESUMING | STARTING | {*start_options}
        arguments = [*self._run_arguments(without=replaced_options), "--max_train_steps", str(steps)]
        trained_files = self.plan.names.model_files(self.plan.names.name).values()
        for option, file in zip(start_options, trained_files, strict=False):
            arguments += [f"--{option}", str(file)]
        if not self.plan.options.saving.saves_state_at_end:
            arguments.append("--save_state_on_train_end")
        note = (
            "No state was saved: a new run of as many steps begins with the trained weights. It saves a "
            "state, so that the next one can continue exactly."
        )
        return _command("Train longer, as a new run from the trained file", arguments, note)

    def _run_arguments(self, without: Collection[str] = ()) -> list[str]:
        """Return this run's command line without the options in `without`."""
        options = [
            option
            for option in self.command.script_options
            if option.is_changed and option.is_typed and option.name not in without
        ]
        arguments = [word for option in options for word in option.arguments]
        script = [self.command.script]
        if self._is_of_extension:
            spec = sys.modules["__main__"].__spec__  # None: it was not started by -m
            script = [sys.argv[0]] if spec is None else ["-m", spec.name]
        return [*self._launcher(), *script, *arguments]

    @property
    def _is_of_extension(self) -> bool:
        """Whether the running script is one of an extension's family, which no command of ours names."""
        entry = self.command.family_entry
        return entry is not None and find_script(f"{entry.training_script}.py") is None

    def _launcher(self) -> list[str]:
        processes = self.plan.accelerator.num_processes
        if processes == 1:
            return ["python"]
        return ["accelerate", "launch", "--quiet", "--num_processes", str(processes)]

    def after_loss(self) -> str:
        """Return advice for a failed run: resume from the newest state, or start again if there is none."""
        if self._has_state():
            return f"Continue from the newest state: {self._resume(is_finished=False).bash}"
        return "No state was saved yet. Start the same command again; --save_state keeps one with each save."

    def _has_state(self) -> bool:
        entries = [entry.name for entry in self.plan.names.folder.iterdir()]
        return any(map(state_pattern(self.plan.names.name).fullmatch, entries))

    def _generate(self, file: Path) -> PageCommand:
        """Return the command that generates with a trained file, with the first sample's settings if any."""
        shows_sample = self.plan.options.samples.sample_prompts is not None and self.sample
        note = "The first sample again; change the prompt." if shows_sample else ""
        launcher = self._launcher() if self.plan.options.speed.modes.flags_for_generation else ["python"]
        arguments = self._generation_arguments
        assert self.command.family_entry is not None
        spellings = self.command.family_entry.spellings
        sample = self.sample
        # the files of the save, or their averages if samples show these
        average = self.plan.features.average
        shows_average = average is not None and average.is_sampled
        files = [*self._list_files(file, AVERAGE if shows_average else "")]
        sampled_file = files[0] if shows_average else file
        custom = self.plan.network_spec.custom
        # the word of an embedding in prompts is the name of its file
        if custom is not None and custom.write_prompt is not None:
            prompt = custom.write_prompt(sampled_file, sample, custom.sentences)
            sample = {**sample, "prompt": prompt}
        sample_arguments = [
            *make_sample_arguments(sample, spellings),
            *(spellings.get("save_path", "--save_path"), str(file.parent / "generated")),
        ]
        # the model's own script takes the files as LoRAs, or instead of --dit
        high_files, other_files = self._divide_by_noise(files) if custom is None else ([], [])
        arguments = self._add_trained_files(arguments, "", other_files)
        if f"--dit_{HIGH_NOISE}" in arguments:  # the command generates with both experts
            arguments = self._add_trained_files(arguments, f"_{HIGH_NOISE}", high_files)
        arguments = [*arguments, *sample_arguments]
        if custom is not None:
            arguments = [*custom.generate(sampled_file, sample, arguments)]
        return _command("Generate with it", [*launcher, *arguments], note)

    @cached_property
    def _generation_arguments(self) -> list[str]:
        """Script and options for generation, without the trained files and the settings of the sample."""
        command = self.command
        assert command.family_entry is not None
        family_options, typed = command.family_options, command.typed_flags
        if self.cache_options:
            with quiet():  # creating the record again would repeat its warnings
                family_options = fill_options(family_options, self.cache_options)
            typed = {**{option.name: option.flag for option in self.cache_options}, **typed}
        arguments = command.family_entry.generation_argv(family_options, self.sample, typed)
        return [*arguments, *option_argv(say_for_generation(self.plan.options.speed))]

    def _divide_by_noise(self, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
        """Return the files of a save for the high-noise expert, and those for all other experts."""
        by_expert: list[tuple[str, Path]] = []
        for index, expert in enumerate(self.plan.family.experts):
            by_expert.append((expert.name, files[min(index, len(files) - 1)]))  # one file may be for both
        high_files = [path for name, path in by_expert if name == HIGH_NOISE]
        return high_files, [path for name, path in by_expert if name != HIGH_NOISE]

    def _add_trained_files(self, arguments: Sequence[str], ending: str, files: Sequence[Path]) -> list[str]:
        """Add the trained files of one transformer, and the LoRAs of samples, to a command."""
        assert self.command.family_entry is not None
        arguments = [*arguments]
        loras: list[tuple[Path, float]] = []
        # trained LoRAs are added to the model; a trained whole transformer replaces --dit
        if self.plan.options.network is not None:
            loras += [(file, 1.0) for file in files]
        elif files:
            arguments = self._replace_dit(arguments, f"{self.command.family_entry.trained}{ending}", files[0])
        loras += self.sample_loras
        spellings = self.command.family_entry.spellings
        if loras:
            flag = spellings.get("lora_weight", "--lora_weight")
            arguments += [f"{flag}{ending}", *(str(path) for path, _ in loras)]
        if self.sample_loras:  # trained LoRAs alone have the multiplier 1, the default
            flag = spellings.get("lora_multiplier", "--lora_multiplier")
            arguments += [f"{flag}{ending}", *(f"{multiplier:g}" for _, multiplier in loras)]
        return arguments

    def _replace_dit(self, arguments: Sequence[str], name: str, file: Path) -> list[str]:
        """Replace a transformer in a command by a trained file."""
        assert self.command.family_entry is not None
        flags = accepted_options(self.command.family_entry.options_record("Generation"))[name].flags
        # without the option, which a release of one file does not need, it is added at the end
        index = next((index for index, word in enumerate(arguments) if word in flags), len(arguments))
        flag = arguments[index] if index < len(arguments) else f"--{name}"
        return [*arguments[:index], flag, str(file), *arguments[index + 2 :]]


def make_sample_arguments(sample: Mapping[str, Any], spellings: Mapping[str, str] | None = None) -> list[str]:
    """Return the command-line arguments that reproduce a sample.

    Args:
        sample: Values of the sample, by the field names of `Request`.
        spellings: Flags of the family's script that differ from --FIELD_NAME, by field; "" for none.
    """
    size = [sample[dimension] for dimension in ("height", "width") if sample.get(dimension)]
    values = {
        "prompt": sample.get("prompt") or Placeholder("what it should show"),
        "video_size": size if len(size) == 2 else None,
        **{name: sample.get(FIELD_BY_OPTION.get(name, name)) for name in SAMPLE_OPTION_NAMES},
    }
    flags = spellings or {}
    value_by_flag = {flags.get(name, f"--{name}"): value for name, value in values.items()}
    value_by_flag.pop("", None)  # options that the script does not have
    return option_argv(value_by_flag)


def _command(title: str, arguments: Sequence[str], note: str = "") -> PageCommand:
    """Return a command written for POSIX and Windows shells; the note lists values to fill in."""
    arguments = typed_words(arguments)
    missing = [shlex.quote(word) for word in missing_words(arguments)]
    if missing:
        note = f"Fill in {' and '.join(missing)} first: the run does not know this. {note}".rstrip()
    return PageCommand(
        title,
        bash=shlex.join(arguments),
        powershell=quote_for_powershell(arguments),
        note=note,
        missing=" ".join(missing),
    )


def plan_next_steps(plan: TrainingPlan, sampler: "Sampler | None", command: TrainingCommand) -> NextSteps:
    """Return a `NextSteps`, which suggests commands to use the trained files, such as generation."""
    if sampler is not None:
        return NextSteps(plan, command, sampler.first_values, plan.options.samples.loras())
    if not plan.accelerator.is_main_process:
        return NextSteps(plan, command, sample={})
    cache_options: Sequence[RepeatedOption] = ()
    if command.family_entry is not None and plan.options.loop.dataset_config is not None:
        folders = (table.cache_directory for table in plan.config.datasets)
        cache_options = recall_options(folders, command.family, command.family_entry)
    cached_with = {option.name: option.value for option in cache_options}
    sample = example_values(plan, cached_with)
    return NextSteps(plan, command, sample=sample, cache_options=cache_options)


def example_values(plan: TrainingPlan, cached_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caption and the files of the first training item, which a command can generate from.

    Keys are field names of `Request`, and three that only some families read: `example`, with all files of
    the item, `cached_with`, the options that made the caches, and `takes_mask`, whether masks are inputs.
    """
    item = plan.training[0]
    example = find_example(item, plan.sources.stores)
    has_references = item.table.references.rules is not None
    return {
        # a longer caption would flood the console, and systems limit the length of a command
        "prompt": example.caption if len(example.caption or "") <= MAX_EXAMPLE_CHARACTERS else None,
        "control_images": example.controls if has_references else (),
        "example": example,
        "cached_with": cached_with,
        "takes_mask": bool(plan.features.mask_input_option),
    }
