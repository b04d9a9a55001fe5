"""The Generate page: a form for an image or clip, the state of render jobs, and the results of all days."""

import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from browser.core.page_root import add_root
from browser.core.responses import (
    Form,
    answer_form,
    answer_json,
    answer_not_found,
    answer_template,
    answer_unknown,
    read_query,
)
from browser.core.server_state import Site
from browser.core.state_names import name_state
from browser.jobs import launch
from browser.jobs.command_lines import format_command
from browser.jobs.render_queue import RenderJob
from browser.jobs.render_worker import IDLE_SECONDS
from browser.pages.generate.dropped_files import FOLDER as INPUTS
from browser.pages.generate.dropped_files import InputFolder
from browser.pages.generate.dropped_settings import DroppedSettings, read_dropped_settings
from browser.pages.generate.form_drafts import Drafts
from browser.pages.generate.lora_rows import (
    BOTH,
    LoraRow,
    RunLoras,
    check_family,
    choose_expert,
    list_downloaded,
    select_default_loras,
)
from browser.runs.recipes import (
    FIELDS,
    IMAGES,
    RESULTS,
    ModelRecipe,
    RenderRequest,
    UsedLora,
    can_generate,
    find_flag,
    find_model_set,
    make_model_recipe,
    make_run_recipe,
)
from downloads.catalogue import model_sets
from modules.control_codes import shorten
from modules.errors import MediaError, UserError
from modules.media.reading import read_tags
from modules.pages.language import join, refusal, say, say_count, show
from modules.paths import complete_home, strip_quotes
from modules.text_files import real_path
from protocols.families import HIGH_NOISE, LOW_NOISE

MAX_AT_ONCE = 64  # maximum number of results per request
SEVERAL_SEEDS = 4  # number of results of "Make with four seeds"
MAX_ENDED_JOBS = 12  # maximum number of stopped, failed or warning jobs shown
MAX_REASON_LENGTH = 400  # characters: a sentence with its remedy and two paths
LABELS = {
    "prompt": say("Prompt"),
    "negative": say("Negative"),
    "width": say("Width"),
    "height": say("Height"),
    "frames": say("Frames"),
    "layers": say("Layers"),
    "steps": say("Steps"),
    "guidance": say("Guidance"),
    "cfg": say("CFG"),
    "high_cfg": say("CFG at high noise"),
    "seed": say("Seed"),
    "start": say("Start from"),
    "end": say("End with"),
    "control": say("Follow"),
    "references": say("Edit"),
    "redraw": say("Redraw"),
    "share": say("Share to regenerate"),
    "count": say("How many"),
    "lora_file": say("LoRA file"),
    "lora_strength": say("Its strength"),
}
# in the order of the form
NUMBER_FIELDS = ("width", "height", "frames", "layers", "steps", "guidance", "cfg", "high_cfg", "share")
FIELD_NOTES = {
    "start": say("the first image"),
    "end": say("the last image"),
    "control": say("a clip whose motion is followed"),
    "references": say("images to edit, one a line"),
    "redraw": say("an image or clip that is partly regenerated"),
}
FILE_CHOOSER_LABELS = {
    "start": say("file of the first image"),
    "end": say("file of the last image"),
    "control": say("file of the clip"),
    "references": say("files of images"),
    "redraw": say("file of the image or clip"),
}
EXPERT_LABELS = {BOTH: say("both parts"), HIGH_NOISE: say("high noise"), LOW_NOISE: say("low noise")}
SEED_BITS = 32


