"""Answer requests of the page Blocks: a LoRA's findings, profile, strengths, previews, and its new files."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.responses import (
    Form,
    answer_file,
    answer_form,
    answer_not_found,
    answer_template,
    answer_unknown,
    read_query,
)
from browser.core.server_state import Site
from browser.folders.folders import find_file
from browser.jobs.background_jobs import name_background_job
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import WAITING, Job
from browser.jobs.render_queue import RenderJob
from browser.pages.blocks import block_commands as commands
from browser.pages.blocks import block_form
from browser.pages.blocks.block_form import LABELS, NUMBERS, BlocksForm
from browser.pages.blocks.lora_files import (
    find_lora,
    find_recipe,
    find_run_lora,
    list_experts_files,
    list_lora_files,
    list_sources,
    read_lora_file,
)
from browser.pages.blocks.measured import (
    FOLDER,
    Profile,
    ShownDiagnosis,
    diagnosis_path,
    is_outdated,
    profile_path,
    read_diagnosis,
    read_profile,
)
from browser.pages.blocks.strengths import LoraBlock, apply_text, parse_strengths, read_blocks, read_preset
from browser.runs.recipes import IMAGES, RESULTS, ModelRecipe, RenderRequest
from browser.runs.runs import FINISHED, RUNNING
from modules.atomic_write import write_text
from modules.errors import OptionError, UserError
from modules.pages.language import refusal, say
from modules.text_files import read_text

DIAGNOSE, BAKE = "diagnoselora", "bakelora"  # kinds of background jobs
MAX_PRESET_BYTES = 1 << 16
MAX_PRESETS = 100
# part of the page that shows what a button did
PART_BY_ACTION = {"diagnose": "measured", "profile": "measured", "preview": "shots", "bake": "baked"}
STRENGTHS_PART = "strengths"


class BlockPages:
    """Shows the page Blocks, and handles its buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @property
    def results_folder(self) -> Path:
        """Folder of previews, which Generate lists too."""
        return self.site.runs.root_folders[0] / RESULTS

    def show(self, request: Request) -> Response:
        """Return the page of a LoRA, with the form that the query has; without one, the list of LoRAs."""
        form = BlocksForm.from_fields(read_query(request))
        if form.run and not form.file:
            lora = find_run_lora(self.site, form.run)
            if lora is None:
                return self.answer_list(say("This run has no LoRA."))
            form = replace(form, file=str(lora), source=form.source or f"run {form.run}")
        if not form.file:
            return self.answer_list()
        return self.answer(form)

    def show_list(self, _: Request) -> Response:
        """Return the list of LoRA files as a part of the page Models."""
        values = {"files": list_lora_files(self.site)}
        return answer_template("blocks/lora_list.html", say("Blocks"), values)

    def answer_list(self, error: str = "") -> Response:
        """Return the page without a LoRA: the list of files to choose from."""
        values = {"files": list_lora_files(self.site), "message": error}
        return answer_template("blocks/loras.html", say("Blocks"), values, is_rejected=error != "")

    def answer(self, form: BlocksForm, part: str = "", error: str = "") -> Response:
        """Return the page of a LoRA.

        Args:
            form: The fields of the page.
            part: Part of the page that shows the error.
            error: Reason why a button had no effect.
        """
        try:
            lora = find_lora(self.site, form.file)
            sources = list_sources(self.site, lora)
            recipe = find_recipe(self.site, [*sources], form.source)
        except (UserError, OSError) as reason:
            return self.answer_list(str(reason))
        form = form.complete(recipe)
        diagnosis, profile = read_diagnosis(lora), read_profile(lora)
        blocks = list_blocks(diagnosis, profile)
        try:
            form = self.change_strengths(form, blocks)
            strengths = read_strengths(form, blocks)
        except (UserError, OSError) as reason:
            part, error = part or STRENGTHS_PART, error or str(reason)
            strengths = dict.fromkeys(blocks, 1.0)
        values = {
            "form": form,
            "lora": lora,
            "about": read_lora_file(lora),
            "files": list_lora_files(self.site),
            "sources": sources,
            "recipe": recipe,
            "labels": LABELS,
            "numbers": NUMBERS,
            "diagnosis": diagnosis,
            "profile": profile,
            "strengths": strengths,
            "presets": list_presets(lora),
            "name": form.text("name") or commands.suggest_name(lora),
            "part": part,
            "error": error,
            "can_write": not self.site.read_only,
            **self.measure_values(lora, form, recipe),
            **self.preview_values(lora, form, recipe),
            **self.bake_values(lora, form),
        }
        response = answer_template("blocks/blocks.html", say("Blocks"), values, is_rejected=error != "")
        if form.is_live and form.changed and not error:
            response.headers["hx-trigger"] = "strengths"  # asks for a preview
        return response

    def change_strengths(self, form: BlocksForm, blocks: Sequence[LoraBlock]) -> BlocksForm:
        """Return the form after fields of single blocks, a preset or a finding changed its strengths."""
        match form.changed:
            case block_form.BLOCK:
                return form.set_block(blocks)
            case block_form.WEAKEN:
                return form.weaken(blocks)
            case block_form.PRESET:
                typed = form.text("preset")
                path = find_file(self.site.runs, typed)
                if path is None:
                    raise refusal("Preset %(path)s: there is no such file below the folders.", path=typed)
                try:
                    return form.with_text(read_preset(read_text(path, MAX_PRESET_BYTES)))
                except UnicodeDecodeError:
                    raise refusal("Preset %(path)s: it is not text in UTF-8.", path=typed) from None
        return form

    # --- what the parts show

    def measure_values(self, lora: Path, form: BlocksForm, recipe: ModelRecipe | None) -> dict[str, Any]:
        """Return the template values of the findings and the profile: their commands, and how these stand."""
        profile_line = ""
        if recipe is not None:
            with contextlib.suppress(UserError):
                request = commands.make_request(lora, form, recipe, self.results_folder)
                argv = commands.make_profile_argv(lora, form, request)
                profile_line = format_command(argv, recipe.folder)
        job, is_paused = None, False
        with contextlib.suppress(UserError):  # the page of the queue reports it
            job = self.find_profile_job(lora)
            is_paused = self.site.queue.worker == ""
        return {
            "diagnosis_job": self.site.background_jobs.find(name_background_job(DIAGNOSE, lora)),
            "diagnosis_line": format_command(commands.make_diagnosis_argv(lora, form, recipe)),
            "is_diagnosis_outdated": is_outdated(diagnosis_path(lora), lora),
            "profile_job": job,
            "profile_line": profile_line,
            "is_profile_outdated": is_outdated(profile_path(lora), lora),
            "has_dit": bool(commands.find_dit(recipe)),
            "is_paused": is_paused,
            "queue_problem": self.site.queue.problem,
        }

    def find_profile_job(self, lora: Path) -> Job | None:
        """Return the newest job of the queue that measures the blocks of a LoRA; None if there is none."""
        output = str(profile_path(lora))
        found = None
        for job in self.site.queue.jobs():
            with contextlib.suppress(ValueError, OptionError):  # a line that somebody typed
                if commands.PROFILE in job.argv and output in job.argv:
                    found = job
        return found

    def preview_values(self, lora: Path, form: BlocksForm, recipe: ModelRecipe | None) -> dict[str, Any]:
        """Return the template values of both results: the newest jobs that were asked for exactly this."""
        shots: list[RenderJob | None] = [None, None]
        line = ""
        if recipe is not None:
            request = commands.make_request(lora, form, recipe, self.results_folder)
            jobs = commands.make_preview_jobs(request, form)
            shots = [self.find_preview(job, lora) for job in jobs]
            line = format_command(jobs[1].command, recipe.folder)
        return {
            "shots": shots,
            "preview_line": line,
            "waits_for": self.site.render_worker.waits_for,
            "worker_problem": self.site.render_worker.problem,
        }

    def find_preview(self, asked: RenderJob, lora: Path) -> RenderJob | None:
        """Return the newest job with the same request, since the LoRA file was written; None without one."""
        with contextlib.suppress(OSError):
            changed = lora.stat().st_mtime
            for job in reversed(self.site.render_worker.list_all()):
                is_same = (job.session, job.request) == (asked.session, asked.request)
                if is_same and job.created >= changed and (job.state != FINISHED or Path(job.file).is_file()):
                    return job
        return None

    def bake_values(self, lora: Path, form: BlocksForm) -> dict[str, Any]:
        """Return the template values of the new file: the command, and how the last one stands."""
        line, reason = "", ""
        try:
            named = (
                form
                if form.text("name")
                else replace(form, texts={**form.texts, "name": commands.suggest_name(lora)})
            )
            argvs = commands.make_bake_argvs(lora, named, self.find_donor(form))
            line = "\n".join(format_command(argv) for _, argv in argvs)
        except (UserError, OSError) as problem:
            reason = str(problem)
        written: list[tuple[Job, Path]] = []
        for path in list_experts_files(lora):
            job = self.site.background_jobs.find(name_background_job(BAKE, path))
            if job is not None and "--output" in job.argv[:-1]:
                written.append((job, Path(job.argv[job.argv.index("--output") + 1])))
        return {"bake_line": line, "bake_reason": reason, "written": written}

    def find_donor(self, form: BlocksForm) -> list[Path]:
        """Return the files of the LoRA whose blocks are taken; [] without one."""
        text = form.text("donor")
        return list_experts_files(find_lora(self.site, text)) if text else []

    # --- buttons

    def change(self, request: Request, fields: Form) -> Response:
        """Handle a pressed button, and return the page of the LoRA."""
        action = request.path_params["what"]
        if action not in PART_BY_ACTION:
            return answer_unknown()
        form = replace(BlocksForm.from_fields(fields), changed="")
        actions = {
            "diagnose": self.diagnose,
            "profile": self.profile,
            "preview": self.preview,
            "bake": self.bake,
        }
        try:
            lora = find_lora(self.site, form.file)
            recipe = find_recipe(self.site, [*list_sources(self.site, lora)], form.source)
            form = form.complete(recipe)
            actions[action](lora, form, recipe)
        except (UserError, OSError, ValueError) as error:
            return self.answer(form, PART_BY_ACTION[action], str(error))
        return self.answer(form)

    def diagnose(self, lora: Path, form: BlocksForm, recipe: ModelRecipe | None) -> None:
        """Start the diagnosis of a LoRA, which takes seconds."""
        if form.text("with_lora"):
            find_lora(self.site, form.text("with_lora"))
        commands.require_folder(lora)
        argv = commands.make_diagnosis_argv(lora, form, recipe)
        name = name_background_job(DIAGNOSE, lora)
        self.site.background_jobs.start(name, argv, lora.parent, within=lora.parent)

    def profile(self, lora: Path, form: BlocksForm, recipe: ModelRecipe | None) -> None:
        """Add the measurement of all blocks to the queue."""
        request = self.require_request(lora, form, recipe)
        job = self.find_profile_job(lora)
        if job is not None and job.state in (WAITING, RUNNING):
            raise refusal(
                "job %(id)s of the queue is already doing this: wait until it has ended, or stop it",
                id=job.id,
            )
        commands.require_folder(lora)
        argv = commands.make_profile_argv(lora, form, request)
        if form.text("more"):
            write_text(commands.prompts_path(lora), commands.make_prompt_lines(form))
        # the options come from a history, which another person may have written
        self.site.queue.add_and_begin(argv, request.recipe.folder, within=lora.parent)

    def preview(self, lora: Path, form: BlocksForm, recipe: ModelRecipe | None) -> None:
        """Ask for a result with full blocks and one with the strengths, unless they are there already."""
        request = self.require_request(lora, form, recipe)
        check_strengths(lora, form)
        asked = commands.make_preview_jobs(request, form)
        self.cancel_outdated(asked)
        found = [self.find_preview(job, lora) for job in asked]
        missing = [
            job
            for job, earlier in zip(asked, found, strict=True)
            if earlier is None or earlier.state not in (WAITING, RUNNING, FINISHED)
        ]
        if asked[0].request == asked[1].request:  # no strengths: both are the same result
            missing = missing[:1]
        self.site.render_worker.add(missing)

    def cancel_outdated(self, asked: Sequence[RenderJob]) -> None:
        """Cancel waiting previews of the same model and LoRA with strengths that were changed since."""
        requests = [job.request for job in asked]
        for job in self.site.render_worker.list_all():
            is_preview = job.session == asked[0].session and "lora_blocks" in job.request.get("options", {})
            if job.state == WAITING and is_preview and job.request not in requests:
                with contextlib.suppress(OptionError):  # it has begun meanwhile
                    self.site.render_worker.cancel(job.id)
                    self.site.render_worker.remove(job.id)

    def require_request(self, lora: Path, form: BlocksForm, recipe: ModelRecipe | None) -> RenderRequest:
        """Return the request for the form's prompt with a LoRA.

        Raises:
            OptionError: If there is no model for the LoRA, or if a field is not valid.
        """
        if recipe is None:
            raise refusal("No model for this LoRA is on this machine: download it on the page Models first.")
        request = commands.make_request(lora, form, recipe, self.results_folder)
        request.check()
        seed = form.text("seed")
        if not (seed.isdecimal() and len(seed) < 20):
            raise refusal("Seed %(seed)s: use a whole number, so that both results have it.", seed=seed)
        for name in IMAGES:
            for path in form.text(name).splitlines():
                is_own = path in recipe.paths  # files in the model's own command may be anywhere
                if not is_own and not self.site.runs.is_inside(recipe.folder / path):
                    raise refusal("%(path)s is outside the folders that this page shows.", path=path)
        return request

    def bake(self, lora: Path, form: BlocksForm, _: ModelRecipe | None) -> None:
        """Write a new file with the strengths, next to the LoRA."""
        check_strengths(lora, form)
        for path, argv in commands.make_bake_argvs(lora, form, self.find_donor(form)):
            name = name_background_job(BAKE, path)
            self.site.background_jobs.start(name, argv, lora.parent, within=lora.parent)

    def show_shot(self, request: Request) -> Response:
        """Respond with the result of a preview."""
        job = self.site.render_worker.find(int(request.path_params["number"]))
        if job is None or not job.file or not self.site.runs.is_inside(Path(job.file)):
            return answer_not_found()
        return answer_file(Path(job.file))


