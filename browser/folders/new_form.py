"""Convert the fields of the New page to a `new` command, and check them."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from browser.folders.described_folder import DescribedFolder, KeyChanges, change_steps
from downloads.catalogue import ModelSet
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.option_values import option_argv
from modules.output_files import check_output_name
from modules.pages.language import join, refusal, say
from modules.pages.page import encode_address
from modules.paths import strip_quotes
from project.kinds.composing import BY_NAME, KINDS, LORA, find_control_kind
from project.kinds.contract import RunKind
from project.kinds.whole_model import FULL
from project.new_options import NewOptions
from project.options import MODELS, check_trigger, find_models
from project.recipes.reading import TrainingRecipe, list_paths, read_recipe

# a number with any country's thousands separators: 2,000 or 2 000
GROUPED_NUMBER = re.compile(r"[1-9]\d{0,2}(?:([,.' _\u00a0\u202f\u2019])\d{3})(?:\1\d{3})*", re.ASCII)
# full-width digits, as Japanese input methods produce them
FULL_WIDTH_DIGITS = {0xFF10 + digit: str(digit) for digit in range(10)}
DEFAULT_STEPS = NewOptions(folder=Path()).max_train_steps
MAX_STEPS = 10_000_000
# field name -> label, for the fields that `new` writes into all three files
SHARED_FIELDS = {
    "family": say("Model"),
    "task": say("Version"),
    "train": say("What is trained"),
    "trigger": say("Trigger word"),
    "model_files": say("model files"),
    "recipe": say("Recipe"),
}
# fields that are keys of run.toml only
RUN_FILE_FIELDS = {
    "name": say("Name"),
    "steps": say("Training steps"),
}
KIND_TITLES = {  # name of a kind of run -> title
    "lora": say("a LoRA"),
    "adapter": say("a training adapter"),
    "lllite": say("a ControlNet-LLLite"),
    "lllite_inpainting": say("a ControlNet-LLLite for inpainting"),
    "controlnet": say("a ControlNet"),
    "embedding": say("an embedding"),
    "whole": say("the whole model"),
}
KIND_NOTES = {
    "lora": say(
        "A LoRA is a small file next to the model, suited to a person, an object or a style. The "
        "whole model learns a domain of hundreds of files."
    ),
    "adapter": say(
        "A LoRA that unlearns what the model was distilled for. Other LoRAs are trained with it and used "
        "without it. It learns best from images that the model made itself."
    ),
    "lllite": say(
        "Small networks that follow control images: edges, depth or poses. These lie in a folder "
        "conditioning inside this one, under the names of the images."
    ),
    "lllite_inpainting": say(
        "Small networks that repaint what a mask marks. They learn from the images alone: each step marks "
        "a random part of one."
    ),
    "controlnet": say(
        "A copy of half of the model that follows control images: edges, depth or poses. These lie in a "
        "folder conditioning inside this one, under the names of the images."
    ),
    "embedding": say("A new word for what the model can draw already: the trigger word, in small letters."),
}

# common subjects and styles that every model already knows by name
COMMON_WORDS = frozenset(
    {
        *("animal", "anime", "baby", "bag", "bird", "bike", "boat", "body", "bottle", "boy"),
        *("building", "cake", "car", "cartoon", "castle", "cat", "chair", "character", "child"),
        *("city", "cloud", "clothes", "comic", "cup", "dog", "doll", "dragon", "dress", "drawing"),
        *("elf", "face", "fish", "flower", "food", "forest", "fox", "girl", "guy", "hair", "hat"),
        *("home", "horse", "house", "human", "illustration", "kid", "kitten", "lady", "landscape"),
        *("lion", "logo", "man", "manga", "monster", "mountain", "mouse", "object", "painting"),
        *("pattern", "people", "person", "photo", "picture", "pixel", "plant", "portrait", "puppy"),
        *("rabbit", "robot", "room", "shirt", "shoe", "sketch", "sky", "style", "suit", "sword"),
        *("texture", "tiger", "toy", "train", "tree", "truck", "watch", "watercolor"),
        *("wolf", "woman"),
    }
)


@dataclass(frozen=True)
class NewForm:
    """Field values of the New page."""

    folder: str = ""
    family: str = ""
    task: str = ""
    train: str = ""  # name of a kind of run; "": a LoRA
    trigger: str = ""
    name: str = ""
    steps: str = str(DEFAULT_STEPS)
    model_files: Mapping[str, str] = field(default_factory=dict)  # files outside the models folder, by option
    recipe: str = ""  # name of a recipe; "": the values of `new`

    @classmethod
    def from_fields(cls, form: Mapping[str, Sequence[str]]) -> "NewForm":
        """Read the form from the fields of a request."""
        texts = {name: "".join(values).strip() for name, values in form.items()}
        # "FAMILY", or "FAMILY TASK" from a list of all models; a field `task` takes precedence
        family, _, task_in_family = texts.get("family", "").partition(" ")
        task = select_single_task(family, texts.get("task", task_in_family))
        model = find_model(family, task)
        train = texts.get("train", "")
        fitting_recipes = [recipe.name for recipe in list_fitting_recipes(family, task, train)]
        return cls(
            folder=strip_quotes(texts.get("folder", "")),
            family=family,
            task=task,
            train=_select_supported_kind(train, model),
            trigger=texts.get("trigger", ""),
            name=texts.get("name", ""),
            steps=remove_thousands_separators(texts.get("steps", str(DEFAULT_STEPS))),
            model_files={
                name.removeprefix("file_"): strip_quotes(text)
                for name, text in texts.items()
                if name.startswith("file_") and text
            },
            recipe=texts["recipe"] if texts.get("recipe") in fitting_recipes else "",
        )

    @classmethod
    def from_address(cls, address: str) -> "NewForm":
        """Read the form from a URL that `NewForm.address` has returned."""
        return cls.from_fields(parse_qs(urlsplit(address).query))

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> "NewForm":
        """Read the form from a command line that `make_new_argv` has returned."""
        options: dict[str, str] = {}
        model_files: dict[str, str] = {}
        for word, next_word in zip(argv, argv[1:], strict=False):
            if word == "--model_file":
                name, _, path = next_word.partition("=")
                model_files[name] = path
            elif word.startswith("--"):
                options[word] = next_word
        return cls(
            folder="".join(argv[2:3]),  # reelsmith new FOLDER ...
            family=options.get("--family", ""),
            task=options.get("--task", ""),
            train=_read_kind(options.get("--train", "")),
            trigger=options.get("--trigger_word", ""),
            name=options.get("--output_name", ""),
            steps=options.get("--max_train_steps", str(DEFAULT_STEPS)),
            model_files=model_files,
            recipe=options.get("--recipe", ""),
        )

    @classmethod
    def from_described(cls, described: DescribedFolder, models: Path) -> "NewForm":
        """Return the form with the values of a folder's run.toml. Files in `models` need no field."""
        return cls(
            folder=str(described.folder),
            family=described.family,
            task=described.task,
            train=_read_kind(described.train),
            trigger=described.trigger,
            name=described.name,
            steps="" if described.steps is None else str(described.steps),
            model_files={
                name: path
                for name, path in described.model_files.items()
                if not Path(path).is_relative_to(models.absolute())
            },
        )

    def with_folder(self, folder: Path) -> "NewForm":
        """Return the form with another folder."""
        return replace(self, folder=str(folder))

    @property
    def subject(self) -> str:
        """The folder and the model, on which the usual kind of training depends."""
        return "|".join((self.folder, self.family, self.task))

    @property
    def address(self) -> str:
        """URL of the page with these fields filled in."""
        fields = {"family": self.family, "task": self.task, "trigger": self.trigger, "name": self.name}
        fields |= {
            "train": self.train,
            "recipe": self.recipe,
            "steps": self.steps,
            **{f"file_{name}": path for name, path in self.model_files.items()},
        }
        filled = {"folder": self.folder} | {name: text for name, text in fields.items() if text}
        return f"/new?{encode_address(filled)}"