@dataclass(frozen=True)
class GenerateForm:
    """Field values of the Generate page."""

    source: str = ""  # `run ID` or `model FAMILY TASK`
    field_values: Mapping[str, str] = field(default_factory=dict)  # typed text of each other field
    lora_strengths: Mapping[str, str] = field(default_factory=dict)  # strength of each selected LoRA, by path
    lora_experts: Mapping[str, str] = field(default_factory=dict)  # expert of each selected LoRA, by path
    num_results: str = "1"
    keeps_seed: bool = False  # keep the seed for the next result
    filled_from: str = ""  # source that the page showed when the form was sent; "" if it is not known

    @classmethod
    def from_fields(cls, fields: Mapping[str, Sequence[str]]) -> "GenerateForm":
        """Read the form from the fields of a request."""
        field_values = {name: "".join(fields[name]) for name in LABELS if name in fields}
        for name in (*IMAGES, "lora_file"):  # fields with paths; `references` has one on each line
            if name in field_values:
                paths = field_values[name].split("\n")
                field_values[name] = "\n".join(complete_home(path) for path in paths)
        lora_strengths = {}
        lora_experts = {}
        for path in fields.get("lora", ()):  # the selected LoRAs
            lora_strengths[path] = "".join(fields.get(f"strength {path}", ["1"]))
            if fields.get(f"expert {path}"):
                lora_experts[path] = fields[f"expert {path}"][0]
        return cls(
            source="".join(fields.get("source", ())[:1]),
            num_results=field_values.pop("count", "") or "1",
            field_values=field_values,
            lora_strengths=lora_strengths,
            lora_experts=lora_experts,
            keeps_seed="lock" in fields,
            filled_from="".join(fields.get("filled_from", ())[:1]),
        )

    def as_fields(self) -> dict[str, list[str]]:
        """Return the form's fields as a browser would send them."""
        fields = {name: [text] for name, text in self.field_values.items()}
        fields |= {"source": [self.source], "count": [self.num_results], "lora": list(self.lora_strengths)}
        fields |= {f"strength {path}": [strength] for path, strength in self.lora_strengths.items()}
        fields |= {f"expert {path}": [expert] for path, expert in self.lora_experts.items()}
        if self.keeps_seed:
            fields["lock"] = ["yes"]
        return fields


