"""The notebooks are those that docs/notebooks.py makes; a Jupyter kernel runs their cells on tiny models."""

import json
import os
import re
import socket
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from docs import notebooks
from package.reelsmith.typed_words import ScriptArguments
from tests.commands import QUIET, ROOT, run_program
from tests.package.test_wheel import build
from tests.tiny.picture_project import SIDE, lay_out_anima, lay_out_images, lay_out_sdxl
from tests.tiny.project import write_clips
from tests.tiny.wan import write_tiny_wan

MADE = notebooks.make_notebooks()
TRAINING = [notebook.name for notebook in notebooks.NOTEBOOKS]


def cells_of(name: str) -> list[dict[str, Any]]:
    """Return the cells of a committed notebook."""
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    cells: list[dict[str, Any]] = json.loads(text)["cells"]
    return cells


def code_of(name: str) -> list[str]:
    """Return the texts of the code cells of a committed notebook."""
    return ["".join(cell["source"]) for cell in cells_of(name) if cell["cell_type"] == "code"]


def test_the_notebooks_are_those_that_the_pages_make() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").iterdir()}

    assert committed == MADE, "python docs/notebooks.py writes them"


@pytest.mark.parametrize("name", [name.removesuffix(".ipynb") for name in MADE])
def test_a_notebook_has_no_outputs_and_no_paths_of_a_machine(name: str) -> None:
    cells = cells_of(name)

    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
        assert not re.search(r"/(?:home|root|work|tmp|Users)/|C:\\", "".join(cell["source"]))


class OptionCheck:
    """Stands for the module: looks each option up in the tables of the commands."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def cache(self, model: str, **options: object) -> None:
        scripts = [Path(f"{model}_cache_{part}.py") for part in ("latents", "text_encoder_outputs")]
        for script in scripts:
            known = ScriptArguments(script).known
            self._check(script, {name: value for name, value in options.items() if name in known})
        assert options.keys() <= set().union(*(ScriptArguments(script).known for script in scripts))

    def train(self, model: str, **options: object) -> "OptionCheck":
        self._check(Path(f"{model}_train_network.py"), options)
        return self

    plan = train

    def wait(self, callback: Callable[[object], None]) -> None:
        self.called.append(callback.__name__)

    def generate(self, model: str, **options: object) -> list[Path]:
        ending = "video" if model == "wan" else "image"
        self._check(Path(f"{model}_generate_{ending}.py"), options)
        return []

    def _check(self, script: Path, options: Mapping[str, object]) -> None:
        arguments = ScriptArguments(script)
        arguments.check(arguments.make_argv((), options))
        self.called.append(script.stem)


@pytest.mark.parametrize("name", TRAINING)
def test_the_commands_have_the_options_that_a_notebook_gives_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checked = OptionCheck()
    names: dict[str, object] = {"reelsmith": checked, "show": print, "show_file": print}

    for code in code_of(name):
        for path in map(Path, re.findall(r"(?:models|output)/[\w.-]+|(?<=%%writefile )\S+", code)):
            path.parent.mkdir(exist_ok=True)
            path.touch()
        if re.search(r"reelsmith\.(?:cache|plan|train|generate)\(", code):
            exec(code.replace("import reelsmith\n", ""), names)

    model = notebooks.NOTEBOOKS[TRAINING.index(name)].script
    assert [word.removeprefix(f"{model}_") for word in checked.called] == [
        *("cache_latents", "cache_text_encoder_outputs", "train_network"),
        *("train_network", "print", "train_network", "print"),
        "generate_video" if model == "wan" else "generate_image",
    ]


DRIVE = "def mount(path): pass\n"
FILES = """
import os
from pathlib import Path

def upload():
    uploads = Path(os.environ["UPLOADS"])
    batch = min(uploads.iterdir())
    paths = [path.rename(path.name) for path in batch.iterdir()]
    batch.rmdir()
    return {path.name: b"" for path in paths}

def download(path):
    assert Path(path).is_file()
    Path("downloaded").write_text(str(path))
"""
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
nbformat.validate(notebook)
try:
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[1])
"""