def name_field(kind: RunKind) -> str:
    """Return the value of the field `train` for a kind of run."""
    return "" if kind is LORA else kind.name


def _read_kind(name: str) -> str:
    return "" if name == LORA.name else name


def _select_supported_kind(name: str, model: ModelSet | None) -> str:
    """Return the value `name` of the field `train` if the model supports this kind of training; else ""."""
    kind = BY_NAME.get(name)
    is_possible = model is not None and kind in list_shown_kinds(model)
    return name_field(kind) if kind is not None and is_possible else ""


def list_fitting_recipes(family: str, task: str, train: str) -> list[TrainingRecipe]:
    """Return the training recipes for a model and a kind of training, the value `train`."""
    recipes = []
    for path in list_paths():
        with contextlib.suppress(OptionError):  # a file in the user's folder that is not a recipe
            recipes.append(read_recipe(path))
    kind = train or LORA.name
    return [one for one in recipes if (one.family, one.task, one.train) == (family, task, kind)]


def list_shown_kinds(model: ModelSet) -> list[RunKind]:
    """Return the kinds of runs that the page offers.

    These are the kinds of training that the model supports, and full training even if the model does not
    support it: the page then shows the reason.
    """
    return [kind for kind in KINDS if kind is FULL or kind.find_script(model) is not None]