class GeneratePages:
    """Shows the Generate page, and handles its buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.render_worker = site.render_worker
        self.run_loras = RunLoras(site.runs)
        self.drafts = Drafts(self.render_worker.folder)
        self.models = [model for model in model_sets() if can_generate(model)]

    @property
    def results_folder(self) -> Path:
        """Folder of new results, in the first root."""
        return self.site.runs.root_folders[0] / RESULTS

    @property
    def inputs(self) -> InputFolder:
        """Folder of the images and clips that were dropped on the page."""
        return InputFolder(self.results_folder / INPUTS)

    # --- the page

    def show(self, request: Request) -> Response:
        """Return the Generate page with a filled form.

        The form is read from the query if it has fields, otherwise from the draft that the query names. If
        there is none, the newest draft is used.
        """
        fields = read_query(request)
        draft = "".join(fields.pop("draft", ()))
        run = "".join(fields.pop("run", ()))
        if run:
            fields["source"] = [f"run {run}"]
        if "fill" in fields:  # the user selected another source
            return self.answer_refilled(GenerateForm.from_fields(fields), draft)
        if fields:
            form = GenerateForm.from_fields(fields)
            # a new form gets the default values of its source
            is_new = "prompt" not in fields and fields.get("source") != [""]  # no source selected before
            return self.answer(form, is_new=is_new, draft=draft)
        stored_fields = self.drafts.read(draft) or self.drafts.newest()
        if stored_fields is None:
            return self.answer(GenerateForm(), is_new=True)
        return self.answer(
            GenerateForm.from_fields(stored_fields), draft=draft, note="".join(stored_fields.get("note", ()))
        )

    def answer_refilled(self, form: GenerateForm, draft: str) -> Response:
        """Return the page after another run or model was selected, with the form adapted to it."""
        try:
            return self.answer(self.refill(form), draft=draft)
        except (UserError, OSError) as reason:
            return self.answer(form, str(reason), draft=draft)

    def answer(
        self, form: GenerateForm, error: str = "", is_new: bool = False, draft: str = "", note: str = ""
    ) -> Response:
        """Return the Generate page with a filled form.

        1. Find the recipe of the selected model or run; an error is shown on the page.
        2. Fill a new form with the defaults of this recipe.
        3. Render the form, the LoRAs and the list of render jobs.

        Args:
            is_new: Whether to replace the form with the defaults of its run or model.
            draft: Name of the draft that holds the form.
            note: Message to show that is not an error.
        """
        sources = self.list_sources()
        if is_new and not form.source:
            form = replace(form, source=self.first_source(sources))
        recipe = None
        shown_error = error
        try:
            recipe = self.find_recipe(form.source) if form.source else None
        except (UserError, OSError) as recipe_error:
            shown_error = error or str(recipe_error)
        loras = [] if recipe is None else self.run_loras.list_rows(recipe)
        if recipe is not None and is_new:
            form = make_default_form(form.source, recipe, loras)
        counts_seconds = recipe is not None and recipe.counts_seconds
        values = {
            "form": form,
            "recipe": recipe,
            "labels": {**LABELS, "frames": say("Seconds") if counts_seconds else say("Frames")},
            "numbers": NUMBER_FIELDS,
            "pictures": IMAGES,
            "notes": FIELD_NOTES,
            "choosers": FILE_CHOOSER_LABELS,
            "experts": EXPERT_LABELS,
            "sources": sources,
            **self.lora_values(form, recipe, loras),
            "command": self.format_command_line(recipe, form, loras),
            "draft": draft or self.drafts.new_name(),
            "describe_loading": describe_loading(recipe),
            **self.work_values(),
            "is_part": False,
            "can_write": not self.site.read_only,
            "message": shown_error,
            "note": note,
        }
        return answer_template("generate/generate.html", say("Generate"), values, is_rejected=error != "")

    def lora_values(
        self, form: GenerateForm, recipe: ModelRecipe | None, loras: Sequence[LoraRow]
    ) -> dict[str, object]:
        """Return the template values of the list of LoRAs, with the ones that do not fit listed separately.

        A selected LoRA is listed among the first, even if it does not fit.
        """
        fitting_rows: list[LoraRow] = []
        other_rows: list[LoraRow] = []
        for row in loras:
            is_listed = not row.reason or row.path in form.lora_strengths
            (fitting_rows if is_listed else other_rows).append(row)
        return {
            "rows": fitting_rows,
            "other_rows": other_rows,
            "foreign_rows": [] if recipe is None else self.run_loras.list_foreign_rows(recipe),
            "downloaded": list_downloaded((*self.site.runs.root_folders, self.site.models.absolute())),
            # the template calls it for each row
            "choose_expert": lambda row: choose_expert(row, recipe.folder) if recipe else BOTH,
        }

    def work_values(self) -> dict[str, object]:
        """Return the template values of the page's list of render jobs."""
        render_jobs = self.render_worker.list_all()
        jobs_to_mention = [render_job for render_job in render_jobs if needs_mention(render_job)]
        newest_ended = jobs_to_mention[-MAX_ENDED_JOBS:][::-1]  # the newest first
        open_jobs = [render_job for render_job in render_jobs if render_job.state in ("running", "waiting")]
        return {
            "render_jobs": open_jobs,
            "ended": newest_ended,
            "ended_words": describe_ended(newest_ended),
            "waiting": sum(render_job.state == "waiting" for render_job in render_jobs),
            "loaded": self.render_worker.loaded,
            "preview": _preview_address(self.render_worker.preview),
            "waits_for": self.render_worker.waits_for,
            "worker_problem": self.render_worker.problem,
            "idle_minutes": round(IDLE_SECONDS / 60),
        }

    def show_work(self, _: Request) -> Response:
        """Respond with the HTML of the list of render jobs, which the page requests every second."""
        return self.answer_work()

    def answer_work(self, error: str = "", queued_message: str = "") -> Response:
        """Return the HTML of the page's list of render jobs.

        Args:
            queued_message: Message about the queued render jobs; "" if none was queued.
        """
        values = {
            **self.work_values(),
            "can_write": not self.site.read_only,
            "is_part": True,
            "message": error,
            "on_its_way": queued_message,
        }
        return answer_template(
            "generate/generate_work.html", say("Generate"), values, is_rejected=error != ""
        )

    def show_preview(self, request: Request) -> Response:
        """Respond with the newest preview image, or without content if it has just been removed."""
        preview = self.render_worker.preview
        name = request.path_params["name"]
        if preview is None or Path(name).suffix != preview.suffix:
            return Response(status_code=204)
        kind = {".png": "image/png", ".mp4": "video/mp4"}[preview.suffix]
        try:  # read it immediately: the next preview replaces it
            return Response(preview.read_bytes(), media_type=kind, headers={"cache-control": "no-store"})
        except OSError:
            return Response(status_code=204)

    def show_input(self, request: Request) -> Response:
        """Respond with the dropped image whose name is in the URL."""
        path = self.inputs.folder / request.path_params["name"]
        kinds = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4"}
        kind = kinds.get(path.suffix)
        if kind is None or path.parent != self.inputs.folder or not self.site.runs.is_inside(path):
            return answer_not_found()
        return FileResponse(path, media_type=kind)

    # --- sources

    def list_sources(self) -> dict[str, list[tuple[str, str]]]:
        """Return the runs and models to generate with, as (field value, name) by group title."""
        runs: list[tuple[str, str]] = []
        for run, label in self.run_loras.refresh():
            runs.append((f"run {run.id}", say("%(label)s (run)", label=label)))
        on_disk: list[tuple[str, str]] = []
        to_load: list[tuple[str, str]] = []
        for model in self.models:
            paths = [self.site.models / part.path for part in model.components if part.option]
            group = on_disk if all(path.exists() for path in paths) else to_load
            value = f"model {model.family} {model.task}"
            group.append((value, join(" · ", (say(model.title), say(model.about)))))
        groups = {say("Runs"): runs, say("Models on disk"): on_disk, say("Models to load"): to_load}
        return {title: sources for title, sources in groups.items() if sources}

    @staticmethod
    def first_source(sources: Mapping[str, Sequence[tuple[str, str]]]) -> str:
        """Return the field value of the first run or model in the first group; "" if there is none."""
        return next((rows[0][0] for rows in sources.values() if rows), "")

    def find_recipe(self, source: str) -> ModelRecipe:
        """Return the recipe of the model or run that the Generate page's form selects.

        `source` is "run ID" or "model FAMILY TASK".

        Raises OptionError if the source does not exist, OSError if its run's history is missing.
        """
        if not source:
            raise refusal("Model: choose one.")
        kind, _, name = source.partition(" ")
        if kind == "run":
            with self.site.runs.lock:
                run_source = self.run_loras.find_source(name)
            if run_source is None:
                raise refusal(
                    "This run no longer exists, or its history has no command that this page "
                    "can run. Choose a model."
                )
            return make_run_recipe(run_source)
        family, _, task = name.partition(" ")
        model = find_model_set(family, task)
        if model is None or not can_generate(model):
            raise refusal("%(name)s: this model is not here.", name=name or source)
        return make_model_recipe(model, self.site.models, Path.cwd())

    def refill(self, form: GenerateForm) -> GenerateForm:
        """Return the form after another run or model was selected: its defaults, and what the user typed."""
        recipe = self.find_recipe(form.source)
        default = make_default_form(form.source, recipe, self.run_loras.list_rows(recipe))
        earlier_texts: Mapping[str, str] = {}  # default texts of the source that was selected before
        with contextlib.suppress(UserError, OSError):  # a run that is gone
            earlier_texts = self.find_recipe(form.filled_from).initial_texts
        field_values = dict(default.field_values)
        for name in ("prompt", "negative", "seed", "lora_file", "lora_strength"):
            text = form.field_values.get(name, "").strip()
            # browsers send other line ends than the page has
            if text and text.splitlines() != earlier_texts.get(name, "").strip().splitlines():
                field_values[name] = form.field_values[name]
        return replace(
            default, field_values=field_values, num_results=form.num_results, keeps_seed=form.keeps_seed
        )

    # --- render jobs

    def make_render_request(
        self, recipe: ModelRecipe, form: GenerateForm, rows: Sequence[LoraRow]
    ) -> RenderRequest:
        """Return the render request that a form describes, with the LoRAs that it selects from `rows`."""
        texts = {}
        for name in FIELDS:
            if name not in ("seed", "references"):
                texts[name] = form.field_values.get(name, "")
        if "start" not in recipe.fields and "redraw" in recipe.fields and texts["start"].strip():
            # a model without start images redraws the image taken from a result
            texts["redraw"] = texts["redraw"] or texts["start"]
        references = form.field_values.get("references", "").splitlines()
        return RenderRequest(
            recipe=recipe,
            prompt=form.field_values.get("prompt", ""),
            texts=texts,
            loras=_select_loras(recipe, form, rows),
            save_path=str(self.results_folder),
            references=[line.strip() for line in references if line.strip()],
            labels=LABELS,
        )

    def format_command_line(
        self, recipe: ModelRecipe | None, form: GenerateForm, rows: Sequence[LoraRow]
    ) -> str:
        """Return the command line that generates the same result as the form; "" without a recipe."""
        if recipe is None:
            return ""
        argv = self.make_render_request(recipe, form, rows).command(form.field_values.get("seed", "").strip())
        num_results = form.num_results.strip()
        if num_results not in ("", "1"):
            argv += [find_flag("num_videos", recipe.defaults), num_results]
        return format_command(argv, recipe.folder)

    def change(self, request: Request, fields: Form) -> Response:
        """Handle a pressed button, and return the HTML of the form or of the list of render jobs.

        The action is "form" (save the form, or fill it for another model), "make" (generate), "four"
        (generate with SEVERAL_SEEDS seeds) or an action of `change_jobs`.
        """
        action = request.path_params["what"]
        # each field of a form is a list of strings; these two fields are not values of GenerateForm
        draft = "".join(fields.pop("draft", ())[:1])
        job_number = "".join(fields.pop("id", ()))
        form = GenerateForm.from_fields(fields)
        queued_message = ""
        try:
            if action == "form":
                form = self.refill(form) if "fill" in fields else form  # "fill": another model was selected
                self.drafts.write(draft, form.as_fields())
                return self.answer(form, draft=draft)
            if action == "make":
                queued_message = self.queue_results(form)
                self.drafts.write(draft, form.as_fields())
            elif action == "four":
                queued_message = self.queue_results(replace(form, num_results=str(SEVERAL_SEEDS)))
                self.drafts.write(draft, form.as_fields())  # with the typed number of results
            elif not self.change_jobs(action, job_number):
                return answer_unknown()
        except (UserError, OSError) as error:
            return self.answer_pressed(str(error))
        return self.answer_pressed(queued_message=queued_message)

    def change_jobs(self, action: str, job_number: str) -> bool:
        """Apply a button's action to the list of render jobs; return False if `action` is unknown."""
        job_actions = {
            "cancel": self.render_worker.cancel,
            "again": self.render_worker.again,
            "remove": self.render_worker.remove,
        }
        if action == "free":
            self.render_worker.free()
        elif action == "forget":
            for render_job in filter(needs_mention, self.render_worker.list_all()):
                self.render_worker.remove(render_job.id)
        elif action in job_actions and job_number.isdecimal() and len(job_number) < 10:
            job_actions[action](int(job_number))
        else:
            return False
        return True

    def answer_pressed(self, error: str = "", queued_message: str = "") -> Response:
        """Return the list of render jobs after a button was pressed, with an error or a message about it."""
        response = self.answer_work(error, queued_message)
        response.headers["hx-trigger"] = "render_added"
        return response

    def queue_results(self, form: GenerateForm) -> str:
        """Queue a form's render jobs, one for each seed, and return a message about the queued results.

        Raises OptionError if the form is not valid.
        """
        recipe = self.find_recipe(form.source)
        self.run_loras.refresh()
        rows = self.run_loras.list_rows(recipe)
        listed_paths = {row.path for row in rows}
        for path in form.lora_strengths:
            if path not in listed_paths:
                raise refusal("%(path)s: this LoRA does not exist. Choose another one.", path=path)
        render_request = self.make_render_request(recipe, form, rows)
        self._check_lora_file(recipe, form)
        render_request.check()
        self._check_paths(render_request)
        for lora in render_request.loras:
            check_family(recipe.folder / lora.path, recipe.family)
        seeds = select_seeds(form)
        launch.check_options(render_request.command(seeds[0]), recipe.folder)  # only seeds differ
        self.render_worker.add([_make_render_job(render_request, form, seed) for seed in seeds])
        return say_count(
            len(seeds),
            "In progress: %(n)s result, seed %(first)s.",
            "In progress: %(n)s results, seeds %(first)s to %(last)s.",
            first=seeds[0],
            last=seeds[-1],
        )

    def _check_paths(self, render_request: RenderRequest) -> None:
        """Raise OptionError if an input image is outside the roots and not in the model's own command."""
        command_paths = {*render_request.recipe.paths}  # files in the model's own command may be anywhere
        paths = [
            *render_request.references,
            *(render_request.texts.get(name, "").strip() for name in IMAGES),
        ]
        for path in filter(None, paths):
            if path not in command_paths and not self.site.runs.is_inside(
                render_request.recipe.folder / path
            ):
                raise refusal(
                    "%(path)s is outside the folders that this page shows: drop the file on the "
                    "page to copy it into one of them.",
                    path=path,
                )

    def _check_lora_file(self, recipe: ModelRecipe, form: GenerateForm) -> None:
        """Raise OptionError if a typed LoRA path is outside the shown folders or not a .safetensors file."""
        text = strip_quotes(form.field_values.get("lora_file", "").strip())
        if not text:
            return
        path = recipe.folder / text  # an absolute path replaces the folder
        if path.suffix != ".safetensors":
            raise refusal("LoRA file %(path)s: choose a file that ends in .safetensors.", path=text)
        is_model = real_path(path).is_relative_to(real_path(self.site.models.absolute()))
        is_gone_here = not path.exists() and self.site.runs.is_below(path.parent)  # reported by `_check_lora`
        if not (is_model or is_gone_here or self.site.runs.is_inside(path)):
            raise refusal(
                "%(path)s is outside the folders that this page shows: copy it into one of them, or into "
                "the folder of models.",
                path=text,
            )

    # --- dropped files

    def receive(self, answer: Callable[[Path, str], Response]) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that stores an uploaded file and passes its path and name to `answer`."""

        async def handle(request: Request) -> Response:
            name = request.query_params.get("name", "")
            try:
                path = await self.inputs.receive(request.stream(), name)
                return await run_in_threadpool(answer, path, name)
            except (UserError, OSError) as error:
                return answer_json({"said": str(error)}, 422)

        return handle

    def store_input(self, path: Path, name: str) -> Response:
        """Store an uploaded image or clip as a start image, and answer with its path."""
        stored = self.inputs.store(path, name)
        return answer_json({"path": str(stored), "address": add_root(f"/generate/input/{stored.name}")})

    def read_dropped(self, path: Path, name: str) -> Response:
        """Store a form filled with the settings in a dropped file, and respond with the form's URL."""
        try:
            tags = read_file_tags(path, Path(name).suffix)
        finally:
            path.unlink(missing_ok=True)
        settings = read_dropped_settings(tags)
        form = self.fill_form(settings)
        draft = self.drafts.new_name()
        note = [show(self.describe_filling(settings, form))]  # in that user's language
        self.drafts.write(draft, {**form.as_fields(), "note": note})
        return answer_json({"address": add_root(f"/generate?draft={draft}")})

    def fill_form(self, settings: DroppedSettings) -> GenerateForm:
        """Return the form filled with the settings of a file, for the model or run that fits them best."""
        sources = self.list_sources()
        source = self._select_source(settings, sources) or self.first_source(sources)
        recipe = self.find_recipe(source)
        rows = self.run_loras.list_rows(recipe)
        lora_strengths: dict[str, str] = {}  # keyed by the path of the LoRA
        for row in rows:
            used_names = row.names & settings.loras.keys()  # LoRAs of the dropped file
            # another path of the same LoRA may be selected already
            is_selected = any(Path(path).name in row.names for path in lora_strengths)
            if used_names and not is_selected:
                lora_strengths[row.path] = settings.loras[min(used_names)]
        field_values = dict(make_default_form(source, recipe, []).field_values)
        field_values |= settings.fields(recipe)
        return GenerateForm(
            source,
            field_values=field_values,
            lora_strengths=lora_strengths,
            keeps_seed=bool(field_values.get("seed")),
        )

    def describe_filling(self, settings: DroppedSettings, form: GenerateForm) -> str:
        """Describe which program's settings have filled the form, and which models and files are missing.

        `settings` come from a dropped file; `form` is already filled with them.
        """
        program = settings.program
        sentences = [say("Filled with the settings of a file made by %(program)s.", program=program)]
        recipe = self.find_recipe(form.source)
        if not settings.family:
            sentences.append(say("Its model is unknown: choose one."))
        elif self._score_source(settings, form.source) < 0:
            name = f"{settings.model} {settings.task}".strip()
            sentences.append(say("Its model, %(name)s, is not among the models here: choose one.", name=name))
        selected_rows = [row for row in self.run_loras.list_rows(recipe) if row.path in form.lora_strengths]
        selected_names = {name for row in selected_rows for name in row.names}
        for name in settings.loras:
            if name not in selected_names:
                sentences.append(say("Its LoRA %(name)s is not here.", name=name))
        return join(" ", [*sentences, *_describe_input_images(settings, recipe)])

    def _select_source(
        self, settings: DroppedSettings, sources: Mapping[str, Sequence[tuple[str, str]]]
    ) -> str:
        """Return the run or released model that fits a dropped file's settings best; "" if none fits."""
        # `sources` are lists of (field value, title). A run or model with the file's LoRAs is preferred, then
        # other runs and models on disk.
        best_source = ""
        best_score = -1
        for group in sources.values():
            for source, _ in group:
                score = self._score_source(settings, source)
                if score > best_score:
                    best_source = source
                    best_score = score
        return best_source

    def _score_source(self, settings: DroppedSettings, source: str) -> int:
        """Return a score of how well a model or run fits the settings of a dropped file; -1 if not at all."""
        # `source` is "model FAMILY TASK" or "run ID".
        recipe = self._find_fitting_recipe(settings, source)
        if recipe is None:
            return -1
        kind, _, name = source.partition(" ")
        lora_names = {Path(lora.path).name for lora in recipe.loras}
        if kind == "run":
            lora_names |= self.run_loras.find_run_file_names(name)
        # 4 for each LoRA of the file: more than what is added below
        score = 4 * sum(name in lora_names for name in settings.loras)
        if kind == "run" or not (recipe.missing_files or recipe.unfilled_options):
            score += 2  # prefer models whose files are on disk
        if kind == "model" and settings.task in source.split():
            score += 1
        return score

    def _find_fitting_recipe(self, settings: DroppedSettings, source: str) -> ModelRecipe | None:
        """Return the recipe of a model or run if its family and task are those of the dropped file."""
        kind, _, name = source.partition(" ")
        if not settings.family:
            return None
        # before the recipe of a run, which takes longer to make
        if kind == "run" and self.run_loras.find_run_family(name) != settings.family:
            return None
        try:
            recipe = self.find_recipe(source)
        except (UserError, OSError):
            return None
        task = "".join(recipe.fixed_options.get("--task", ()))
        is_other_task = bool(task and settings.task) and task != settings.task
        return None if recipe.family != settings.family or is_other_task else recipe


