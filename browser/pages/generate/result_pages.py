"""Show all generated results on the Generate page, part by part, and handle their buttons."""

import contextlib
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.bin_folder import FOLDER as BIN
from browser.core.bin_folder import BinFolder
from browser.core.responses import (
    Form,
    answer_file,
    answer_form,
    answer_json,
    answer_message,
    answer_not_found,
    answer_template,
    answer_text,
    answer_unknown,
)
from browser.core.server_state import Site
from browser.core.short_names import number_names, short_digest
from browser.core.state_names import name_state
from browser.folders.captions import compute_checksum
from browser.folders.described_folder import PROMPTS_FILE, ChangedMeanwhileError, read_described
from browser.folders.folders import list_media_folders
from browser.jobs.background_jobs import name_background_job
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import WAITING, Job
from browser.jobs.render_queue import RenderJob
from browser.pages.generate.result_settings import (
    EMBEDDINGS,
    PREFIX,
    ResultSettings,
    format_sample_line,
    read_settings,
    regenerate,
)
from browser.pages.generate.results import LAST_FRAME_SUFFIX, UPSCALED_SUFFIX, Result, ResultFolders
from browser.runs.comparable_runs import ComparableRun, read_source
from browser.runs.recipes import RESULTS, ModelRecipe, can_generate, make_model_recipe, make_run_recipe
from browser.runs.run_views import label_runs
from browser.runs.runs import DIED, FINISHED, RUNNING, RunSummary
from downloads.catalogue import ModelSet, model_sets
from downloads.listing import gigabytes, total_bytes
from modules.atomic_write import write_bytes
from modules.control_codes import escape_control_codes
from modules.errors import MediaError, OptionError, UserError
from modules.media.reading import frame_size, video_frames
from modules.media.writing import write_png
from modules.pages.language import refusal, say
from modules.text_files import read_content
from project.options import MODELS
from protocols.families import with_scripts