def select_single_task(family: str, task: str) -> str:
    """Return a family's only task if it has just one; otherwise the selected task."""
    tasks = [model.task for model in find_models() if model.family == family]
    return tasks[0] if len(tasks) == 1 else task


def find_model(family: str, task: str) -> ModelSet | None:
    """Return the model with these names; None if there is none."""
    return next((model for model in find_models() if (model.family, model.task) == (family, task)), None)


def check_form(form: NewForm) -> None:
    """Raise OptionError for the first field that `new` would reject. The message begins with its label."""
    models = find_models()
    families = list(dict.fromkeys(model.family for model in models))
    if not form.family:
        raise refusal("Model: choose one.")
    if form.family not in families:
        raise refusal(
            "Model %(family)s: choose one of %(names)s.", family=form.family, names=join(", ", families)
        )
    tasks = [model.task for model in models if model.family == form.family]
    if form.task not in tasks:
        field_and_value = join(" ", filter(None, (say("Version"), form.task)))
        raise refusal(
            "%(problem)s: choose one of %(names)s.", problem=field_and_value, names=join(", ", tasks)
        )
    if not form.trigger and BY_NAME[form.train or LORA.name].trains_embedding:
        raise refusal("Trigger word: an embedding is a new word. Enter one, such as mrsfluff.")
    for check in FIELD_CHECKS.values():
        check(form)


def check_trigger_field(form: NewForm) -> None:
    """Raise OptionError for a trigger word that `new` would reject."""
    if form.trigger:
        try:
            check_trigger(form.trigger)
        except OptionError as error:
            raise OptionError(str(error).replace("--trigger_word", say("Trigger word"))) from None


def hint_at_word(word: str) -> str:
    """Return a warning if models already know the trigger word; "" for any other word."""
    if word.strip().lower() not in COMMON_WORDS:
        return ""
    return say(
        "Every model already knows %(word)s: what it draws for that word changes too. A made-up "
        "word changes only your subject.",
        word=word.strip(),
    )


def check_name_field(form: NewForm) -> None:
    """Raise OptionError for a name that no file can have."""
    if "/" in form.name or "\\" in form.name:
        raise refusal(
            "Name %(name)s: a name has no slash. Use one of letters and numbers, such as my_lora.",
            name=form.name,
        )
    if form.name:
        check_output_name(say("Name"), form.name)


def check_steps_field(form: NewForm) -> None:
    """Raise OptionError if the number of steps is not valid."""
    if form.steps:  # if empty, the value of `new` or of the files is used
        read_steps(form.steps)


# field name -> its check, for the fields that are checked during typing
FIELD_CHECKS: Mapping[str, Callable[[NewForm], None]] = {
    "trigger": check_trigger_field,
    "name": check_name_field,
    "steps": check_steps_field,
}


def list_field_errors(form: NewForm) -> dict[str, str]:
    """Return the error message that `new` would give for each invalid field, by field name."""
    errors = {}
    for name, check in FIELD_CHECKS.items():
        try:
            check(form)
        except OptionError as error:
            errors[name] = str(error)
    return errors