def _describe_input_images(settings: DroppedSettings, recipe: ModelRecipe) -> list[str]:
    """Return sentences that ask for the images from which a dropped file was generated."""
    sentences: list[str] = []
    for field_name in IMAGES:
        option_key = recipe.option_keys.get(field_name, "")
        paths = settings.options.get(option_key, "").splitlines()
        if paths:
            sentences.append(
                say("It started from %(splitlines)s: drop that file on the form.", splitlines=paths[0])
            )
    return sentences


def make_default_form(source: str, recipe: ModelRecipe, rows: Sequence[LoraRow]) -> GenerateForm:
    """Return the form for a run or model (`source`), filled with its recipe's defaults and LoRAs."""
    chosen = select_default_loras(recipe, rows)
    return GenerateForm(
        source=source,
        field_values={**recipe.initial_texts, "seed": ""},
        lora_strengths={path: strength for path, (strength, _) in chosen.items()},
        lora_experts={path: expert for path, (_, expert) in chosen.items()} if recipe.has_experts else {},
    )


def _preview_address(preview: Path | None) -> str:
    """Return the URL of the newest preview image or clip; "" if there is none."""
    if preview is None:
        return ""
    try:
        # with its time in the address, so that browsers load each new preview
        return f"/generate/preview/{preview.stat().st_mtime_ns}{preview.suffix}"
    except OSError:
        return ""


