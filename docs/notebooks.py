"""Write the notebooks of notebooks/ from the commands and files of these pages.

python docs/notebooks.py
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modules.parser import Parser  # noqa: E402
from package.reelsmith.commands import find_commands  # noqa: E402

FOLDER = ROOT / "notebooks"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
# in 8 bits: Colab's machine has 12.7 GB of memory
NOT_CACHED = ("shuffle_caption", "keep_tokens")
SMALLER_T5 = {"models_t5_umt5-xxl-enc-bf16.pth": "umt5_xxl_fp8_e4m3fn_scaled.safetensors"}


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook."""

    kind: str  # "markdown" or "code"
    text: str


@dataclass(frozen=True)
class TrainingNotebook:
    """What the notebook of one model is made from: a page, its commands, and what a T4 changes in them."""

    name: str
    title: str
    page: str
    script: str  # start of the names of its scripts
    media: str  # folder of the page
    license: str
    plan: str  # what --plan 16 printed for the values of this notebook
    task: str  # arguments of `download`
    lora: str
    cached: tuple[str, ...]  # options of the caching commands
    training: Mapping[str, object]  # options that a T4 changes, and those of samples; None: left out
    generation: Mapping[str, object]
    prompts: str = "samples.txt"
    caching: Mapping[str, object] | None = None


