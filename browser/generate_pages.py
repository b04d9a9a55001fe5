"""The page Generate: a form for a picture or clip, what is being made, and the results of all days."""

import secrets
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from browser import compare
from browser.answers import Form, answer_file, answer_form, answer_gone, answer_page
from browser.making import Making
from browser.recipes import (
    LETTERS,
    RESULTS,
    Recipe,
    UsedLora,
    Wish,
    find_model_set,
    recipe_of_model,
    recipe_of_run,
)
from browser.results import list_results
from browser.site import Site
from browser.views import HERE, POLICY, label_runs
from downloads.catalogue import model_sets
from modules.errors import OptionError, UserError
from modules.pages.page import render_page

MOST_AT_ONCE = 64  # results of one press of Make
SHOWN = 48  # results in the page
LABELS = {
    "prompt": "Prompt",
    "negative": "Negative",
    "width": "Width",
    "height": "Height",
    "frames": "Frames",
    "steps": "Steps",
    "guidance": "Guidance",
    "seed": "Seed",
    "start": "Start from",
    "end": "End with",
    "references": "Edit",
    "count": "How many",
}
SEED_BITS = 32


@dataclass(frozen=True)
class MakingForm:
    """What the fields of the page Generate hold."""

    source: str = ""  # `run ID` or `model FAMILY TASK`
    texts: Mapping[str, str] = field(default_factory=dict)  # by the name of the field
    strengths: Mapping[str, str] = field(default_factory=dict)  # of chosen LoRAs, by path
    count: str = "1"
    is_locked: bool = False  # the seed stays in the form

    @classmethod
    def of_fields(cls, form: Mapping[str, Sequence[str]]) -> "MakingForm":
        """Return the form that a page has sent."""
        texts = {name: "".join(form[name]) for name in LABELS if name in form}
        chosen = form.get("lora", ())
        return cls(
            source="".join(form.get("source", ())),
            texts={name: text for name, text in texts.items() if name != "count"},
            strengths={path: "".join(form.get(f"strength {path}", ["1"])) for path in chosen},
            count=texts.get("count", "") or "1",
            is_locked="lock" in form,
        )