def list_blocks(diagnosis: ShownDiagnosis | None, profile: Profile | None) -> list[LoraBlock]:
    """Return the blocks of a LoRA, as far as a diagnosis or a profile has listed them."""
    names: Mapping[str, Any] = {}
    if profile is not None:
        names = dict.fromkeys(row.block for row in profile.rows)
    if diagnosis is not None:
        names = {**names, **diagnosis.norms}
    return sorted(read_blocks(names))


def read_strengths(form: BlocksForm, blocks: Sequence[LoraBlock]) -> dict[LoraBlock, float]:
    """Return the typed strength of each block that is known.

    Raises:
        OptionError: If the text is not valid, or names no block of those that are known.
    """
    if not blocks:
        parse_strengths(form.strengths)
        return {}
    return apply_text(form.strengths, blocks)


def check_strengths(lora: Path, form: BlocksForm) -> None:
    """Raise OptionError if the typed strengths are not valid, or name no block of those that are known."""
    read_strengths(form, list_blocks(read_diagnosis(lora), read_profile(lora)))


def list_presets(lora: Path) -> list[Path]:
    """Return the text files with strengths in the folder `blocks` next to a LoRA."""
    files = sorted((lora.parent / FOLDER).glob("*.txt"))
    return [path for path in files if not path.name.endswith("-prompts.txt")][:MAX_PRESETS]


def block_routes(site: Site) -> list[Route]:
    """Return the routes of the page Blocks."""
    pages = BlockPages(site)
    return [
        Route("/blocks", pages.show),
        Route("/blocks/loras", pages.show_list),
        Route("/blocks/shot/{number:int}", pages.show_shot),
        Route("/blocks/{what}", answer_form(pages.change), methods=["POST"]),
    ]