NOTEBOOKS = (
    TrainingNotebook(
        name="sdxl",
        title="A LoRA for Stable Diffusion XL",
        page="sdxl.md",
        script="sdxl",
        media="pictures",
        license="CreativeML Open RAIL++-M: its list of prohibited uses also applies to what you make.",
        plan="5.98 GiB (images of 1024x1024, batch size 1, rank 16)",
        task="--family stable_diffusion --task xl",
        lora="output/my_sdxl_lora.safetensors",
        cached=("pretrained_model_name_or_path",),
        training={
            "mixed_precision": "fp16",
            # the caching cell has done it
            "cache_latents": None,
            "cache_text_encoder_outputs": None,
            "sample_sampler": "euler",
        },
        generation={},
    ),
    TrainingNotebook(
        name="anima",
        title="A LoRA for Anima",
        page="anima.md",
        script="anima",
        media="pictures",
        license="CircleStone Labs Non-Commercial License: the model and its LoRAs are not for commercial use "
        "and may not be offered as a paid service. Images may be used commercially.",
        plan="6.07 GiB (images of 1024x1024, batch size 1, rank 32)",
        task="--family anima",
        lora="output/my_anima_lora.safetensors",
        cached=("vae", "qwen3"),
        training={
            "mixed_precision": "fp16",
            "vae_dtype": "float32",
            "text_encoder_dtype": "float32",
            "cache_latents": None,
        },
        generation={"dit_dtype": "float16", "vae_dtype": "float32", "text_encoder_dtype": "float32"},
        caching={"vae_dtype": "float32", "text_encoder_dtype": "float32"},
    ),
    TrainingNotebook(
        name="wan_1_3b",
        title="A LoRA for Wan2.1 1.3B, from clips",
        page="first_lora.md",
        script="wan",
        media="clips",
        license="Apache-2.0: any use; keep the notices.",
        plan="7.29 GiB (clips of 832x480, 33 frames, batch size 1, rank 32)",
        task="--family wan --task t2v-1.3B --fp8_encoders",
        lora="output/mrsfluff.safetensors",
        cached=("vae", "t5"),
        training={"mixed_precision": "fp16", "vae_dtype": "float32", "output_dir": "output"},
        generation={
            "dit_dtype": "float16",
            "vae_dtype": "float32",
            "video_size": ["480", "832"],
            "video_length": 33,
            "lora_weight": "output/mrsfluff.safetensors",
        },
        prompts="prompts.txt",
        caching={"vae_dtype": "float32"},
    ),
)
NOT_TRIED = (
    "Made from the commands of the [pages](../docs/README.md) by `docs/notebooks.py`. Tests run its cells "
    "with tiny models; it has not been run on Colab or Kaggle yet. Select a T4 as the accelerator first."
)
FLOAT16 = "A T4 has no bfloat16, so training computes in float16."
INSTALL = """\
## Install

Make `checkout.zip` on your machine, in the folder of Reelsmith:

```sh
{archive}
```

On Colab, the cell asks for this file. On Kaggle, add it as an input first. The machine's torch is kept."""
FIND_CHECKOUT = """\
import shutil
from pathlib import Path

try:
    from google.colab import drive, files
except ImportError:
    drive = files = None
inputs = Path("/kaggle/input")
if not Path("reelsmith").exists():
    for unpacked in inputs.rglob("reelsmith.py"):  # Kaggle unpacks zip files
        shutil.copytree(unpacked.parent, "reelsmith")
        break
    else:
        if files and not Path("checkout.zip").exists():
            files.upload()
        !{unpack}
%pip install -q ./reelsmith"""
FILES = """\
## Files of the model

{license} The first cell shows all files with their licenses, the second downloads them."""
KEEP = """\
## A folder that survives a disconnect

On Colab it is `reelsmith` in your Drive, with {folders}. Put your files and their captions (`cat.txt` next to
`cat.{ending}`) into its `{media}`, or upload them when the cell asks. On Kaggle it is `kept`: turn on
persistence of files, and set `your_files` to the folder of your input."""
LINK = """\
your_files = None  # such as "/kaggle/input/my-files"
kept = Path("kept")
if drive:
    drive.mount("/content/drive")
    kept = Path("/content/drive/MyDrive/reelsmith")
for name in {folders}:
    (kept / name).mkdir(parents=True, exist_ok=True)
    if not Path(name).exists():
        Path(name).symlink_to((kept / name).resolve(), target_is_directory=True)
media = Path("{media}")
if your_files:
    shutil.copytree(your_files, media, dirs_exist_ok=True)
elif files and not any(media.iterdir()):
    for name in files.upload():
        shutil.move(name, media / name)
print(len(list(media.iterdir())), "files in", media.resolve())"""
SHOW = """\
from IPython.display import Image, Video, display


def show(event):
    if isinstance(event, reelsmith.StepEvent) and event.step % 20 == 0:
        print(f"{event.step} of {event.total_steps}: loss {event.average_loss}, {event.seconds_left} s left")
    elif isinstance(event, reelsmith.SampleEvent):
        show_file(event.path)


def show_file(path):
    kind = Video if path.suffix == ".mp4" else Image
    display(kind(str(path), embed=True))"""
GET = """\
print(Path(lora).resolve())
if files:
    files.download(lora)"""
TUNNEL = """\
## A tunnel

**Who sees what.** The page listens on this machine only, and answers only those who have the secret word in
its address, which each machine draws anew. Cloudflare runs the tunnel and decrypts what goes through it: it
can read your files, prompts, samples and that word. Whoever has the whole address can do what you can: share
it with nobody. `cloudflared` is Cloudflare's program; Reelsmith does not verify the download."""
GET_TUNNEL = """\
address = "https://github.com/cloudflare/cloudflared/releases/latest/download/cloudflared-linux-amd64"
if not shutil.which("cloudflared"):
    !curl -fsSL -o /usr/local/bin/cloudflared {address}
    !chmod +x /usr/local/bin/cloudflared"""
OPEN_TUNNEL = """\
import re
import subprocess
import time

log = Path("tunnel.log")
with log.open("w") as file:
    tunnel = subprocess.Popen({words}, stderr=file)
while not (found := re.search(r"https://[\\w-]+[.]trycloudflare[.]com", log.read_text())):
    if tunnel.poll() is not None:
        raise SystemExit(log.read_text())
    time.sleep(1)
public_url = found[0]"""