def _select_loras(recipe: ModelRecipe, form: GenerateForm, rows: Sequence[LoraRow]) -> list[UsedLora]:
    """Return the LoRAs that a form selects from `rows`, and the LoRA whose path the user typed."""
    loras: list[UsedLora] = []
    for row in rows:
        if row.path in form.lora_strengths:
            expert = form.lora_experts.get(row.path) or choose_expert(row, recipe.folder)
            loras += row.as_used(form.lora_strengths[row.path], expert, recipe.has_experts)
    typed_path = strip_quotes(form.field_values.get("lora_file", "").strip())
    if typed_path:
        row = LoraRow(path=typed_path, title="")
        strength = form.field_values.get("lora_strength", "").strip() or "1"
        loras += row.as_used(strength, choose_expert(row, recipe.folder), recipe.has_experts)
    return loras


def needs_mention(render_job: RenderJob) -> bool:
    """Return whether the page shows an ended render job: it failed, or its script printed warnings."""
    has_ended = render_job.state not in ("waiting", "running")
    return has_ended and (render_job.state != "finished" or bool(render_job.warnings))


def describe_ended(ended: Sequence[RenderJob]) -> str:
    """Describe the outcome of the newest of several ended render jobs; "" if there are none."""
    if not ended:
        return ""
    newest = ended[0]
    words = newest.reason or newest.warnings
    reason = shorten(" ".join(words.split()), MAX_REASON_LENGTH)
    state = join(" ", (str(newest.id), name_state(newest.state)))
    return join(": ", filter(None, (state, reason)))