class GeneratePages:
    """Show the page Generate, and do what its buttons ask for."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.maker = site.maker

    def show(self, request: Request) -> Response:
        query = request.query_params
        form = MakingForm.of_fields({name: query.getlist(name) for name in query})
        return self.answer(form, is_new="prompt" not in query)

    def answer(self, form: MakingForm, error: str = "", is_new: bool = False) -> Response:
        """Return the page with a filled form.

        error: a message to show. is_new: show what the recipe usually has.
        """
        problem = error
        recipe = None
        with self.site.runs.lock:
            sources = self.list_sources()
            try:
                recipe = self.find_recipe(form.source or next(iter(sources), ""))
            except (UserError, OSError) as reason:
                problem = problem or str(reason)
        if recipe is not None and is_new:
            form = MakingForm(
                source=form.source,
                texts={**recipe.usual, "seed": ""},
                strengths={lora.path: lora.strength for lora in recipe.loras},
            )
        results = list_results(self.site.runs)
        command = ""
        if recipe is not None:
            wish = self.wish_of(recipe, form)
            command = shlex.join(wish.command(form.texts.get("seed", "")))
        values = {
            "form": form,
            "recipe": recipe,
            "labels": LABELS,
            "sources": sources,
            "loras": self.list_loras(recipe),
            "command": command,
            "makings": self.list_shown(),
            "loaded": self.maker.loaded,
            "results": results[:SHOWN],
            "num_results": len(results),
            "can_write": not self.site.read_only,
            "said": problem,
        }
        page = render_page(HERE / "generate.html", "Generate", values, POLICY)
        return answer_page(page, 422 if error else 200)

    def list_shown(self) -> list[Making]:
        """Return the wishes that have not ended well, and the newest that have."""
        makings = self.maker.list_all()
        return [making for making in makings if making.state != "finished"][::-1]

    def list_sources(self) -> dict[str, str]:
        """Return what can be generated with: runs with a command that generates, and released models."""
        sources = {}
        for run, label in label_runs(self.site.runs.list_all()):
            sources[f"run {run.id}"] = f"{label} (run)"
        for model in model_sets():
            if "generate" in model.commands and model.family != "stable_diffusion":
                sources[f"model {model.family} {model.task}"] = f"{model.family} {model.task}"
        return sources

    def find_recipe(self, source: str) -> Recipe:
        """Return the recipe of a source. Raises OptionError if there is none, OSError for a lost history."""
        kind, _, rest = source.partition(" ")
        if kind == "run":
            run = self.site.runs.find(rest)
            source_run = None if run is None else compare.read_source(self.site.runs, run)
            if source_run is None:
                raise OptionError("This run has no command that generates (any more).")
            return recipe_of_run(source_run)
        family, _, task = rest.partition(" ")
        model = find_model_set(family, task)
        if model is None:
            raise OptionError(f"{rest or source}: there is no such model.")
        return recipe_of_model(model, self.site.models, Path.cwd())

    def list_loras(self, recipe: Recipe | None) -> list[str]:
        """Return the LoRA files of runs of the recipe's family, as paths for its command."""
        if recipe is None:
            return []
        paths = [lora.path for lora in recipe.loras]
        with self.site.runs.lock:
            for run in self.site.runs.list_all():
                try:
                    source = compare.read_source(self.site.runs, run)
                except OSError:
                    continue
                if source is not None and source.family == recipe.family:
                    paths += [str(file.paths[0]) for file in source.files]
        return list(dict.fromkeys(paths))

    def save_path(self, recipe: Recipe) -> str:
        """Return the folder for results: that of the run's own command, else one in the first root."""
        return str(self.site.runs.tops[0] / RESULTS)

    def wish_of(self, recipe: Recipe, form: MakingForm) -> Wish:
        """Return what a form asks for."""
        texts = {name: form.texts.get(name, "") for name in LETTERS if name not in ("seed", "references")}
        references = [line.strip() for line in form.texts.get("references", "").splitlines() if line.strip()]
        return Wish(
            recipe=recipe,
            prompt=form.texts.get("prompt", ""),
            texts=texts,
            loras=[UsedLora(path, strength) for path, strength in form.strengths.items()],
            save_path=self.save_path(recipe),
            references=references,
        )

    def change(self, request: Request, fields: Form) -> Response:
        """Do what a button asks for."""
        form = MakingForm.of_fields(fields)
        number = "".join(fields.get("id", ()))
        what = request.path_params["what"]
        try:
            if what == "make":
                self.make(form)
            elif what == "free":
                self.maker.free()
            elif what in ("cancel", "again", "remove") and number.isdecimal():
                {"cancel": self.maker.cancel, "again": self.maker.again, "remove": self.maker.remove}[what](
                    int(number)
                )
                return self.answer(form, is_new=True)
            else:
                return PlainTextResponse("There is no such request.", 404)
        except (UserError, OSError) as error:
            return self.answer(form, str(error))
        return self.answer(form)

    def make(self, form: MakingForm) -> None:
        """Note the wishes of a form. Raises OptionError if they cannot be made."""
        with self.site.runs.lock:
            recipe = self.find_recipe(form.source)
        wish = self.wish_of(recipe, form)
        wish.check()
        seed = form.texts.get("seed", "").strip()
        if seed and not seed.isdecimal():
            raise OptionError(f"Seed {seed}: give a whole number, or leave it empty for another each time.")
        if not form.count.isdecimal() or not 1 <= int(form.count) <= MOST_AT_ONCE:
            raise OptionError(f"How many {form.count}: give a number from 1 to {MOST_AT_ONCE}.")
        first = int(seed) if seed else secrets.randbits(SEED_BITS)
        seeds = [str(first + place) for place in range(int(form.count))]
        self.maker.add([_maker_of(wish, each) for each in seeds])

    def show_result(self, request: Request) -> Response:
        """Return the file of a result."""
        name = request.path_params["name"]
        for result in list_results(self.site.runs):
            if result.address == f"/result/{name}":
                return answer_file(result.path) if self.site.runs.is_inside(result.path) else answer_gone()
        return answer_gone()


def _maker_of(wish: Wish, seed: str) -> Callable[[int], Making]:
    """Return a function that makes the record of one result, given its number."""

    def make(number: int) -> Making:
        return Making(
            id=number,
            title=wish.recipe.title,
            session=wish.session_words,
            command=wish.command(seed),
            request=wish.request(seed),
            folder=str(wish.recipe.folder),
            save_path=wish.save_path,
            created=time.time(),
        )

    return make


def generate_routes(site: Site) -> list[Route]:
    """Return the routes of the page Generate."""
    pages = GeneratePages(site)
    return [
        Route("/generate", pages.show),
        Route("/generate/{what}", answer_form(pages.change), methods=["POST"]),
        Route("/result/{name}", pages.show_result),
    ]
