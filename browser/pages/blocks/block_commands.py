"""The commands of the page Blocks: diagnosis, profile, new file, and results with and without strengths."""

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from browser.jobs.render_queue import RenderJob
from browser.pages.blocks.block_form import LABELS, BlocksForm
from browser.pages.blocks.lora_files import SUFFIX, list_experts_files, list_used_loras
from browser.pages.blocks.measured import FOLDER, diagnosis_path, profile_path
from browser.pages.blocks.strengths import parse_strengths
from browser.runs.comparable_runs import LORA, group_options
from browser.runs.recipes import FIELDS, STRENGTHS, ModelRecipe, RenderRequest
from modules.option_values import option_argv
from modules.pages.language import refusal
from modules.text_files import bad_character, real_path
from protocols.families import HIGH_NOISE, LOW_NOISE

PROFILE = "tools/profile_blocks.py"
DIT = "--dit"
# options of a generation that the profile sets itself, or that it has no use for
NOT_PROFILED = (LORA, f"{LORA}_{HIGH_NOISE}", STRENGTHS, f"{STRENGTHS}_{HIGH_NOISE}", "--save_path")


def make_diagnosis_argv(lora: Path, form: BlocksForm, recipe: ModelRecipe | None) -> list[str]:
    """Return the command that diagnoses a LoRA, alone or together with a second one or its model."""
    argv = ["python", "tools/diagnose.py", str(lora), "--json", str(diagnosis_path(lora))]
    if form.text("with_lora"):
        argv += ["--with_lora", form.text("with_lora")]
    dit = find_dit(recipe)
    if form.reads_model and recipe is not None and dit:
        argv += [DIT, str((recipe.folder / dit).absolute())]
    return argv


def find_dit(recipe: ModelRecipe | None) -> str:
    """Return the transformer file of a recipe; "" if its command names none or several."""
    paths = () if recipe is None else recipe.fixed_options.get(DIT, ())
    return paths[0] if len(paths) == 1 else ""


def make_request(lora: Path, form: BlocksForm, recipe: ModelRecipe, save_path: Path) -> RenderRequest:
    """Return the request for a result of the form's prompt with a LoRA at full strength of its blocks."""
    references = [line.strip() for line in form.text("references").splitlines() if line.strip()]
    texts = {**recipe.initial_texts, **{name: form.text(name) for name in LABELS}}
    return RenderRequest(
        recipe=recipe,
        prompt=form.text("prompt"),
        texts={name: text for name, text in texts.items() if name in FIELDS and name != "references"},
        loras=list_used_loras(lora, recipe, form.multiplier),
        save_path=str(save_path),
        references=references,
        labels=LABELS,
    )


def make_preview_jobs(request: RenderRequest, form: BlocksForm) -> tuple[RenderJob, RenderJob]:
    """Return the jobs that generate a result with full blocks and one with the form's strengths.

    Both have the same seed, and the process with the loaded model serves both.
    """
    before = _with_strengths(request.as_render_job(form.text("seed")), "", len(request.loras))
    after = _with_strengths(request.as_render_job(form.text("seed")), form.strengths, len(request.loras))
    return before, after


def _with_strengths(job: RenderJob, text: str, num_files: int) -> RenderJob:
    """Return a job with strengths of the blocks of each LoRA file."""
    texts = [text] * num_files
    options: dict[str, Any] = {**job.request["options"], "lora_blocks": texts}
    command = [*job.command, *option_argv({"--lora_blocks": texts})] if text else job.command
    return replace(job, request={**job.request, "options": options}, command=command)


def make_profile_argv(lora: Path, form: BlocksForm, request: RenderRequest) -> list[str]:
    """Return the command that measures each block of a LoRA with the form's prompts.

    Further prompts are lines of a file, so the first prompt is then one too.
    """
    recipe = request.recipe
    options: dict[str, Any] = {"--family": recipe.family}
    for used in request.loras:
        options["--lora_high_noise" if used.expert == HIGH_NOISE else "--lora"] = used.path
    if "--lora" not in options:  # a file for high noise alone
        raise refusal("A profile needs the file for low noise too: %(name)s.", name=LOW_NOISE)
    if form.multiplier != "1":
        options["--lora_multiplier"] = form.multiplier
    options["--json"] = str(profile_path(lora))
    for flag, words in group_options(request.command(form.text("seed"))[2:]).items():
        if flag not in NOT_PROFILED:
            options[flag] = words or True
    if form.text("more"):
        del options["--prompt"]
        options["--from_file"] = str(prompts_path(lora))
    return ["python", PROFILE, *option_argv(options)]