def describe_loading(recipe: ModelRecipe | None) -> str:
    """Return a note about the files or options that a recipe lacks; "" if nothing is missing."""
    if recipe is None:
        return ""
    num_missing = len(recipe.missing_files) + len(recipe.unfilled_options)
    if num_missing == 0:
        return ""
    if not recipe.missing_files:
        return say(
            "This run was trained without %(names)s, which generation needs.",
            names=join(", ", recipe.unfilled_options),
        )
    if num_missing == 1:
        return say("Its file %(missing)s is not on this machine yet.", missing=recipe.missing_files[0])
    return say(
        "%(n)s of its files are not on this machine yet, such as %(missing)s.",
        n=num_missing,
        missing=recipe.missing_files[0],
    )


def read_file_tags(path: Path, suffix: str) -> dict[str, str]:
    """Return the text metadata of an uploaded file. `suffix` is the suffix of the file's original name.

    Raises OptionError if the file is not an image, a clip or an audio file.
    """
    # the original suffix first; a file with a wrong suffix is accepted too
    for ending in dict.fromkeys((suffix.lower(), ".png", ".mp4", ".wav")):
        if ending not in (".png", ".mp4", ".mkv", ".wav"):
            continue
        renamed_path = path.with_suffix(ending)  # `read_tags` selects the reader by the suffix
        path.rename(renamed_path)
        try:
            return read_tags(renamed_path)
        except MediaError:
            continue
        finally:
            renamed_path.rename(path)
    raise refusal("It is not a readable image, clip or audio file.")


