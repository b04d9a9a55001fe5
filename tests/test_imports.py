"""The import arrows of docs/architecture.md, and what light programs load."""

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from protocols.families import FOLDERS, with_scripts

ROOT = Path(__file__).resolve().parent.parent
GROUND = {"modules", "protocols", "checkpoints", "runtime"}
MAY_IMPORT = {
    "modules": set(),
    "protocols": {"modules", "checkpoints.opening", "checkpoints.stored", "downloads.catalogue"},
    "checkpoints": {"modules", "protocols"},
    "runtime": {"modules", "protocols", "checkpoints"},
    "dataset": GROUND | {"data_tools.report"},
    "data_tools": GROUND | {"dataset", "postprocessing.faces"},
    "networks": GROUND,
    "finetune": GROUND | {"data_tools"},
    "postprocessing": GROUND | {"downloads.catalogue"},
    "blissful_tuner": GROUND,
    "encoders": GROUND,
    "wan": GROUND | {"networks.names", "encoders"},
    "hunyuan_model": GROUND | {"networks.names", "encoders"},
    "frame_pack": GROUND | {"networks.names", "encoders", "hunyuan_model"},
    "flux": GROUND | {"networks.names", "encoders", "hunyuan_model"},
    "flux_2": GROUND | {"networks.names", "encoders", "hunyuan_model", "flux.names"},
    "flux_3": GROUND | {"networks.names", "encoders", "flux_2"},
    "hunyuan_image": GROUND | {"networks.names", "encoders", "hunyuan_model"},
    "ltx_2": GROUND | {"networks.names", "encoders"},
    "lumina": GROUND | {"networks.names", "encoders"},
    "qwen_image": GROUND | {"networks.names", "encoders", "hunyuan_model", "wan"},
    "krea2": GROUND | {"networks.names", "encoders", "lumina", "qwen_image"},
    "qwen_image_21": GROUND | {"networks.names", "encoders", "qwen_image", "wan"},
    "moss_image": GROUND | {"networks.names", "encoders", "lumina", "krea2", "flux_2"},
    "hidream_o1": GROUND | {"networks.names", "encoders", "lumina"},
    "ernie_image": GROUND | {"networks.names", "encoders", "lumina", "flux_2"},
    "ideogram4": GROUND | {"networks.names", "encoders", "lumina", "flux_2"},
    "kandinsky": GROUND | {"networks.names", "encoders", "hunyuan_model"},
    "hunyuan_video_15": GROUND | {"networks.names", "encoders", "hunyuan_model", "hunyuan_image"},
    "fibo_2": GROUND | {"networks.names", "encoders", "lumina", "z_image", "krea2", "flux_2"},
    "minimax_h3": GROUND | {"networks.names", "encoders"},
    "z_image": GROUND | {"networks.names", "encoders", "lumina"},
    "anima": GROUND | {"networks.names", "encoders", "qwen_image", "wan"},
    "generation": GROUND | {"networks", "blissful_tuner", "postprocessing"},
    "stable_diffusion": GROUND | {"networks", "encoders", "generation", "blissful_tuner", "postprocessing"},
    "training": GROUND
    | {"networks", "dataset", "data_tools.report", "generation", "blissful_tuner", "downloads.catalogue"},
    "downloads": GROUND,
    "diagnosis": GROUND | {"dataset", "data_tools.report", "networks", "project.options", "training"},
    "project": GROUND | {"dataset", "data_tools.report", "downloads", "networks.kinds", "training"},
    "browser": GROUND
    | {"training.reports", "training.config_options", "training.features.composing"}
    | {"training.learning_options", "training.noise_options", "training.saving.options"}
    | {"downloads.catalogue", "downloads.listing"}
    | {
        "dataset.subset_options",
        "data_tools.masks.places",
        "data_tools.tags.labels",
        "project.new_options",
        "project.options",
        "project.recipes",
        "project.run_options",
        "project.model_sizes",
        "project.kinds",
        "project.known_folders",
        "project.media",
        "generation.prompt_lines",
        "generation.script_options",
    }
    | {"generation.options", "generation.sample_lines", "networks.module_names", "networks.typed_strengths"}
    | {"training.saving.files"},
}
# Rooms, file or folder, from the ground up: a room imports rooms of lower floors only.
FLOORS = {
    "modules": (
        {"errors", "flow", "limits", "memory_limit", "screen", "script_words", "seeds"}
        | {"nvidia_driver", "private_torch"}
        | {"integers", "open_files", "text_encodings", "varints", "version"},
        {"card_builds", "control_codes", "option_tables", "text_files", "zip_files"},
        {"compiler_errors", "output_files", "paths", "run_limits"}
        | {"typed_command", "user_files", "yaml_files"},
        {"atomic_write", "devices", "file_locks", "installation", "onnx_models", "option_values"},
        {"option_checks"},
        {"backups", "extensions", "file_batches", "installed", "line_kinds", "options"},
        {"compile_options", "extension_words", "help_text", "repeated_options"},
        {"speed_options"},
        {"console", "environment", "progress"},
        {"command"},
        {"chat_templates", "error_output", "lost_processes", "mistyped", "template_process"},
        {"downloading", "parser"},
        {"console_options", "table_parser"},
        {"early_errors", "table_answers"},
        {"interpreter", "script_options"},
        {"attention", "bars", "layers", "media"} | {"minimal_options"},
        {"pages"},
    ),
    "runtime": (
        {"compile", "run_blocks"},
        {"kv_cache"},
        {"offload"},
        {"ways"},
        {"machine", "options"},
        {"doctor", "network_setup", "planning", "step_cache"},
    ),
    "dataset": (
        {"other_trainers"},
        {"config_keys"},
        {"timestep_keys"},
        {"subset_options"},
        {"cache_files", "table"},
        {"idle_keys", "sources"},
        {"forms"},
        {"subsets"},
        {"config"},
        {"listing", "options"},
        {"cache", "control_pairs"},
        {"batches", "caching"},
        {"scripts"},
    ),
    "data_tools": (
        {"folders"},
        {"captions", "cogvideox", "controls", "cutting", "masks", "report", "smaller_images"},
        {"face_crops", "folder_dataset"},
        {"metadata", "tags"},
        {"bucket_latents", "cleaning", "folder_captions"},
    ),
    "postprocessing": (
        {"contract", "options", "streaming"},
        {"tiling"},
        {"faces", "interpolation", "upscaling"},
        {"blurring", "chain_options"},
        {"naming", "stages"},
        {"run"},
        {"scripts"},
    ),
    "training": (
        {"kohya_page", "learner"},
        {
            *{"config_options", "learning_options", "noise_options", "run_options"},
            *{"other_models", "steps", "trainable"},
        },
        {"bad_steps", "processes", "reports", "run_end", "token_captions"},
        {"loss", "saving"},
        {"data", "optimizers"},
        {"samples", "targets"},
        {"features"},
        {"options", "scoring"},
        {"adapted"},
        {"caching_inside", "unused_options", "edited_prompts", "experts", "image_options"},
        {"checks", "resuming"},
        {"plan", "whole_checkpoint"},
        {"planning", "validation"},
        {"training_run"},
        {"image_metadata"},
        {"metadata"},
        {"next_commands", "previews", "saver"},
        {"rewinding"},
        {"loop"},
        {"learning", "summary"},
        {"run"},
        {"scripts"},
    ),
}
# what loads no torch: it only answers, or runs for long beside a training
LIGHT_PROGRAMS = {
    "--help and wrong options": ("modules/interpreter.py",),
    "run": ("run_project.py", "project/running.py"),
    "recipe": ("tools/recipe.py", "project/recipes/saving.py"),
    "download": ("tools/download.py", "downloads/fetching.py"),
    "page": ("tools/run_browser.py", "browser/core/server.py"),
    # the page reads their DEFAULTS
    "generation scripts": tuple(f"{entry.generation_script}.py" for entry in with_scripts().values()),
}
HEAVY = ("torch", "accelerate", "transformers", "diffusers", "safetensors", "peft", "matplotlib")
SCRIPTS = sorted(
    path.name
    for path in ROOT.glob("*.py")
    if path.name not in {"run_tests.py", "quickstart.py", "reelsmith.py", "set_up.py"}
)
# scripts in a room, with the rights of those at the root
_TOOLS = {
    "tools": (
        *("blocks", "cache_on_ray", "canny", "caption_dataset", "compare", "control_pictures"),
        *("convert_cache", "dataset_report", "detect_face_rotate", "diagnose", "doctor", "judge_loras"),
        *("download", "lora_post_hoc_ema", "prepare_dataset", "profile_blocks", "quantise", "run_browser"),
        *("mask", "merge_models", "pack", "recipe", "regularize", "resize_images_to_resolution", "score"),
        *("share_page", "show_metadata", "split_video", "tag", "unpack"),
    ),
    "blissful_tuner": (
        *("GIMMVFI", "facefix", "metaview", "model_utility", "upscaler", "video_to_png", "yolo_blur"),
    ),
    "networks": (
        *("convert_flux_lora", "convert_hunyuan_image_lora_to_comfy", "convert_z_image_lora_to_comfy"),
        *(
            "convert_anima_lora_to_comfy",
            "convert_hunyuan_video_1_5_lora_to_comfy",
            "extract_lora_from_models",
            "flux_extract_lora",
            "flux_merge_lora",
            "resize_lora",
        ),
        *("check_lora_weights", "merge_lora", "sdxl_merge_lora", "svd_merge_lora"),
    ),
    "finetune": (
        *("clean_captions_and_tags", "make_captions", "make_captions_by_git", "merge_captions_to_metadata"),
        *("merge_dd_tags_to_metadata", "prepare_buckets_latents", "tag_images_by_wd14_tagger"),
    ),
}
# lines, without docstrings and comments, that a training of caches reads at its start, without the family's;
# about 3 % more than today, as options stand beside code that is read later anyway
MAX_READ = 49_000
MAX_READ_TO_GENERATE = 22_200  # the same of a generation
TOOLS = [f"{room}/{name}.py" for room, names in _TOOLS.items() for name in names]


