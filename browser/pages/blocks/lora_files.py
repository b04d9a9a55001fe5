"""The LoRA files below the folders of the page, and what each can be generated with."""

import contextlib
import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from browser.core.server_state import Site
from browser.folders.folders import find_file
from browser.runs.comparable_runs import LORA, read_source, trains_lora
from browser.runs.recipes import ModelRecipe, UsedLora, can_generate, make_model_recipe, make_run_recipe
from browser.runs.runs import RunSummary
from downloads.catalogue import ModelSet, model_sets, model_title
from modules.console import format_size
from modules.pages.language import join, refusal, say
from modules.text_files import read_tensor_header, real_path, require_regular_file
from networks.module_names import list_accepted_families, read_family
from protocols.families import HIGH_NOISE, LOW_NOISE, with_scripts

FOLDER = "loras"  # of downloaded files, in each root and in the folder of models
SUFFIX = ".safetensors"
MAX_FILES = 500
IS_LORA = re.compile(r"lora|lokr_|hada_|oft_|ia3|\.diff(_b)?$")  # in the name of a tensor
BAKED = "reelsmith_blocks"  # metadata that tools/blocks.py writes


@dataclass(frozen=True)
class LoraHeader:
    """What the header of a LoRA file says."""

    family: str  # as LoRA files name it; "" if it is unknown
    is_baked: bool  # written with other strengths of its blocks


@dataclass(frozen=True)
class ListedLora:
    """A LoRA file below the folders, in a list."""

    path: Path
    size_bytes: int
    header: LoraHeader

    @property
    def about(self) -> str:
        """The model, the size and what was changed, as text."""
        words = [model_title(self.header.family)] if self.header.family else []
        words.append(format_size(self.size_bytes))
        if self.header.is_baked:
            words.append(say("with changed blocks"))
        return join(" · ", words)


@functools.lru_cache(maxsize=10_000)
def _read_header(path: Path, _changed: int, size: int) -> LoraHeader | None:
    """Return the header of a LoRA file; None for other files. The time and the size are only cache keys."""
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            header = read_tensor_header(file.read, size)
    except (OSError, ValueError):
        return None
    if not any(IS_LORA.search(name) for name in header.entries):
        return None
    family = read_family(header.metadata)
    return LoraHeader("" if family is None else family.name, BAKED in header.metadata)


def read_lora_file(path: Path) -> ListedLora | None:
    """Return a LoRA file as a list shows it; None for other files."""
    try:
        status = path.stat()
    except OSError:
        return None
    header = _read_header(path, status.st_mtime_ns, status.st_size)
    return None if header is None else ListedLora(path, status.st_size, header)


def list_lora_files(site: Site) -> list[ListedLora]:
    """Return the LoRA files next to the histories of runs and in folders named `loras`, at most MAX_FILES."""
    with site.runs.lock:
        folders = [run.history.parent for run in site.runs.list_all()]
    folders += [top / FOLDER for top in (*site.runs.root_folders, site.models.absolute())]
    files = []
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            file = read_lora_file(path) if is_shown(site, path) else None
            if file is not None:
                files.append(file)
            if len(files) == MAX_FILES:
                return files
    return files


def is_shown(site: Site, path: Path) -> bool:
    """Return whether a file is below the folders of the page, or in the folder of models."""
    return site.runs.is_inside(path) or (
        path.is_file() and real_path(path).is_relative_to(real_path(site.models.absolute()))
    )


def find_lora(site: Site, text: str) -> Path:
    """Return the path of a LoRA file that a form names.

    Raises:
        OptionError: If there is no LoRA file below the folders with this path.
    """
    path = find_file(site.runs, text) or Path(text)
    if not text.strip() or path.suffix != SUFFIX or not path.is_absolute() or not is_shown(site, path):
        raise refusal("%(path)s: there is no such LoRA file below the folders.", path=text[:200])
    if read_lora_file(path) is None:
        raise refusal("%(path)s is not a LoRA.", path=path.name)
    return path