@dataclass(frozen=True)
class Machine:
    """A machine such as Colab's, without our package: its Python and a working folder."""

    python: Path
    folder: Path
    environment: Mapping[str, str]

    def run(self, name: str, changes: Mapping[str, str]) -> str:
        """Run a notebook with changes in its cells, each of which must occur. Returns what it printed."""
        notebook = json.loads(MADE[f"{name}.ipynb"])
        used = set()
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            for old, new in changes.items():
                used |= {old} if old in text else set()
                text = text.replace(old, new)
            cell["source"] = text
        assert used == changes.keys()
        path = self.folder / "run.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        run_program(self.python, "-c", RUN, path, folder=self.folder, environment=self.environment)
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        return "\n".join("".join(output.get("text", output.get("data", {}))) for output in outputs)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    home = tmp_path / "python"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    packages = next(home.glob("lib/python*/site-packages"))
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    colab = packages / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "drive.py").write_text(DRIVE, encoding="utf-8")
    (colab / "files.py").write_text(FILES, encoding="utf-8")
    checkout = tmp_path / "uploads" / "1"
    checkout.mkdir(parents=True)
    write_checkout(tmp_path, checkout / "checkout.zip")
    folder = tmp_path / "content"
    folder.mkdir()
    environment = {
        **{name: str(tmp_path / "home") for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR")},
        **QUIET,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
        "UPLOADS": str(tmp_path / "uploads"),
        # what the package needs is there
        **{"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"},
        "ACCELERATE_USE_CPU": "true",
    }
    return Machine(python, folder, environment)


def write_checkout(folder: Path, path: Path) -> None:
    """Write the zip file of the checkout that `git archive` makes, of the files as they are now."""
    (folder / "sdist").mkdir()
    with tarfile.open(build("sdist", folder / "sdist")) as source, zipfile.ZipFile(path, "w") as target:
        for member in source:
            if member.isfile():
                content = source.extractfile(member)
                assert content is not None
                target.writestr(f"reelsmith/{member.name.partition('/')[2]}", content.read())


def offline(machine: Machine, task: str) -> dict[str, str]:
    """Return the changes that every notebook needs here: the kept folder, and no download."""
    changes = {"/content/drive/MyDrive": str(machine.folder.parent / "drive")}
    return changes | ({f"!reelsmith download {task} --to models": "print('downloaded')"} if task else {})


def upload_media(machine: Machine, media: Path) -> None:
    media.rename(machine.folder.parent / "uploads" / "2")


ON_CPU = {'"fp16"': '"no"'}
STOPPED = """\
run = reelsmith.train("{}", **settings)
for event in run:
    if isinstance(event, reelsmith.StepEvent) and event.step >= 3:
        run.stop()
print("stopped after", max(run.losses))"""
IMAGES = {
    "resolution = 1024": f"resolution = {SIDE}\nmin_bucket_reso = 32\nbucket_reso_steps = 32",
    "num_repeats = 4": "num_repeats = 1",
    "--w 1024 --h 1024": f"--w {SIDE} --h {SIDE}",
    "--s 30": "--s 1",
    '"max_train_epochs": 10': '"max_train_epochs": 6',
    "image_size=[1024, 1024]": f"image_size=[{SIDE}, {SIDE}]",
}
OF_MODELS = {
    "sdxl": {**IMAGES, "steps=28": "steps=2", "    fp16=True,\n": "", "--w 832 --h 1216": "--w 64 --h 96"},
    "anima": {**IMAGES, "infer_steps=30": "infer_steps=2"},
    "wan_1_3b": {
        "[832, 480]": "[32, 32]",
        "[1, 33]": "[1, 5]",
        "--w 480 --h 320 --f 33 --d": "--w 32 --h 32 --f 5 --d",
        "--s 20": "--s 1",
        '"max_train_steps": 2000': '"max_train_steps": 8',
        '"save_every_n_steps": 200': '"save_every_n_steps": 4',
        '"sample_every_n_steps": 200': '"sample_every_n_steps": 4',
        "video_size=[480, 832]": "video_size=[32, 32]",
        "video_length=33": "video_length=5",
        "infer_steps=20": "infer_steps=2",
    },
}


def lay_out(machine: Machine, name: str) -> None:
    """Write tiny models into the working folder, and the media that the user uploads."""
    models = machine.folder / "models"
    if name == "wan_1_3b":
        lay_out_wan(machine)
        return
    {"sdxl": lay_out_sdxl, "anima": lay_out_anima}[name](models)
    lay_out_images(machine.folder.parent / "images")
    upload_media(machine, machine.folder.parent / "images" / "pictures")


def lay_out_wan(machine: Machine) -> None:
    models = machine.folder / "models"
    write_tiny_wan(models, "t2v")
    (models / "dit.safetensors").rename(models / "wan2.1_t2v_1.3B_bf16.safetensors")
    (models / "vae.safetensors").rename(models / "Wan2.1_VAE.pth")
    (models / "t5.safetensors").rename(models / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    clips = machine.folder.parent / "clips"
    write_clips(clips, count=2)
    upload_media(machine, clips)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the notebooks are for Linux")
@pytest.mark.parametrize("name", TRAINING)
def test_a_kernel_runs_all_cells_from_the_installation_to_the_download(name: str, machine: Machine) -> None:
    notebook = notebooks.NOTEBOOKS[TRAINING.index(name)]
    lay_out(machine, name)
    train = f'run = reelsmith.train("{notebook.script}", **settings).wait(show)'
    changes = {train: STOPPED.format(notebook.script), **ON_CPU, **OF_MODELS[name]}

    printed = machine.run(name, changes | offline(machine, notebook.task))

    assert "Memory plan" in printed
    assert f"\n{notebook.license.partition(':')[0]}: " in printed
    assert re.search(r"^stopped after [345]$", printed, re.MULTILINE)
    assert re.search("image/png|video/mp4|text/html", printed)
    kept = machine.folder.parent / "drive" / "reelsmith" / notebook.lora
    assert kept.is_file()
    assert (machine.folder / "downloaded").read_text() == notebook.lora
    history = next(kept.parent.glob("*-history.jsonl")).read_text(encoding="utf-8")
    steps = [row["step"] for row in map(json.loads, history.splitlines()) if "loss" in row]
    assert steps == [*range(1, len(steps) + 1)]
    assert len(steps) > 6  # it went on behind the step of the stop
    assert [*machine.folder.glob("pictures_made/*.png"), *machine.folder.glob("videos/*.mp4")]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the notebooks are for Linux")
def test_a_kernel_trains_stops_changes_the_rate_and_goes_on(machine: Machine) -> None:
    lay_out_wan(machine)
    smaller = {"[832, 480]": "[32, 32]", "[1, 25, 49]": "[1, 5]", "last + 20": "last + 2", **ON_CPU}

    printed = machine.run("change_the_rate", smaller | offline(machine, notebooks.NOTEBOOKS[-1].task))

    assert re.search(r"^\d+ steps with 1e-3, 2 with 1e-4: output.fox.safetensors$", printed, re.MULTILINE)
    lines = [line for code in code_of("change_the_rate")[-1:] for line in code.splitlines()]
    assert len(lines) <= 20


TUNNEL = """\
#!{python}
import sys, time
print("INF |  https://tiny-page.trycloudflare.com  |", *sys.argv[1:], file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the notebooks are for Linux")
def test_the_page_answers_through_the_tunnel_to_those_who_have_the_word(machine: Machine) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tunnel = machine.python.with_name("cloudflared")
    tunnel.write_text(TUNNEL.format(python=machine.python), encoding="utf-8")
    tunnel.chmod(0o755)
    lay_out_images(machine.folder.parent / "images")
    upload_media(machine, machine.folder.parent / "images" / "pictures")
    # the page runs in the background, and a cell asks it
    ask = ASK.replace("PORT", port)
    changes = {"!reelsmith browser": "page = f'reelsmith browser", "{public_url}": f"{{public_url}}'\n{ask}"}

    printed = machine.run("page", {"8765": port, **changes, **offline(machine, "")})

    assert "codes 401 200" in printed


ASK = """
import urllib.request, urllib.error
process = subprocess.Popen(page.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
address = next(found[0] for line in process.stdout if (found := re.search(r"https://tiny-page[^ ]+", line)))
def code_of(path):
    host = {"Host": "tiny-page.trycloudflare.com"}
    request = urllib.request.Request("http://127.0.0.1:PORT" + path, headers=host)
    try:
        return urllib.request.build_opener(urllib.request.HTTPCookieProcessor).open(request).status
    except urllib.error.HTTPError as error:
        return error.code
path = address.removeprefix("https://tiny-page.trycloudflare.com")
print("codes", code_of("/"), code_of(path), path)
process.terminate()
"""