@functools.cache
def _sources() -> list[Path]:
    return [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def _statements_at_start(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield what runs while a module is imported, without the bodies of functions and classes."""
    waiting = list(tree.body)
    while waiting:
        statement = waiting.pop()
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test) != "TYPE_CHECKING":
            waiting += statement.body


def _walk(tree: ast.Module, path: Path) -> Iterator[ast.AST]:
    """Yield all nodes, without imports for types alone of features of training.

    Phases hand to features what higher floors make, and a feature may name its type.
    """
    is_feature = path.is_relative_to(ROOT / "training" / "features")
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if not (is_feature and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            waiting += ast.iter_child_nodes(node)


@dataclass(frozen=True)
class FileImports:
    """What a file imports, anywhere in it and at its start."""

    statements: tuple["ImportStatement", ...]
    at_start: tuple["ImportStatement", ...]
    hidden: tuple[str, ...]  # names in calls of `import_own`


class ImportStatement(NamedTuple):
    """`import MODULE`, or `from MODULE import NAMES`."""

    module: str
    names: tuple[str, ...] = ()


@functools.cache
def _read_imports(path: Path) -> FileImports:
    """Read a file once for all tests here, and keep little of it: all trees take 1.5 GB."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            hidden += [str(node.args[0].value)] if called.endswith("import_own") else []
    return FileImports(
        tuple(_list_imports(_walk(tree, path))),
        tuple(_list_imports(_statements_at_start(tree))),
        tuple(hidden),
    )


def _list_imports(nodes: Iterable[ast.AST]) -> Iterator[ImportStatement]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (ImportStatement(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield ImportStatement(node.module, tuple(alias.name for alias in node.names))


@functools.cache
def _imported(path: Path, at_start: bool = False) -> set[str]:
    read = _read_imports(path)
    names = set()
    for module, imported in read.at_start if at_start else read.statements:
        names |= {module, *(f"{module}.{name}" for name in imported)}
    return names


def _reached_from(*places: str, at_start: bool = False) -> set[Path]:
    """Return the files of ours that these import, and those that they import.

    at_start: only what is read while they are imported.
    """
    reached, waiting = set(), {ROOT / place for place in places}
    while waiting:
        path = waiting.pop()
        reached.add(path)
        names = {name.replace(".", "/") for name in _imported(path, at_start)}
        files = {ROOT / f"{name}.py" for name in names} | {ROOT / name / "__init__.py" for name in names}
        waiting |= {file for file in files if file.is_file()} - reached
    return reached


def _count_lines(path: Path) -> int:
    """Return the number of lines of a file without docstrings and comments, which load nothing."""
    text = path.read_text(encoding="utf-8")
    count = sum(not line.lstrip().startswith("#") for line in text.splitlines())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            count -= docstring.end_lineno - docstring.lineno + 1
    return count


def test_imports_follow_the_arrows() -> None:
    tops = set(MAY_IMPORT) | {Path(script).stem for script in SCRIPTS}
    wrong = []
    for path in _sources():
        place = path.relative_to(ROOT)
        home = place.parts[0].removesuffix(".py")
        allowed = () if place.as_posix() in TOOLS else tuple(f"{one}." for one in MAY_IMPORT[home] | {home})
        wrong += [
            f"{place} imports {name}"
            for name in _imported(path)
            if allowed and name.split(".")[0] in tops and not f"{name}.".startswith(allowed)
        ]
    assert wrong == []


def test_each_family_has_arrows() -> None:
    assert {room.partition(".")[0] for room in FOLDERS.values()} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("program", LIGHT_PROGRAMS)
def test_light_programs_load_nothing_heavy(program: str) -> None:
    """While they start: a function may import more, for what few commands ask."""
    files = _reached_from(*LIGHT_PROGRAMS[program], at_start=True)
    wrong = [
        f"{path.relative_to(ROOT).as_posix()} imports {name}"
        for path in sorted(files)
        for name in _imported(path, at_start=True)
        if name.partition(".")[0] in HEAVY
    ]
    assert wrong == []


def test_no_file_imports_the_compiler_while_it_is_imported() -> None:
    """torch's decorators do so, which adds two seconds to the start of every script."""
    marked = [
        path
        for path in _sources()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith(("@torch.compiler.", "@torch.compile", "@torch._dynamo."))
    ]
    assert marked == []


def test_a_training_loads_no_tool_for_finished_videos() -> None:
    reached = _reached_from("wan_train_network.py", "training/run.py", at_start=True)
    tools = (ROOT / "postprocessing", ROOT / "data_tools")
    assert [path for path in reached if any(map(path.is_relative_to, tools))] == []


def test_a_training_of_caches_reads_neither_sources_nor_shards() -> None:
    read = _reached_from("wan_train_network.py", "training/run.py", at_start=True)
    others = [ROOT / "dataset" / other for other in ("caching", "cache/shards.py", "forms/npz_store.py")]
    others.append(ROOT / "dataset" / "listing.py")
    assert [path for path in read if any(map(path.is_relative_to, others))] == []
    assert sum(map(_count_lines, read)) <= MAX_READ


@pytest.mark.parametrize("family", FOLDERS)
def test_a_family_is_described_without_packages_that_take_seconds(family: str) -> None:
    room = FOLDERS[family].replace(".", "/")
    reached = _reached_from(f"{room}/family.py", at_start=True)
    names = {name.partition(".")[0] for path in reached for name in _imported(path, at_start=True)}
    assert not names & {"diffusers", "transformers", "peft", "accelerate"}


def test_a_run_begins_without_packages_that_take_seconds() -> None:
    reached = _reached_from("run_project.py", "project/running.py", at_start=True)
    names = {name.partition(".")[0] for path in reached for name in _imported(path, at_start=True)}
    assert not names & {"torch", "numpy", "cv2", "PIL", "accelerate"}


def test_caching_a_folder_reads_nothing_of_lists_tars_and_addresses() -> None:
    read = _reached_from("dataset/scripts.py", "dataset/caching/loop.py", at_start=True)
    readers = ("*rows.py", "*_listing.py", "*_lists.py", "*_files.py", "*_store.py", "*_index.py")
    others = {path for reader in readers for path in (ROOT / "dataset" / "forms").glob(reader)}
    others.add(ROOT / "dataset" / "sources" / "downloads.py")
    others |= {ROOT / "modules" / "downloading.py", *(ROOT / "runtime" / "planning").glob("*.py")}
    assert read & others == set()


def test_a_generation_reads_no_planner_and_nothing_for_options_that_few_give() -> None:
    read = _reached_from("wan_generate_video.py", "generation/run.py", at_start=True)
    for place in ("runtime/planning/dry_run", "networks/merging", "networks/text_loras", "generation/sheets"):
        assert ROOT / f"{place}.py" not in read
    assert sum(map(_count_lines, read)) <= MAX_READ_TO_GENERATE


def test_imports_whose_name_does_not_vary_are_imports() -> None:
    """`import_own("name")` hides an import from readers, type checkers and the tests of this file."""
    hidden = set()
    for path in [*_sources(), *ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        hidden |= {f"{path.relative_to(ROOT).as_posix()}: {name}" for name in _read_imports(path).hidden}
    assert hidden == set()


@functools.cache
def _resolve_imports() -> dict[str, set[str]]:
    """Return the modules of ours that each one imports, in functions too.

    `from networks.kinds import KINDS` imports the package `networks.kinds`, which is its `__init__.py`.
    """
    files = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in _sources()}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        imported: set[str] = set()
        for module, names in _read_imports(path).statements:
            paths = {f"{module}.{name}" for name in names}
            submodules = paths & files.keys()
            imported |= submodules
            if not names or submodules != paths:  # the module, or an object of it
                imported.add(module)
        graph[name] = imported & files.keys() - {name}
    return graph


def _find_circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return groups of modules in which each module imports all others, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        reached[start] = set()
        waiting = [start]
        while waiting:
            found = graph[waiting.pop()] - reached[start]
            reached[start] |= found
            waiting += found
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def test_circles_are_found_through_packages() -> None:
    graph = {"a": {"a.b"}, "a.b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert _find_circles(graph) == [["a", "a.b", "c"]]
    assert "networks.kinds" in _resolve_imports()["networks.kinds.composing"]


def test_no_module_imports_itself_in_a_circle() -> None:
    assert _find_circles(_resolve_imports()) == []


@pytest.mark.parametrize("top", FLOORS)
def test_rooms_import_lower_floors_only(top: str) -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS[top]) for room in rooms}
    paths = [path for path in _sources() if path.is_relative_to(ROOT / top) and path.name != "__init__.py"]
    rooms = {path: path.relative_to(ROOT / top).parts[0].removesuffix(".py") for path in paths}
    assert set(rooms.values()) == set(floor_of)
    for path, room in rooms.items():
        ours = {name.split(".")[1] for name in _imported(path) if name.startswith(f"{top}.")}
        for other in ours - {room}:
            assert floor_of[other] < floor_of[room], f"{path.relative_to(ROOT)} imports {top}.{other}"


def test_root_scripts_are_thin() -> None:
    # a whole evening in one script; all checks of a change
    maximum = {"quickstart.py": 200, "run_tests.py": 200}
    lines = {
        script: _count_lines(ROOT / script)
        for script in (*SCRIPTS, "quickstart.py", "run_tests.py", "set_up.py")
    }
    assert {script: count for script, count in lines.items() if count > maximum.get(script, 150)} == {}


def test_every_folder_is_credited() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")

    folders = {name for name in MAY_IMPORT if (ROOT / name).is_dir()} | {"pocket", "benchmarks"}
    assert {name for name in folders if f"\n{name}/ " not in notice} == set()