def read_steps(text: str) -> int:
    """Return the number of steps in a field. Raises OptionError if it is not a valid number."""
    steps = parse_integer(text, MAX_STEPS)
    if steps is None:
        raise refusal(
            "Training steps %(text)s: use a whole number from 1 to %(most_steps)s, such as %(usual_steps)s.",
            text=shorten(text, 40),
            most_steps=f"{MAX_STEPS:,}",
            usual_steps=DEFAULT_STEPS,
        )
    return steps


def remove_thousands_separators(text: str) -> str:
    """Remove the thousands separators from a number; return any other text unchanged."""
    text = text.translate(FULL_WIDTH_DIGITS)
    return re.sub(r"\D", "", text) if GROUPED_NUMBER.fullmatch(text) else text


def parse_integer(text: str, maximum: int) -> int | None:
    """Parse a positive integer; return None for any other text or a number above `maximum`."""
    text = remove_thousands_separators(text)
    digits = text.lstrip("0")
    if not (text.isascii() and text.isdecimal() and 0 < len(digits) <= len(str(maximum))):
        return None  # Python refuses to read thousands of digits
    number = int(digits)
    return number if number <= maximum else None


def make_new_argv(form: NewForm, models: Path, overwrite: bool = False, dry_run: bool = False) -> list[str]:
    """Return the `new` command that writes a folder's run.toml and dataset.toml from the form's values.

    Args:
        dry_run: Whether only to print how these files would change.
    """
    # `new` trains a control network by default where the model has one: then --train says `lora`
    model = find_model(form.family, form.task)
    usual_kind = None if model is None or find_control_kind(model) is None else LORA.name
    options = {
        "--family": form.family,
        "--task": form.task,
        "--train": form.train or usual_kind,
        "--recipe": form.recipe,
        "--trigger_word": form.trigger,
        "--output_name": form.name,
        "--max_train_steps": form.steps,
        "--models": "" if models == MODELS else str(models),
        "--overwrite": overwrite,
        "--dry_run": dry_run,
    }
    set_options = {name: value for name, value in options.items() if value}  # empty fields give no option
    argv = ["reelsmith", "new", form.folder, *option_argv(set_options)]
    for name, path in form.model_files.items():
        argv += ["--model_file", f"{name}={path}"]
    return argv


def list_changed_fields(form: NewForm, before: NewForm) -> list[str]:
    """Return the labels of the changed fields that apply to all files of a folder."""
    return [label for name, label in SHARED_FIELDS.items() if getattr(before, name) != getattr(form, name)]


def list_unsaved(sent: NewForm, initial: NewForm, saved: NewForm) -> list[str]:
    """Return the labels of the fields that the user has changed and that are not yet in the files.

    An empty name or number of steps stands for the value in the files.

    Args:
        sent: Values that the browser has sent.
        initial: Values when the page was loaded.
        saved: Values in the folder's current files.
    """
    labels: list[str] = []
    for name, label in (SHARED_FIELDS | RUN_FILE_FIELDS).items():
        value = getattr(sent, name)
        is_unsaved = value != getattr(initial, name) and value != getattr(saved, name)
        stands_for_saved_value = not value and name in RUN_FILE_FIELDS
        if is_unsaved and not stands_for_saved_value:
            labels.append(label)
    return labels


def list_key_changes(form: NewForm, before: NewForm, values: Mapping[str, Any]) -> KeyChanges:
    """Return the keys of run.toml that a form changes, including values derived from its steps.

    Args:
        before: Form with the values of the current files.
        values: Training options in run.toml.

    Raises:
        OptionError: If the number of steps is not valid.
    """
    changes: dict[str, Any] = {}
    if form.name and form.name != before.name:
        check_output_name(say("Name"), form.name)
        changes["output_name"] = form.name
    if form.steps == before.steps or not form.steps:
        return KeyChanges(changes)
    step_changes = change_steps(values, read_steps(form.steps))
    return KeyChanges({**changes, **step_changes.new_values}, step_changes.user_values)