def main() -> None:
    """Write all notebooks."""
    Parser(description=__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, text in make_notebooks().items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")


def make_notebooks() -> dict[str, str]:
    """Return the text of each notebook by its file name."""
    cells = {notebook.name: train_in_cells(notebook) for notebook in NOTEBOOKS}
    cells |= {"page": open_page_in_cells(), "change_the_rate": change_rate_in_cells()}
    return {f"{name}.ipynb": write_notebook(list(of_one)) for name, of_one in cells.items()}


def write_notebook(cells: Sequence[Cell]) -> str:
    """Return a notebook of format 4.5 as JSON, without outputs."""
    rows = []
    for index, cell in enumerate(cells):
        row: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{index:02}", "metadata": {}}
        if cell.kind == "code":
            row |= {"execution_count": None, "outputs": []}
        rows.append({**row, "source": cell.text.splitlines(keepends=True)})
    metadata = {
        "accelerator": "GPU",
        "colab": {"gpuType": "T4"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook = {"cells": rows, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def train_in_cells(notebook: TrainingNotebook) -> Iterator[Cell]:
    """Yield the cells from the installation to the download of the LoRA."""
    script = notebook.script
    train = find_command(notebook.page, f"{script}_train_network.py")
    generation_script = "wan_generate_video.py" if script == "wan" else f"{script}_generate_image.py"
    options = read_options(train, notebook.training)
    options["sample_prompts"] = notebook.prompts
    options["save_state"] = True
    if "save_every_n_steps" not in options:  # pages of images save each epoch
        options["sample_every_n_epochs"] = 1
    caching = {name: options[name] for name in ("dataset_config", *notebook.cached)} | dict(
        notebook.caching or {}
    )
    made = read_options(find_command(notebook.page, generation_script, "--lora_weight"), notebook.generation)
    made.setdefault("lora_weight", notebook.lora)
    yield Cell(
        "markdown",
        f"# {notebook.title}\n\n{NOT_TRIED} {FLOAT16} Memory plan for 16 GiB: {notebook.plan}. "
        f"All options: [{notebook.page}](../docs/{notebook.page}).",
    )
    yield from install_in_cells()
    yield from download_in_cells(notebook.license, notebook.task)
    yield from keep_in_cells(notebook.media)
    yield Cell("markdown", "## Dataset and samples\n\nChange the words in the prompts to yours.")
    yield Cell("code", f"%%writefile dataset.toml\n{find_file(notebook.page, 'dataset.toml')}")
    yield Cell("code", f"%%writefile {notebook.prompts}\n{sample_prompts(notebook, made)}")
    yield Cell("markdown", "## Cache\n\nAfter a change, only what has changed is cached again.")
    yield Cell("code", f"import reelsmith\n\n{write_call('reelsmith.cache', script, caching)}")
    yield Cell("markdown", "## Train, with samples\n\nThe stop button of the cell saves, too.")
    yield Cell(
        "code", f'settings = {write_dict(options)}\nprint(reelsmith.plan("{script}", **settings, plan=16))'
    )
    yield Cell("code", SHOW)
    yield Cell("code", f'run = reelsmith.train("{script}", **settings).wait(show)')
    yield Cell(
        "markdown",
        "## Resume after a disconnect\n\nIn a new session run all cells above but the last, then this one. "
        "It continues from the newest state in the kept folder.",
    )
    yield Cell("code", f'run = reelsmith.train("{script}", **settings, resume="latest").wait(show)')
    yield Cell("markdown", "## Generate")
    yield Cell(
        "code",
        f'lora = "{notebook.lora}"\n'
        + write_call("made = reelsmith.generate", script, made)
        + "\nfor path in made:\n    show_file(path)",
    )
    yield Cell("markdown", "## Download the LoRA")
    yield Cell("code", GET)


def sample_prompts(notebook: TrainingNotebook, made: Mapping[str, object]) -> str:
    """Return the page's prompts of samples; Anima's page has none, so it is the prompt that it generates."""
    if notebook.name != "anima":
        return find_file(notebook.page, notebook.prompts)
    height, width = made["image_size"]  # type: ignore[misc]
    values = f"--w {width} --h {height} --d 1 --s {made['infer_steps']} --l {made['guidance_scale']}"
    return f"{made['prompt']} {values} --n {made['negative_prompt']}"


def open_page_in_cells() -> Iterator[Cell]:
    """Yield the cells that open the browser page through a tunnel."""
    tunnel = next(span for span in spans_of("rented.md") if span.startswith("cloudflared tunnel"))
    port = tunnel.rpartition(":")[2]
    page = find_installed_command("tools/run_browser.py")
    own = find_command("rented.md", "tools/run_browser.py")
    assert {"--public_url", "--no_open"} <= {*own}
    yield Cell(
        "markdown",
        f"# The browser page\n\n{NOT_TRIED} Set `mixed_precision` to `fp16` for a T4, which has no bfloat16. "
        "What the page does: [browser.md](../docs/browser.md).",
    )
    yield from install_in_cells()
    yield from keep_in_cells("pictures")
    yield Cell("markdown", TUNNEL)
    yield Cell("code", GET_TUNNEL)
    yield Cell("code", OPEN_TUNNEL.format(words=json.dumps(shlex.split(tunnel))))
    yield Cell("markdown", "## The page\n\nOpen the printed address. Stop the cell to close the page.")
    yield Cell("code", f"!reelsmith {page} {{kept}} --port {port} --no_open --public_url {{public_url}}")
    yield Cell("code", "tunnel.terminate()")


def change_rate_in_cells() -> Iterator[Cell]:
    """Yield the cells that train, stop, change the rate and continue, as docs/python.md does."""
    wan = NOTEBOOKS[-1]
    yield Cell(
        "markdown",
        f"# Train, stop, change the rate, and continue\n\n{NOT_TRIED} {FLOAT16} The examples are those of "
        "[python.md](../docs/python.md), for Wan2.1 1.3B.",
    )
    yield from install_in_cells()
    yield from download_in_cells(wan.license, wan.task)
    yield from keep_in_cells(wan.media)
    yield Cell("code", f"%%writefile dataset.toml\n{find_file('wan.md', 'dataset.toml')}")
    for heading in ("Cache a dataset", "Ask whether a card is enough", "Stop, change the rate, and continue"):
        text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
        section = text.partition(f"\n## {heading}\n")[2]
        code = next(match[2] for match in BLOCK.finditer(section) if match[1] == "python")
        yield Cell("markdown", f"## {heading}")
        yield Cell(
            "code", use_smaller_t5(code).replace('"bf16"', '"fp16"').replace('plan="24"', 'plan="16"').strip()
        )


def install_in_cells() -> Iterator[Cell]:
    """Yield the cells that install the package of a checkout."""
    archive = next(text for kind, text in read_code_blocks("rented.md") if text.startswith("git archive"))
    unpack = next(line for line in read_command_lines("rented.md") if line.startswith("python3 -m zipfile"))
    yield Cell("markdown", INSTALL.format(archive=archive.strip()))
    yield Cell("code", FIND_CHECKOUT.format(unpack=unpack))


def download_in_cells(license_text: str, task: str) -> Iterator[Cell]:
    """Yield the cells that list and download the files of a task."""
    download = find_installed_command("tools/download.py")
    yield Cell("markdown", FILES.format(license=license_text))
    yield Cell("code", f"!reelsmith {download} {task} --list")
    yield Cell("code", f"!reelsmith {download} {task} --to models")


def keep_in_cells(media: str) -> Iterator[Cell]:
    """Yield the cells that link the folders of files, caches and results to one that survives."""
    folders = (media, "cache", "output") if media == "clips" else (media, "output")
    shown = ", ".join(f"`{name}`" for name in folders)
    names = ", ".join(map(json.dumps, folders))
    ending = "mp4" if media == "clips" else "png"
    yield Cell("markdown", KEEP.format(folders=shown, media=media, ending=ending))
    yield Cell("code", LINK.format(folders=f"({names})", media=media))


def read_code_blocks(page: str) -> list[tuple[str, str]]:
    """Return language and text of the blocks of a page."""
    return [
        (match[1], match[2]) for match in BLOCK.finditer((ROOT / "docs" / page).read_text(encoding="utf-8"))
    ]


def read_command_lines(page: str) -> list[str]:
    """Return the command lines of a page, continued ones as one."""
    texts = [text for kind, text in read_code_blocks(page) if kind in {"bash", "sh"}]
    return "\n".join(texts).replace("\\\n", " ").splitlines()


def spans_of(page: str) -> list[str]:
    """Return what stands between single backticks on a page."""
    return re.findall(r"`([^`\n]+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))


def find_command(page: str, script: str, option: str = "") -> list[str]:
    """Return the words of the first command of a script on a page, of those with `option` if it is given.

    Raises:
        ValueError: If the page has none.
    """
    for line in read_command_lines(page):
        words = shlex.split(line)
        if words[:2] == ["python", script] and (not option or option in words):
            return words
    raise ValueError(f"docs/{page} has no command of {script}")


def find_file(page: str, name: str) -> str:
    """Return the content of a file that a page shows, without keys whose captions cannot be cached.

    Raises:
        ValueError: If the page does not show the file.
    """
    for _, text in read_code_blocks(page):
        if text.startswith(f"# {name}\n"):
            lines = text.splitlines()[1:]
            return "\n".join(line for line in lines if not line.startswith(NOT_CACHED)).strip()
    raise ValueError(f"docs/{page} does not show {name}")


def find_installed_command(script: str) -> str:
    """Return the words of the installed command for a script of the checkout."""
    return next(each.name for each in find_commands(ROOT) if each.path == ROOT / script)


def read_options(words: Sequence[str], changes: Mapping[str, object]) -> dict[str, object]:
    """Return the options of a command as keyword arguments: words, and True for switches.

    Args:
        words: A command of a page.
        changes: Options with other values, or None to leave an option out that the command has.

    Raises:
        ValueError: If the command lacks an option that is left out.
    """
    given: dict[str, list[str]] = {}
    values: list[str] = []  # of the option before
    for word in words[2:]:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            values = given[name] = [use_smaller_t5(value)] if value else []
        else:
            values.append(use_smaller_t5(word))
    options: dict[str, object] = {
        name: True if not values else values[0] if len(values) == 1 else values
        for name, values in given.items()
    }
    for name, value in changes.items():
        if value is None and name not in options:
            raise ValueError(f"{words[1]}: the page's command has no --{name}")
        options[name] = value
    return {name: value for name, value in options.items() if value is not None}


def use_smaller_t5(text: str) -> str:
    """Return a text with the text encoder in 8 bits."""
    for large, small in SMALLER_T5.items():
        text = text.replace(large, small)
    return text


def write_dict(options: Mapping[str, object]) -> str:
    """Return a dict of options as Python, one a line."""
    return "\n".join(
        ["{", *(f"    {json.dumps(name)}: {as_python(value)}," for name, value in options.items()), "}"]
    )


def write_call(function: str, model: str, options: Mapping[str, object]) -> str:
    """Return a call of a function of the module as Python, one argument a line."""
    arguments = [f"    {name}={as_python(value)}," for name, value in options.items()]
    return "\n".join([f"{function}(", f"    {json.dumps(model)},", *arguments, ")"])


def as_python(value: object) -> str:
    """Return a value as Python: a word that is a number is written as one."""
    if isinstance(value, list):
        return f"[{', '.join(as_python(each) for each in value)}]"
    if value is True or NUMBER.fullmatch(str(value)):
        return str(value)
    return json.dumps(value)


if __name__ == "__main__":
    main()
