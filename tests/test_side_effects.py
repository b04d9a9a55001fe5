"""What only looks changes nothing: `--help` of every script, which also loads nothing heavy if users type it,
and --check, --plan, --dry_run and --list.
"""

import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.commands import ROOT, run_program
from tests.faults.messages import succeed_here
from tests.test_imports import SCRIPTS, TOOLS
from tests.tiny.picture_project import lay_out_flux, lay_out_images
from tests.tiny.project import lay_out_models, write_clips, write_dataset

# --help answers from a table, before any of these would be loaded
HEAVY = (
    *("torch", "numpy", "av", "cv2", "accelerate", "transformers", "safetensors", "PIL", "einops"),
    *("jinja2", "matplotlib", "rich", "tqdm"),
)
SLOW = ("hashlib", "subprocess", "tomllib")  # of the standard library
FOLDERS = (
    *(".", "benchmarks", "blissful_tuner", "docs", "finetune", "networks"),
    *("package/reelsmith", "pocket", "tools"),
)
# runs each script as `__main__` with --help; whatever would change something outside the process ends it
WATCH = f"""
import contextlib, io, json, os, runpy, sys, tempfile
tempfile.gettempdir()  # tries to write
CHANGES = tuple(
    "os.mkdir os.remove os.rename os.rmdir os.truncate os.system os.exec os.fork os.posix_spawn os.spawn "
    "os.startfile shutil. subprocess. socket. tempfile. webbrowser.".split()
)
watched = False
def watch(event, arguments):
    if not watched:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if (writes and arguments[0] != os.devnull) or event.startswith(CHANGES):
        raise RuntimeError(f"--help does {{event}} {{arguments!r}}"[:300])
sys.addaudithook(watch)
sys.dont_write_bytecode = True
sys.path[:0] = ["", {str(ROOT)!r}]
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split()))  # whoever imports one of these fails
for name in {(*HEAVY, "matplotlib.font_manager")!r}:  # what libraries do while they are imported is theirs
    with contextlib.suppress(ImportError):
        __import__(name)
found = {{}}
for script in sys.argv[1:]:
    sys.argv[:], said, wrong = [script, "--help"], io.StringIO(), ""
    sys.path[0] = os.path.dirname(script)
    watched = True
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        wrong = f"exit code {{end.code}}" if end.code else ""
    except BaseException as error:
        wrong = f"{{type(error).__name__}}: {{error}}"
    watched = False
    text = said.getvalue()
    if not wrong and ("usage: " not in text or "--help" not in text):
        wrong = f"no help: {{text[:200]!r}}"
    if wrong:
        found[script] = wrong
print(json.dumps(found))
"""


def _is_script(path: Path) -> bool:
    tests = (
        node.test for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If)
    )
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


ALL = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if _is_script(path) or path.name == "__main__.py"
]


def test_every_script_is_looked_at() -> None:
    others = {path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.parts)} - set(ALL)
    # no commands: the browser starts them, and tells them what to do
    others -= {
        ROOT / name
        for name in (
            "browser/jobs/launch.py",
            "project/file_check.py",
            "training/reports/drawing.py",
            "package/release.py",
        )
    }
    assert not [path for path in others if _is_script(path)]
    assert len(ALL) > 70


TYPED = {ROOT / script for script in (*SCRIPTS, *TOOLS)}
RUNS = {path for path in TYPED if "_train" in path.name or "_generate" in path.name}  # with most options


@pytest.mark.parametrize(
    ("scripts", "blocked"),
    [(RUNS, (*HEAVY, *SLOW)), (TYPED - RUNS, HEAVY), ({*ALL} - TYPED, ())],
    ids=["runs", "others that users type", "the rest"],
)
def test_help_needs_no_heavy_library_and_has_no_side_effect(
    tmp_path: Path, scripts: set[Path], blocked: Sequence[str]
) -> None:
    done = run_program(sys.executable, "-c", WATCH, " ".join(blocked), *sorted(scripts), folder=tmp_path)

    found = json.loads(done.stdout.splitlines()[-1])
    assert not found, "\n".join(f"{path}: {wrong}" for path, wrong in found.items())
    assert list(tmp_path.iterdir()) == []


DATA, VAE = "--dataset_config dataset.toml", "--vae models/Wan2.1_VAE.pth"
T5 = "--t5 models/models_t5_umt5-xxl-enc-bf16.pth"
MODEL = "--task t2v-1.3B --dit models/wan2.1_t2v_1.3B_bf16.safetensors"
LATENTS = f"wan_cache_latents.py {DATA} {VAE}"
TEXTS = f"wan_cache_text_encoder_outputs.py {DATA} {T5}"
TRAIN = f"wan_train_network.py {DATA} {MODEL} --sdpa --output_dir output --output_name x --logging_dir logs"
IMAGES = (
    "flux_train_network.py --pretrained_model_name_or_path models/flux1-dev.safetensors "
    "--ae models/ae.safetensors --clip_l models/flux_clip_l.safetensors "
    "--t5xxl models/t5xxl_fp16.safetensors --train_data_dir train --resolution 64 --cache_latents "
    "--output_dir output"
)
LOOKS = (
    f"{LATENTS} --check",
    f"{TEXTS} --check",
    f"{TRAIN} --check",
    f"{TRAIN} --plan 12",
    f"{TRAIN} --show_timesteps console",
    f"wan_generate_video.py {MODEL} {VAE} {T5} --save_path videos --prompt x --plan 12",
    f"{IMAGES} --check",
    f"tools/caption_dataset.py {DATA} --dry_run",
    "tools/split_video.py --input clips --output scenes --dry_run",
    f"tools/convert_cache.py {DATA} --to shards --dry_run",
    "tools/download.py --to elsewhere --list",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    lay_out_models(folder / "models")
    lay_out_flux(folder / "models")
    write_clips(folder / "clips", count=2)
    write_dataset(folder)
    lay_out_images(folder)
    for command in (LATENTS, TEXTS):
        succeed_here(*command.split(), folder=folder)
    return folder


@pytest.mark.parametrize("command", LOOKS, ids=lambda command: command[:13] + command.split("--")[-1])
def test_looking_changes_no_file(command: str, project: Path) -> None:
    before = _state_of(project)

    succeed_here(*command.split(), folder=project)

    assert _state_of(project) == before


def _state_of(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}