def _make_render_job(render_request: RenderRequest, form: GenerateForm, seed: str) -> RenderJob:
    """Return the job for one seed of a form. It stores a form that repeats just this result."""
    field_values = {**form.field_values, "seed": seed}
    result_form = replace(form, field_values=field_values, num_results="1", keeps_seed=True)
    return replace(render_request.as_render_job(seed), form=result_form.as_fields())


def select_seeds(form: GenerateForm) -> list[str]:
    """Return the seeds of the results that a form requests: consecutive, from the typed or a random seed.

    Raises OptionError if the seed or the number of results is not valid.
    """
    seed = form.field_values.get("seed", "").strip()
    if seed and not (seed.isdecimal() and len(seed) < 20):
        raise refusal(
            "Seed %(seed)s: use a whole number, or leave it empty for a new one each time.", seed=seed
        )
    count = form.num_results.strip()
    if not count.isdecimal() or len(count) > 4 or not 1 <= int(count) <= MAX_AT_ONCE:
        raise refusal(
            "How many %(count)s: use a number from 1 to %(most_at_once)s.",
            count=count,
            most_at_once=MAX_AT_ONCE,
        )
    first_seed = int(seed) if seed else secrets.randbits(SEED_BITS)
    return [str(first_seed + index) for index in range(int(count))]


def generate_routes(site: Site) -> list[Route]:
    """Return the routes of the Generate page."""
    pages = GeneratePages(site)
    return [
        Route("/generate", pages.show),
        Route("/generate/work", pages.show_work),
        Route("/generate/preview/{name}", pages.show_preview),
        Route("/generate/input/{name}", pages.show_input),
        Route("/generate/file", pages.receive(pages.store_input), methods=["POST"]),
        Route("/generate/settings", pages.receive(pages.read_dropped), methods=["POST"]),
        Route("/generate/{what}", answer_form(pages.change), methods=["POST"]),
    ]