PAGE_SIZE = 24  # results shown at once: fills rows of one, two, three or four
READ_SECONDS = 0.3  # maximum time for reading the settings of new files for one answer
MAX_READ = 50_000  # results whose settings are in memory
SEED_BITS = 32
UPSCALER_SCRIPT = "blissful_tuner/upscaler.py"
DOWNLOAD_UPSCALER = "upscaler"  # kind of a background job
UPSCALE_FACTOR = 2  # factor for width and height
UPSCALERS = "upscalers"  # subfolder of the models folder
UPSCALER_SUFFIXES = (".pth", ".safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".gguf", ".sft")
MAX_PROMPT_FILE_BYTES = 1 << 20  # bytes of a prompt file
MAX_TITLE_CHARACTERS = 160  # characters of a prompt in the list


class ReadSettings(NamedTuple):
    """Settings read from a file, or in `problem` the reason why they could not be read."""

    settings: ResultSettings | None
    problem: str = ""


class SettingsCache:
    """Caches the settings recorded in result files; a file is read again only after it has changed."""

    def __init__(self) -> None:
        # path -> (version of the file, its settings), oldest first
        self._cached: OrderedDict[Path, tuple[tuple[float, int], ReadSettings]] = OrderedDict()
        self._lock = threading.Lock()

    def find_read(self, result: Result) -> ReadSettings | None:
        """Return the settings read before; None if the file was not read, or has changed since."""
        version, settings = self._cached.get(result.path, (None, None))
        return settings if version == (result.changed, result.size_bytes) else None

    def get(self, result: Result) -> ReadSettings:
        """Return the settings with which a file was generated, from the cache if possible."""
        cached = self.find_read(result)
        if cached is not None:
            return cached
        try:
            settings = read_settings(result.path)
            new_entry = ReadSettings(None if settings is None else settings.shortened())
        except (MediaError, OSError, ValueError) as error:
            new_entry = ReadSettings(None, str(error))
        version = (result.changed, result.size_bytes)
        with self._lock:
            self._cached[result.path] = (version, new_entry)
            while len(self._cached) > MAX_READ:
                self._cached.popitem(last=False)
        return new_entry

    def read_some(self, results: Sequence[Result], seconds: float) -> int:
        """Read settings from files for at most `seconds`, and return how many files are still to be read."""
        end = time.monotonic() + seconds
        unread = [result for result in results if self.find_read(result) is None]
        for index, result in enumerate(unread):
            if time.monotonic() > end:
                return len(unread) - index
            self.get(result)
        return 0


@dataclass(frozen=True)
class ResultFilter:
    """Field values of the form that filters the list of results."""

    words: Sequence[str] = ()  # all must be in the name or the prompts
    kind: str = ""
    model: str = ""
    run: RunSummary | None = None

    def accepts(self, result: Result, settings: ResultSettings | None) -> bool:
        """Return whether a generated file passes the filter of the Results page."""
        if self.kind and result.kind != self.kind:
            return False
        # bookmarks of older versions contain the internal name of the model
        if self.model and (settings is None or self.model not in (settings.title, settings.model)):
            return False
        if self.run is not None and not _belongs_to_run(result, settings, self.run):
            return False
        return not self.words or self._has_words(result, settings)

    def _has_words(self, result: Result, settings: ResultSettings | None) -> bool:
        """Return whether a file's name and prompts contain all words of the filter, in any case."""
        text = result.path.name.lower()
        if settings is not None:
            text += f"\n{settings.get('prompt')}\n{settings.get('negative_prompt')}".lower()
        return all(word in text for word in self.words)


class FilteredResults(NamedTuple):
    """All results, and the results that pass the page's filter."""

    all: Sequence[Result]
    accepted: Sequence[Result]
    num_unread: int  # number of files whose settings are still to be read


def _belongs_to_run(result: Result, settings: ResultSettings | None, run: RunSummary) -> bool:
    """Return whether a result is in the run's folder, or was generated with one of the run's files."""
    if result.path.is_relative_to(run.history.parent):
        return True
    names = [] if settings is None else [lora.name for lora in settings.loras]
    pattern = re.compile(rf"{re.escape(run.name)}(-(step)?\d+|[-_][a-z]+)*\.safetensors")
    return any(pattern.fullmatch(name) and (run.history.parent / name).is_file() for name in names)


@dataclass(frozen=True)
class ResultTile:
    """A generated file as a tile of the Results page, with its settings and its upscaling job."""

    result: Result
    settings: ResultSettings | None
    problem: str  # why the settings cannot be read
    job: Job | None  # job that upscales it

    @property
    def title(self) -> str:
        """The beginning of the prompt if it is known, otherwise the file name."""
        text = "" if self.settings is None else " ".join(self.settings.get("prompt").split())
        text = text or self.result.path.name
        return text if len(text) <= MAX_TITLE_CHARACTERS else f"{text[:MAX_TITLE_CHARACTERS].rstrip()} …"

    @property
    def name(self) -> str:
        """Name of the file, with control characters escaped."""
        return escape_control_codes(self.result.path.name)

    @property
    def loras(self) -> str:
        """Names and strengths of the LoRAs, separated by commas."""
        loras = () if self.settings is None else self.settings.loras
        return ", ".join(f"{Path(lora.name).stem} {lora.strength}" for lora in loras)

    @property
    def job_text(self) -> str:
        """State of the job that upscales the result; "" without a job, or after it has finished."""
        if self.job is None or self.job.state == FINISHED:
            return ""
        if self.job.state == DIED:
            lines = self.job.last_lines(1)
            return say("larger: died. %(lines)s", lines=lines)
        return say("larger: %(state)s", state=name_state(self.job.state))

    @property
    def change_key(self) -> str:
        """Key that changes when anything that the tile shows has changed."""
        text = f"{self.result.changed} {self.result.size_bytes} {self.job_text}"
        return short_digest(text, 6)

    @property
    def time(self) -> str:
        """Time of day at which the file was written."""
        return f"{datetime.fromtimestamp(self.result.changed):%H:%M}"


MONTHS = (
    say("January"),
    say("February"),
    say("March"),
    say("April"),
    say("May"),
    say("June"),
    say("July"),
    say("August"),
    say("September"),
    say("October"),
    say("November"),
    say("December"),
)


def name_day(seconds: float, today: date) -> str:
    """Return the day of a result as text: Today, Yesterday or the date."""
    day = datetime.fromtimestamp(seconds).date()
    if day == today:
        return say("Today")
    if day == today - timedelta(days=1):
        return say("Yesterday")
    return say("%(day)s %(month)s %(year)s", day=day.day, month=MONTHS[day.month - 1], year=day.year)


def count_days(results: Sequence[Result]) -> list[tuple[str, int]]:
    """Return each day of a list, with the number of its results."""
    today = date.today()
    counts: dict[str, int] = {}
    for result in results:
        label = name_day(result.shown_at, today)
        counts[label] = counts.get(label, 0) + 1
    return [*counts.items()]


class Candidate(NamedTuple):
    """A recipe that may have generated a result, and the run to which it belongs.

    The run is None for a released model.
    """

    recipe: ModelRecipe
    run: RunSummary | None


class ResultRegenerator:
    """Finds the models and files with which a result was generated, to generate it again."""

    def __init__(self, site: Site, folders: ResultFolders) -> None:
        self.site = site
        self.folders = folders

    def regenerate(self, result: Result, settings: ResultSettings, seed: str) -> RenderJob:
        """Return the render job that generates a result again with `seed`, from the first fitting recipe.

        Raises OptionError if no recipe fits.
        """
        reasons = []
        save_path = str(self.site.runs.root_folders[0] / RESULTS)
        for candidate in self.list_candidates(result, settings):
            try:
                return regenerate(
                    settings,
                    candidate.recipe,
                    seed=seed,
                    save_path=save_path,
                    find_weights=lambda name, recipe: self.find_weights(name, recipe, result),
                    find_media=lambda name: self.find_media(name, result),
                )
            except OptionError as error:
                reasons.append(str(error))
        if not reasons:
            raise refusal("No run and no released model here generates %(title)s.", title=settings.title)
        raise OptionError(reasons[0])  # the reason of the best candidate

    def list_candidates(self, result: Result, settings: ResultSettings) -> Iterator[Candidate]:
        """Yield recipes of the result's model family: its own run, other runs, then released models."""
        for comparable_run in self._list_comparable_runs(result, settings):
            yield Candidate(make_run_recipe(comparable_run), comparable_run.run)
        for model in model_sets():
            if can_generate(model):
                recipe = make_model_recipe(model, self.site.models, Path.cwd())
                if recipe.family == settings.family:
                    yield Candidate(recipe, None)

    def _list_comparable_runs(self, result: Result, settings: ResultSettings) -> list[ComparableRun]:
        """Return the family's runs: the result's own run first, then runs with its LoRAs, then by age."""
        names = {*(lora.name for lora in settings.loras), *settings.embeddings}

        def rank(run: RunSummary) -> tuple[bool, bool, float]:
            folder = run.history.parent
            is_other_run = not result.path.is_relative_to(folder)
            lacks_files = not any((folder / name).is_file() for name in names)
            return is_other_run, lacks_files, -run.changed  # False sorts before True

        comparable_runs = []
        with self.site.runs.lock:
            for run in sorted(self.site.runs.list_all(), key=rank):
                with contextlib.suppress(OSError):
                    comparable_run = read_source(self.site.runs, run)
                    if comparable_run is not None and comparable_run.family == settings.family:
                        comparable_runs.append(comparable_run)
        return comparable_runs

    def find_weights(self, name: str, recipe: ModelRecipe, result: Result) -> str:
        """Return the path of a LoRA or an embedding by its file name.

        Searches the recipe, the result's render job and the folders of runs, the result's own run first.
        Raises OptionError if the file is not found.
        """
        path = (
            _find_weights_in_recipe(name, recipe)
            or self._find_weights_in_render_job(name, result)
            or self._find_run_weights(name, result)
        )
        if not path:
            raise refusal("%(name)s: no run here has this file.", name=name)
        return path

    def _find_weights_in_render_job(self, name: str, result: Result) -> str:
        """Return the path with this file name in the command that loaded a result's model; "" if none."""
        render_job = self.find_render_job(result)
        if render_job is not None:
            for word in render_job.session:
                if Path(word).name == name and Path(render_job.folder, word).is_file():
                    return word
        return ""

    def _find_run_weights(self, name: str, result: Result) -> str:
        """Return the path of a file in the folder of a run, the result's own run first; "" if none."""
        # a name in metadata may be a path that leads to another folder
        if Path(name).name != name:
            return ""
        with self.site.runs.lock:
            runs = self.site.runs.list_all()
        for run in sorted(runs, key=lambda run: not result.path.is_relative_to(run.history.parent)):
            file = run.history.parent / name
            if self.site.runs.is_inside(file):
                return str(file)
        return ""

    def find_media(self, name: str, result: Result) -> str:
        """Return the path of the image or clip from which a result was generated.

        Raises OptionError if the file is found neither in its render job nor among the results.
        """
        render_job = self.find_render_job(result)
        # the render job names the file's path; without one, any result with this name is used
        if render_job is not None:
            for value in render_job.request.get("options", {}).values():
                recorded_words = value if isinstance(value, list) else [value]
                for word in map(str, recorded_words):
                    if Path(word).name == name and Path(render_job.folder, word).is_file():
                        return word
        for candidate in self.folders.list_all():
            if candidate.path.name == name:
                return str(candidate.path)
        raise refusal(
            "%(name)s, the file it started from, is not among the results. Choose it in the form.", name=name
        )

    def find_render_job(self, result: Result) -> RenderJob | None:
        """Return the Generate page's job that generated a result; None if it was generated elsewhere."""
        for render_job in reversed(self.site.render_worker.list_all()):
            if render_job.file == str(result.path):
                return render_job
        return None


def _find_weights_in_recipe(name: str, recipe: ModelRecipe) -> str:
    """Return the path of a recipe's LoRA or embedding with this file name; "" if it has none."""
    embeddings = recipe.fixed_options.get(f"--{EMBEDDINGS}", ())
    for path in (*(lora.path for lora in recipe.loras), *embeddings):
        if Path(path).name == name and (recipe.folder / path).is_file():
            return path
    return ""


class ResultPages:
    """Handles the requests for generated results."""

    def __init__(self, site: Site) -> None:
        """Serve the results below the roots of `site`."""
        self.site = site
        self.folders = ResultFolders(site.runs)
        self.cache = SettingsCache()
        self.regenerator = ResultRegenerator(site, self.folders)
        self._prompts_lock = threading.Lock()
        # what a button does, and which dialog it opens, by the action in the URL
        self.changes: dict[str, Callable[[Result, Form], Response]] = {
            "again": self.generate_again,
            "other": self.generate_with_random_seed,
            "larger": self.upscale,
            "load": self.download_upscaler,
            "start": self.start_from,
            "sample": self.add_sample,
            "remove": self.remove,
        }
        self.dialogs: dict[str, Callable[[Result, str], Response]] = {
            "settings": self.show_settings,
            "layers": self.show_layers,
            "larger": self.show_upscale_dialog,
            "sample": self.show_sample,
            "remove": self.show_remove,
        }

    # --- the list

    def filter_results(self, query: Mapping[str, str]) -> FilteredResults:
        """Return the generated files that pass the filter in a query.

        If the filter needs settings, files whose settings are not read yet are omitted.
        """
        results = self.folders.list_all()
        run = self.site.runs.find(query["of"]) if query.get("of") else None
        result_filter = ResultFilter(
            words=query.get("find", "").lower().split(),
            kind=query.get("kind", ""),
            model=query.get("model", ""),
            run=run,
        )
        num_unread = self.cache.read_some(results, READ_SECONDS)
        accepted = []
        for result in results:
            cached = self.cache.find_read(result)
            if cached is None and (result_filter.words or result_filter.model or result_filter.run):
                continue
            if result_filter.accepts(result, None if cached is None else cached.settings):
                accepted.append(result)
        return FilteredResults(results, accepted, num_unread)

    def show_layout(self, request: Request) -> Response:
        """Respond with the numbers of results by day, as JSON for the Results page; 204 if nothing changed.

        The query contains the fields of `read_filter`; `have`, the digest `mark` in the page's last response;
        and `compared`, the ids of results that the user compares. Ids that no longer exist are returned.
        """
        query = request.query_params
        filtered = self.filter_results(query)
        days = count_days(filtered.accepted)
        models = self.list_models(filtered.all)
        upscale_jobs = [(path, job.state) for path, job in self.find_upscale_jobs().items()]
        files = [(result.id, result.changed) for result in filtered.accepted]
        displayed = (files, days, filtered.num_unread, models, sorted(upscale_jobs), len(filtered.all))
        digest = short_digest(repr(displayed))
        if query.get("have") == digest:
            return Response(status_code=204)
        with self.site.runs.lock:
            runs = label_runs(self.site.runs.list_all())
        existing_ids = {result.id for result in filtered.all}
        compared_ids = query.get("compared", "").split()
        return answer_json(
            {
                "mark": digest,
                "part": PAGE_SIZE,
                "all": len(filtered.all),
                "chosen": len(filtered.accepted),
                "unread": filtered.num_unread,
                "days": days,
                "models": models,
                "runs": [[run.id, label] for run, label in runs],
                "gone": [id for id in compared_ids if id not in existing_ids],
            }
        )

    def list_models(self, results: Sequence[Result]) -> list[tuple[str, str]]:
        """Return the models of all results read so far, as (value, title) for a drop-down list."""
        titles = set()
        for result in results:
            read = self.cache.find_read(result)
            if read is not None and read.settings is not None and read.settings.title:
                titles.add(read.settings.title)
        return [(title, title) for title in sorted(titles, key=str.lower)]

    def show_part(self, request: Request) -> Response:
        """Respond with the tiles of filtered results; the query has `count`, and `from`, the first index."""
        query = request.query_params
        first_text, count_text = query.get("from", ""), query.get("count", "")
        for text in (first_text, count_text):
            if not text.isdecimal() or len(text) >= 9:  # long numbers are slow to convert
                return answer_text("from and count are numbers of results.", 400)
        first_index = int(first_text)
        count = min(int(count_text), 2 * PAGE_SIZE)
        results = self.filter_results(query).accepted
        jobs = self.find_upscale_jobs()
        tiles = []
        for result in results[first_index : first_index + count]:
            cached = self.cache.get(result)
            job = jobs.get(str(result.path))
            tiles.append(ResultTile(result, cached.settings, problem=cached.problem, job=job))
        values = {"tiles": tiles, "can_write": not self.site.read_only}
        return answer_template("generate/result_tiles.html", say("Results"), values)

    def find_upscale_jobs(self) -> dict[str, Job]:
        """Return, by file path, the newest queued job that upscales the file."""
        jobs = {}
        with contextlib.suppress(UserError):
            for job in self.site.queue.jobs():
                if UPSCALER_SCRIPT not in job.line or "--input" not in job.line:
                    continue  # splitting all lines would be slow
                with contextlib.suppress(UserError):
                    argv = job.argv
                    if UPSCALER_SCRIPT in argv and "--input" in argv[:-1]:
                        input_path = argv[argv.index("--input") + 1]
                        jobs[input_path] = job
        return jobs

    # --- a result

    def find(self, request: Request) -> Result | None:
        """Return the result that a request's URL names; None if it does not exist."""
        return self.folders.find(request.path_params["id"])

    def show_file(self, request: Request) -> Response:
        """Respond with the file of a result."""
        id, _, suffix = request.path_params["name"].partition(".")
        result = self.folders.find(id)
        if result is None or f".{suffix}" != result.path.suffix.lower():
            return answer_not_found()
        return answer_file(result.path)

    def require_settings(self, result: Result) -> ResultSettings:
        """Read all settings of a file. Raises OptionError if it has none, or MediaError or OSError."""
        settings = read_settings(result.path)
        if settings is None:
            raise refusal("This file does not contain its settings.")
        return settings

    def show_dialog(self, request: Request) -> Response:
        """Respond with the dialog that a button opens before its action starts."""
        result = self.find(request)
        show = self.dialogs.get(request.path_params["what"])
        if result is None or show is None:
            return answer_not_found()
        return show(result, "")

    def answer_dialog(self, what: str, result: Result, error: str = "", **values: Any) -> Response:
        """Return the HTML of a dialog. `what` names the template's section; `error` is shown in it."""
        shown = {
            "what": what,
            "result": result,
            "can_write": not self.site.read_only,
            "message": error,
            **values,
        }
        return answer_template("generate/result_sheet.html", result.path.name, shown, is_rejected=error != "")

    def show_commands(self, request: Request) -> Response:
        """Respond with the commands that the buttons of a generated file run, as JSON."""
        result = self.find(request)
        if result is None:
            return answer_not_found()
        commands = {"other": "", "again": ""}
        try:
            settings = self.require_settings(result)
            render_job = self.regenerator.regenerate(result, settings, settings.get("seeds"))
            commands["again"] = format_command(render_job.command, Path(render_job.folder))
            placeholder = "SEED"  # stands for the user's seed
            render_job = self.regenerator.regenerate(result, settings, placeholder)
            commands["other"] = format_command(render_job.command, Path(render_job.folder))
        except (UserError, OSError) as error:
            commands |= dict.fromkeys(("again", "other"), str(error))
        upscalers = self.list_upscalers()
        if upscalers:
            commands["larger"] = format_command(self.make_upscale_argv(result, upscalers[0]))
        return answer_json(commands)

    def show_settings(self, result: Result, error: str) -> Response:
        """Return the dialog with a result's settings: a list, and the command that generates it again."""
        rows: list[tuple[str, str]] = []
        command = ""
        problem = error
        is_ours = False  # whether the file has settings that this program wrote
        done: Sequence[str] = ()  # later processing of the file, such as upscaling
        try:
            settings = read_settings(result.path)
            if settings is not None:
                is_ours = True
                rows = settings.rows()
                done = settings.done
                render_job = self.regenerator.regenerate(result, settings, settings.get("seeds"))
                command = format_command(render_job.command, Path(render_job.folder))
        except (UserError, OSError) as reason:
            problem = problem or str(reason)
        return self.answer_dialog(
            "settings", result, rows=rows, command=command, problem=problem, is_ours=is_ours, done=done
        )

    # --- layers

    def show_layers(self, result: Result, error: str) -> Response:
        """Return the dialog with the layers of an image, back to front; each can be hidden."""
        layers = []
        for index, path in enumerate(result.layers):
            number = path.stem.rpartition("layer")[2]
            name = say("the whole image") if number == "0" else say("layer %(number)s", number=number)
            layers.append((index, name, number != "0"))
        return self.answer_dialog("layers", result, error, layers=layers)

    def show_layer(self, request: Request) -> Response:
        """Respond with one image file of a layered result."""
        result = self.find(request)
        index = request.path_params["index"]
        layers = () if result is None else result.layers
        paths = {str(layer_index): path for layer_index, path in enumerate(layers)}
        path = paths.get(index)
        if path is None or path.is_symlink() or not path.is_file():
            return answer_not_found()
        return answer_file(path)

    # --- again, other seed

    def generate_again(self, result: Result, _: Form) -> Response:
        """Queue the render job that repeats a result with its own seed."""
        settings = self.require_settings(result)
        return self.add_render_job(result, settings, settings.get("seeds"))

    def generate_with_random_seed(self, result: Result, _: Form) -> Response:
        """Queue the render job that repeats a result with a random seed."""
        return self.add_render_job(result, self.require_settings(result), str(secrets.randbits(SEED_BITS)))

    def add_render_job(self, result: Result, settings: ResultSettings, seed: str) -> Response:
        """Queue the render job that generates a result again with `seed`.

        Raises OptionError or OutputError if that fails.
        """
        render_job = self.regenerator.regenerate(result, settings, seed)
        load_argv = render_job.session  # the command that loads the model
        weight_files = [word for word in load_argv if Path(word).suffix in WEIGHT_SUFFIXES]
        missing = [file for file in weight_files if not Path(render_job.folder, file).exists()]
        if missing:
            raise refusal("%(missing)s is missing: download the model first (Models).", missing=missing[0])

        [number] = self.site.render_worker.add([render_job])
        return answer_message(
            say("It waits above as %(number)s, with seed %(seed)s.", number=number, seed=seed)
        )

    # --- larger

    def list_upscalers(self) -> list[Path]:
        """Return the upscaler files in the models folder."""
        upscalers = []
        with contextlib.suppress(OSError):
            for path in sorted((self.site.models / UPSCALERS).iterdir()):
                if path.suffix.lower() in UPSCALER_SUFFIXES and path.is_file():
                    upscalers.append(path)
        return upscalers

    def make_upscale_argv(self, result: Result, network: Path) -> list[str]:
        """Return the command that upscales a result with the upscaler file `network`."""
        argv = ["python", UPSCALER_SCRIPT, "--input", str(result.path), "--model", str(network.absolute())]
        argv += ["--mode", "swinir" if "swinir" in network.name.lower() else "esrgan"]
        suffix = ".png" if result.path.suffix.lower() == ".png" else ".mp4"
        paths = (
            result.path.with_name(f"{name}{suffix}")
            for name in number_names(f"{result.path.stem}{UPSCALED_SUFFIX}")
        )
        output = next(free for free in paths if not os.path.lexists(free))
        argv += ["--scale", str(UPSCALE_FACTOR), "--output", str(output)]
        if result.kind == "clip":  # the usual codec is one that browsers do not show
            argv += ["--codec", "h264", "--container", "mp4"]
        return argv

    def show_upscale_dialog(self, result: Result, error: str) -> Response:
        """Return the dialog for upscaling a result, with the installed and downloadable upscalers."""
        downloadable = [
            (model, gigabytes(total_bytes(model.components)), format_command(self.make_download_argv(model)))
            for model in model_sets()
            if "upscale" in model.commands
        ]
        loading = self.site.background_jobs.find(name_background_job(DOWNLOAD_UPSCALER, self.site.models))
        installed = []
        for path in self.list_upscalers():
            installed.append((path, format_command(self.make_upscale_argv(result, path))))
        return self.answer_dialog(
            "larger",
            result,
            error,
            options=installed,
            to_load=downloadable,
            loading=loading,
            models=self.site.models / UPSCALERS,
            is_sound=result.kind == "sound",
            sizes=describe_upscaled_size(result),
        )

    def make_download_argv(self, model: ModelSet) -> list[str]:
        """Return the command that downloads an upscaler's file."""
        argv = ["reelsmith", "download", "--family", model.family, "--task", model.task]
        return argv if self.site.models == MODELS else [*argv, "--to", str(self.site.models)]

    def download_upscaler(self, result: Result, form: Form) -> Response:
        """Start the download of an upscaler's file."""
        task = "".join(form.get("task", ()))
        for model in model_sets():
            if model.task == task and "upscale" in model.commands:
                name = name_background_job(DOWNLOAD_UPSCALER, self.site.models)
                self.site.background_jobs.start(name, self.make_download_argv(model), Path.cwd())
                return self.show_upscale_dialog(result, "")
        return self.show_upscale_dialog(result, say("Choose a file to load."))

    def upscale(self, result: Result, form: Form) -> Response:
        """Queue the job that upscales a result, and start the queue unless other jobs are waiting."""
        queue = self.site.queue
        selected_name = "".join(form.get("network", ()))
        upscaler = next((path for path in self.list_upscalers() if path.name == selected_name), None)
        earlier_job = self.find_upscale_jobs().get(str(result.path))
        if result.kind == "sound":
            raise refusal("An audio file has no size.")
        if upscaler is None:
            return self.show_upscale_dialog(result, say("Choose the file of an upscaler."))
        if earlier_job is not None and earlier_job.state in (WAITING, RUNNING):
            return self.show_upscale_dialog(result, say("It is already being enlarged."))
        number = queue.add_and_begin(self.make_upscale_argv(result, upscaler), Path.cwd())
        message = say(
            "It is job %(number)s of the queue. The enlarged one will appear here when it is finished.",
            number=number,
        )
        is_paused = queue.worker == ""
        if is_paused:
            message = say(
                "It is job %(number)s of the queue, which is paused: start it on the page Queue.",
                number=number,
            )
        return self.answer_dialog("done", result, text=message)

    # --- start from this

    def start_from(self, result: Result, _: Form) -> Response:
        """Respond with the path of an image; for a clip, first write its last frame as an image."""
        if result.kind == "sound":
            raise refusal("An audio file is not an image to start from.")
        if result.kind == "clip":
            result = self.write_last_frame(result)
        return answer_json({"path": str(result.path), "name": result.path.name})

    def write_last_frame(self, result: Result) -> Result:
        """Write a clip's last frame as an image next to it, unless a newer one exists, and return the image.

        Raises:
            MediaError: If the clip has no frame.
            OptionError: If a link or a folder has the name of the image.
            OutputError: If the image cannot be written.
        """
        path = result.path.with_name(f"{result.path.stem}{LAST_FRAME_SUFFIX}.png")
        is_current = path.is_file() and not path.is_symlink() and path.stat().st_mtime >= result.changed
        if not is_current:
            if path.is_symlink() or path.is_dir():
                raise refusal("%(path)s is not an image. Remove it first.", path=path)
            frame = None
            for frame in video_frames(result.path):  # noqa: B007 (only the last one is needed)
                pass
            if frame is None:
                raise MediaError(say("%(path)s has no frame", path=result.path))
            write_png(path, frame, {f"{PREFIX}last_frame_of": result.path.name})
        self.folders.list_all()  # makes the new image available to requests
        status = path.stat()
        return Result(path, status.st_mtime, status.st_size)

    # --- use as sample prompt

    def list_prompt_files(self, family: str) -> list[Path]:
        """Return the prompts.txt files of the folders whose run.toml trains a model of this family."""
        prompt_files = []
        # the catalogue's names of the family, such as `wan22` for `wan`
        script = f"{with_scripts()[family].generation_script}.py" if family in with_scripts() else ""
        catalog_families = {
            model.family for model in model_sets() if script in model.commands.get("generate", "").split()
        }
        families = {family, *catalog_families}
        for folder in list_media_folders(self.site.runs):
            if not folder.is_described or (folder.path / PROMPTS_FILE).is_symlink():
                continue
            with contextlib.suppress(OSError, ValueError):
                described = read_described(folder.path)
                if described.family in families:
                    prompt_files.append(folder.path / PROMPTS_FILE)
        return prompt_files

    def show_sample(self, result: Result, error: str) -> Response:
        """Return the dialog that offers to add a result's prompt and settings to one of the prompts.txt."""
        line = ""
        files: list[tuple[Path, str, str]] = []
        problem = ""
        try:
            settings = self.require_settings(result)
            line = format_sample_line(settings)
            for path in self.list_prompt_files(settings.family):
                content = _read_or_nothing(path)
                files.append((path, compute_checksum(content), (content or b"").decode("utf-8", "replace")))
        except (UserError, OSError, ValueError) as reason:
            problem = str(reason)
        return self.answer_dialog("sample", result, error, problem=problem, line=line, files=files)

    def add_sample(self, result: Result, form: Form) -> Response:
        """Add a result's prompt line to a prompt file, unless the file has changed or contains the line."""
        settings = self.require_settings(result)
        line = format_sample_line(settings)
        # path and checksum of the file when the dialog was shown; the path may contain spaces
        selected_path, _, checksum = "".join(form.get("file", ())).rpartition(" ")
        prompt_files = {str(path): path for path in self.list_prompt_files(settings.family)}
        path = prompt_files.get(selected_path)
        if path is None:
            return self.show_sample(result, say("Choose a folder."))
        try:
            with self._prompts_lock:
                is_added = add_line(path, line, checksum)
        except ChangedMeanwhileError:
            return self.show_sample(
                result, say("%(path)s has changed in the meantime. Its current version is shown.", path=path)
            )
        if is_added:
            message = say("It is now the last line of %(path)s. The next samples will include it.", path=path)
        else:
            message = say("%(path)s has this line already.", path=path)
        return self.answer_dialog("done", result, text=message)

    # --- remove

    def show_remove(self, result: Result, error: str) -> Response:
        """Return the dialog that asks before a result is moved into the bin."""
        root = self.site.runs.find_top(result.path)
        return self.answer_dialog("remove", result, error, root=root)

    def remove(self, result: Result, _: Form) -> Response:
        """Move a result, with its layers, into the bin of its root."""
        root = self.site.runs.find_top(result.path)
        folder = BinFolder(root / BIN).move_in(
            title=result.path.name, base=root, paths=[result.path, *result.layers]
        )
        self.folders.list_all()
        return self.answer_dialog("done", result, text=say("It is in %(folder)s now.", folder=folder))

    def change(self, request: Request, form: Form) -> Response:
        """Handle a pressed button of the result that the URL names."""
        result = self.find(request)
        change = self.changes.get(request.path_params["what"])
        if change is None:
            return answer_unknown()
        if result is None:
            return answer_message(say("This file no longer exists."), is_rejected=True)
        try:
            return change(result, form)
        except (UserError, OSError, ValueError) as error:
            return answer_message(str(error), is_rejected=True)


def _read_or_nothing(path: Path) -> bytes | None:
    try:
        return read_content(path, MAX_PROMPT_FILE_BYTES)
    except FileNotFoundError:
        return None


def add_line(path: Path, line: str, checksum: str) -> bool:
    """Add a line at the end of a prompt file; return False if the file already contains it.

    All other bytes are preserved.

    Args:
        checksum: Checksum (`compute_checksum`) of the content that was shown.

    Raises:
        ChangedMeanwhileError: If the file has other content now.
        ValueError: If the file is not UTF-8.
        OSError: If the file cannot be read.
        OutputError: If the file cannot be written.
    """
    content = _read_or_nothing(path)
    if compute_checksum(content) != checksum:
        raise ChangedMeanwhileError
    old_content = content or b""
    old_lines = old_content.decode("utf-8-sig").split("\n")
    if line in [old_line.strip() for old_line in old_lines]:
        return False
    newline = b"\r\n" if b"\r\n" in old_content else b"\n"
    has_open_line = bool(old_content) and not old_content.endswith((b"\n", b"\r"))
    separator = newline if has_open_line else b""
    _replace_file(path, old_content + separator + line.encode() + newline)
    return True


def _replace_file(path: Path, content: bytes) -> None:
    """Write a file that keeps its permissions, because `write_bytes` replaces the file by a new one."""
    permissions = None
    with contextlib.suppress(OSError):  # there is no such file yet
        permissions = path.stat().st_mode & 0o777
    write_bytes(path, content)
    if permissions is not None:
        path.chmod(permissions)


def describe_upscaled_size(result: Result) -> str:
    """Describe the size that an image or clip gets by upscaling; "" if the file cannot be read."""
    if result.kind == "sound":
        return ""
    try:
        width, height = frame_size(result.path)
    except (MediaError, OSError):
        return ""
    return say(
        "%(factor)s x %(factor2)s pixels, from %(width)s x %(height)s",
        factor=UPSCALE_FACTOR * width,
        factor2=UPSCALE_FACTOR * height,
        width=width,
        height=height,
    )


def result_routes(site: Site) -> list[Route]:
    """Return the routes of results."""
    pages = ResultPages(site)
    return [
        Route("/results", pages.show_layout),
        Route("/results/part", pages.show_part),
        Route("/results/{id}/commands", pages.show_commands),
        Route("/results/{id}/layer/{index}", pages.show_layer),
        Route("/results/{id}/{what}", pages.show_dialog),
        Route("/results/{id}/{what}", answer_form(pages.change), methods=["POST"]),
        Route("/result/{name}", pages.show_file),
    ]