def find_run_lora(site: Site, run_id: str) -> Path | None:
    """Return the best LoRA file of a run, or else its last one; None if it has none."""
    with contextlib.suppress(OSError), site.runs.lock:
        run = site.runs.find(run_id)
        source = None if run is None else read_source(site.runs, run)
        if source is not None and LORA in source.options and source.files:
            best = next((file for file in source.files if file.is_best), source.files[-1])
            return best.paths[0]
    return None


def list_experts_files(path: Path) -> list[Path]:
    """Return a LoRA file; of a pair for two experts, both files: first the one for low noise."""
    low = path.with_name(path.name.replace(f"_{HIGH_NOISE}.", f"_{LOW_NOISE}."))
    high = path.with_name(path.name.replace(f"_{LOW_NOISE}.", f"_{HIGH_NOISE}."))
    return [low, high] if low != high and low.is_file() and high.is_file() else [path]


def list_used_loras(path: Path, recipe: ModelRecipe, strength: str) -> list[UsedLora]:
    """Return the files of a LoRA as a generation uses them, each with its expert."""
    files = list_experts_files(path)
    if not recipe.has_experts:
        return [UsedLora(str(path), strength)]
    if len(files) == 2:
        return [UsedLora(str(files[0]), strength), UsedLora(str(files[1]), strength, HIGH_NOISE)]
    used = []
    if f"_{HIGH_NOISE}." not in path.name:
        used.append(UsedLora(str(path), strength))
    if f"_{LOW_NOISE}." not in path.name:
        used.append(UsedLora(str(path), strength, HIGH_NOISE))
    return used


def list_sources(site: Site, path: Path) -> Mapping[str, str]:
    """Return what a LoRA can be generated with: form values `run ID` and `model FAMILY TASK` with titles.

    The run that trained it, or another one of its folder, comes first; then released models on disk.
    """
    sources = {
        f"run {run.id}": say("%(label)s (run)", label=run.shown_name) for run in _list_runs(site, path)
    }
    for model in _list_models(site, path):
        sources[f"model {model.family} {model.task}"] = join(" · ", (say(model.title), say(model.about)))
    return sources


def _list_runs(site: Site, path: Path) -> list[RunSummary]:
    """Return the runs next to a LoRA file that trained LoRAs: first that with the longest fitting name."""
    with site.runs.lock:
        runs = [run for run in site.runs.list_all() if run.history.parent == path.parent]
        runs = [run for run in runs if trains_lora(site.runs, run)]
    return sorted(runs, key=lambda run: -len(run.name) * path.name.startswith(run.name))


def _list_models(site: Site, path: Path) -> list[ModelSet]:
    """Return the released models on disk that a LoRA file names in its metadata."""
    file = read_lora_file(path)
    if file is None or not file.header.family:
        return []
    families = {f"{entry.generation_script}.py": name for name, entry in with_scripts().items()}
    fitting = []
    for model in filter(can_generate, model_sets()):
        paths = [site.models / part.path for part in model.components if part.option]
        if not all(part.exists() for part in paths):
            continue
        script = next(word for word in shlex.split(model.commands["generate"]) if word in families)
        accepted = list_accepted_families(families[script])
        names = {name for family in accepted for name in (family.name, *family.compatible_families)}
        if file.header.family in names:
            fitting.append(model)
    return fitting


def find_recipe(site: Site, sources: Sequence[str], source: str) -> ModelRecipe | None:
    """Return the recipe of one of the sources of a LoRA, by default the first; None without any.

    Raises:
        OSError: If the history of a run cannot be read.
    """
    chosen = source if source in sources else next(iter(sources), "")
    kind, _, name = chosen.partition(" ")
    if kind == "run":
        with site.runs.lock:
            run = site.runs.find(name)
            run_source = None if run is None else read_source(site.runs, run)
        return None if run_source is None else make_run_recipe(run_source)
    family, _, task = name.partition(" ")
    for model in model_sets():
        if chosen and (model.family, model.task) == (family, task):
            return make_model_recipe(model, site.models, Path.cwd())
    return None