def prompts_path(lora: Path) -> Path:
    """Return the path of the prompts of a profile."""
    return lora.parent / FOLDER / f"{lora.stem}-prompts.txt"


def make_prompt_lines(form: BlocksForm) -> str:
    """Return the prompts of a profile, one a line."""
    return "".join(f"{line}\n" for line in (form.text("prompt"), *form.text("more").splitlines()) if line)


def make_bake_argvs(
    lora: Path, form: BlocksForm, donor_files: Sequence[Path]
) -> list[tuple[Path, list[str]]]:
    """Return each file of a LoRA with the command that writes it with the form's strengths.

    Args:
        lora: The LoRA file; of a pair for two experts, both files are written.
        form: The strengths, the blocks of the donor, and the name of the new file.
        donor_files: Files of the LoRA whose blocks replace those of this one; empty without a donor.

    Raises:
        OptionError: If nothing would change, or if the new file cannot be written.
    """
    strengths, donor_blocks = form.strengths, form.text("donor_blocks")
    if not strengths and not (donor_files and donor_blocks):
        raise refusal("Nothing would change: set the strength of a block, or take blocks of a donor.")
    if bool(donor_files) != bool(donor_blocks):
        raise refusal("Choose the donor, and type which of its blocks to take, such as 10-19=1.")
    parse_strengths(strengths)
    parse_strengths(donor_blocks)
    files = list_experts_files(lora)
    commands = []
    for index, path in enumerate(files):
        argv = ["python", "tools/blocks.py", str(path)]
        if strengths:
            argv += option_argv({"--lora_blocks": strengths})
        if donor_files:
            donor = donor_files[index] if len(donor_files) == len(files) else donor_files[0]
            argv += ["--donor", str(donor), *option_argv({"--donor_blocks": donor_blocks})]
        commands.append((path, [*argv, "--output", str(find_output(path, files, form.text("name")))]))
    return commands


def find_output(path: Path, files: Sequence[Path], name: str) -> Path:
    """Return the path of a new file next to a LoRA file.

    Args:
        path: The LoRA file.
        files: All files of the LoRA.
        name: Typed name of the new file.

    Raises:
        OptionError: If it is no name of a new file.
    """
    stem = name.removesuffix(SUFFIX)
    if not stem or Path(stem).name != stem or stem[0] == "." or bad_character(stem) is not None:
        raise refusal("Name of the new file: type one without folders, such as my_lora_weaker.")
    ending = ""
    for expert in (LOW_NOISE, HIGH_NOISE):
        if len(files) > 1 and f"_{expert}." in path.name:
            ending = f"_{expert}"
    output = path.with_name(f"{stem}{ending}{SUFFIX}")
    if output.exists() or output.is_symlink():
        raise refusal("%(name)s exists already: type another name.", name=output.name)
    return output


def suggest_name(lora: Path) -> str:
    """Return a free name for a new file next to a LoRA."""
    stem = lora.stem.removesuffix(f"_{LOW_NOISE}").removesuffix(f"_{HIGH_NOISE}")
    number = 1
    while any(lora.parent.glob(f"{glob.escape(stem)}_blocks{number if number > 1 else ''}[._]*")):
        number += 1
    return f"{stem}_blocks{number if number > 1 else ''}"


def require_folder(lora: Path) -> Path:
    """Return the folder for what is measured about a LoRA, which is created.

    Raises:
        OptionError: If it is a link.
        OSError: If it cannot be created.
    """
    folder = lora.parent / FOLDER
    folder.mkdir(exist_ok=True)
    if real_path(folder) != real_path(lora.parent) / FOLDER:
        raise refusal("%(folder)s is a link", folder=folder)
    return folder
