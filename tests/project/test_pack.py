"""A described folder as one file for another machine, which gives the same LoRA there."""

import io
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from checkpoints.opening import open_checkpoint
from modules import zip_files
from modules.atomic_write import SPARE_BYTES
from modules.errors import OptionError, OutputError
from modules.text_files import parse_toml
from project.packing import MANIFEST, PackOptions, pack_folder
from project.relocating import MachinePaths, relocate_history
from project.unpacking import UnpackOptions, unpack_folder
from tests.commands import ROOT
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.project.test_run import MODEL
from tests.tiny.project import moving_square

RUN = """[training]
dit = "{models}/dit.safetensors"
vae = "{models}/vae.safetensors"
dataset_config = "dataset.toml"  # of clips
sample_prompts = "prompts.txt"
output_dir = "output"
output_name = "cat"
max_train_steps = 2
huggingface_token = "hf_secret"

[reelsmith]
files = ["{models}/dit.safetensors", "{models}/vae.safetensors"]
commands = [
  ["python", "tools/download.py", "--to", "{models}"],
  ["python", "wan_train_network.py", "--config_file", "run.toml"],
]
"""
DATASET = (
    '[general]\nresolution = [32, 32]\n\n[[datasets]]\nimage_directory = "{0}"\ncache_directory = "cache"\n'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `new` describes it, with paths of this machine."""
    folder = tmp_path / "here" / "my ü clips"
    (folder / "cache" / "deep").mkdir(parents=True)
    (folder / "output").mkdir()
    (folder / "run.toml").write_text(RUN.format(models=(tmp_path / "mine").as_posix()), encoding="utf-8")
    (folder / "dataset.toml").write_text(DATASET.format(folder.as_posix()), encoding="utf-8")
    start = (folder / "start.png").as_posix()
    (folder / "prompts.txt").write_text(f'a cat / a dog --i "{start}" --d 1\n', encoding="utf-8")
    for name in ("a.png", "start.png"):
        (folder / name).write_bytes(b"picture " + name.encode())
    (folder / "a.txt").write_text("a cat", encoding="utf-8")
    (folder / "cache" / "deep" / "a_wan.safetensors").write_bytes(bytes(range(256)) * 9)
    (folder / "cache" / ".reelsmith_commands.json").write_text("{}", encoding="utf-8")
    (folder / "check.html").write_text("a page", encoding="utf-8")
    (folder / "output" / "cat.safetensors").write_bytes(b"trained")
    os.utime(folder / "a.png", ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
    return folder


def pack(folder: Path) -> Path:
    pack_folder(PackOptions(folder=folder))
    return folder.with_name(f"{folder.name}-pack.zip")


def test_a_packed_folder_has_all_that_a_training_needs_and_no_path_of_this_machine(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pack(folder)
    said = capsys.readouterr().out
    content = file.read_bytes()
    for private in (str(tmp_path), "hf_secret", str(Path.home())):
        assert private.encode() not in content
    assert "left out of run.toml, because they are secret: huggingface_token" in said
    assert said.endswith(f"On the other machine: python reelsmith.py unpack '{file.name}'\n")
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == [
            *(MANIFEST, "a.png", "a.txt", "cache/deep/a_wan.safetensors", "dataset.toml", "prompts.txt"),
            *("run.toml", "start.png"),
        ]
        assert archive.read("prompts.txt") == b'a cat / a dog --i "start.png" --d 1\n'
        assert parse_toml(archive.read("dataset.toml").decode())["datasets"][0]["image_directory"] == "."
        assert b"# of clips" in archive.read("run.toml")
    pack_folder(PackOptions(folder=folder, overwrite=True))
    assert file.read_bytes() == content


def test_an_unpacked_folder_has_the_same_files_and_this_machines_models(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pack(folder)
    there = tmp_path / "there"
    (there / "big disk").mkdir(parents=True)
    (there / "big disk" / "vae.safetensors").touch()
    monkeypatch.chdir(there)
    capsys.readouterr()
    unpack_folder(UnpackOptions(file=file, models=Path("big disk")))

    unpacked = there / folder.name
    for name in ("a.png", "a.txt", "start.png", "cache/deep/a_wan.safetensors"):
        assert (unpacked / name).read_bytes() == (folder / name).read_bytes()
        assert (unpacked / name).stat().st_mtime_ns == (folder / name).stat().st_mtime_ns
    models = (there / "big disk").as_posix()
    run = parse_toml((unpacked / "run.toml").read_text(encoding="utf-8"))
    assert run["training"]["dit"] == f"{models}/dit.safetensors"
    assert run["reelsmith"]["commands"][0][-1] == models
    assert not (unpacked / MANIFEST).exists()
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith(f"missing models: {models}/dit.safetensors. ")
    assert said[2].endswith(f"reelsmith.py run '{folder.name}' --download --models 'big disk'")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("dataset.toml", DATASET.format("/data/cats"), "image_directory = /data/cats"),
        ("dataset.toml", DATASET.format("../reg"), "image_directory = ../reg"),
        ("dataset.toml", DATASET.format("~/cats"), "image_directory = ~/cats"),
        ("dataset.toml", DATASET.format("C:/cats"), "image_directory = C:/cats"),
        ("prompts.txt", "a cat --i /data/first.png\n", "/data/first.png"),
        ("list.jsonl", '{{"image_path": "{folder}/a.png"}}\n', "line 1 has "),
    ],
)
def test_places_outside_of_the_folder_are_named_and_nothing_is_packed(
    folder: Path, name: str, text: str, told: str
) -> None:
    (folder / name).write_text(
        text.replace("{folder}", folder.as_posix()).replace("{{", "{").replace("}}", "}")
    )
    with pytest.raises(OptionError, match="contain paths of this machine") as error:
        pack(folder)
    assert f"{folder / name}: {told}" in str(error.value)
    assert list(folder.parent.iterdir()) == [folder]


def test_links_are_followed_once_and_what_is_no_file_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.png").write_bytes(b"b")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "round").symlink_to(folder)
    (folder / ".env").write_text("KEY=1", encoding="utf-8")
    os.mkfifo(folder / "pipe")
    with zipfile.ZipFile(pack(folder)) as archive:
        names = archive.namelist()
    assert "linked/b.png" in names
    assert not [name for name in names if name.startswith("round")]
    assert (
        f"left out, because they are hidden or not files: {folder / '.env'}, {folder / 'pipe'}"
        in capsys.readouterr().out
    )


def change(file: Path, edit: Callable[[zipfile.ZipFile], None], without: str = "") -> Path:
    """Write a packed file again, without one member and with others."""
    changed = file.with_name("changed.zip")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            if entry.filename != without:
                new.writestr(entry, old.read(entry))
        edit(new)
    return changed


def add(
    name: str, content: bytes = b"x", mode: int = stat.S_IFREG | 0o644, **facts: int
) -> Callable[..., None]:
    def edit(archive: zipfile.ZipFile) -> None:
        entry = zipfile.ZipInfo("x")
        entry.filename = entry.orig_filename = name
        entry.external_attr = mode << 16
        for fact, value in facts.items():
            setattr(entry, fact, value)
        archive.writestr(entry, content)

    return edit


HOSTILE = {
    "up": (add("../evil.txt"), "leads out of the folder"),
    "up inside": (add("a/../../evil.txt"), "leads out of the folder"),
    "absolute": (add("/tmp/evil.txt"), "leads out of the folder"),
    "Windows' folders": (add("..\\evil.txt"), "backslash"),
    "hidden": (add(".bashrc"), "hidden"),
    "hidden folder": (add("a/.ssh/key"), "hidden"),
    "control codes": (add("a\x1b[2J.txt"), "control codes"),
    "a link": (add("link", b"/etc/passwd", stat.S_IFLNK | 0o777), "not a regular file"),
    "a device": (add("null", b"", stat.S_IFCHR | 0o666), "not a regular file"),
    "a pipe": (add("pipe", b"", stat.S_IFIFO | 0o666), "not a regular file"),
    "a folder": (add("empty/"), "leads out|folder"),
    "a bomb": (add("bomb", bytes(1 << 20), compress_type=zipfile.ZIP_DEFLATED), "compressed"),
    "a long name": (add("n" * 2000), "at most 1000 are allowed"),
    "twice": (add("A.png"), "twice"),
    "file and folder": (add("a.png/b.png"), "a file and a folder"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    edit, reason = HOSTILE[kind]
    file = change(pack(folder), edit)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(OptionError, match=reason) as error:
        unpack_folder(UnpackOptions(file=file, folder=place / "new"))
    assert "\x1b" not in str(error.value)
    assert not list(place.iterdir())


def damage_manifest(**changes: object) -> Callable[[zipfile.ZipFile], None]:
    info = {"version": 1, "name": "x", "modified": {}, **changes}
    return add(MANIFEST, json.dumps(info).encode())


@pytest.mark.parametrize(
    "edit",
    [
        damage_manifest(version=2),
        damage_manifest(name="../x"),
        damage_manifest(name=3),
        damage_manifest(modified=[1]),
        add(MANIFEST, b"[" * 100_000),
        add(MANIFEST, b"\xff"),
        add("other.json"),
    ],
)
def test_a_file_that_is_no_pack_is_refused(folder: Path, tmp_path: Path, edit: Callable[..., None]) -> None:
    file = change(pack(folder), edit, without=MANIFEST)
    with pytest.raises(OptionError, match="not a complete `pack` file"):
        unpack_folder(UnpackOptions(file=file, folder=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_hostile_times_are_left_alone(folder: Path, tmp_path: Path) -> None:
    times = {"a.png": 1 << 80, "a.txt": -5, "start.png": "x"}
    file = change(pack(folder), damage_manifest(modified=times), without=MANIFEST)
    unpack_folder(UnpackOptions(file=file, folder=tmp_path / "new"))
    assert (tmp_path / "new" / "a.png").is_file()


def test_half_a_copy_is_refused_wherever_it_ends(folder: Path, tmp_path: Path) -> None:
    full = pack(folder).read_bytes()
    half = tmp_path / "half.zip"
    ends = [*range(0, len(full), 97), len(full) - 1]
    for size in ends:
        half.write_bytes(full[:size])
        with pytest.raises(OptionError, match=r"not a complete `pack` file \(.*Copy it again"):
            unpack_folder(UnpackOptions(file=half, folder=tmp_path / "new"))
    changed = full.replace(b"picture a.png", b"picture b.png")
    half.write_bytes(changed)
    with pytest.raises(OptionError, match="not a complete `pack` file"):
        unpack_folder(UnpackOptions(file=half, folder=tmp_path / "new"))
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


def test_a_long_list_of_members_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zip_files, "MAX_LISTED_BYTES", 200)
    with pytest.raises(OptionError, match="list of files is too long"):
        unpack_folder(UnpackOptions(file=pack(folder), folder=tmp_path / "new"))


def test_overlapping_members_are_refused(folder: Path, tmp_path: Path) -> None:
    """The list names the same bytes again and again, under other names."""
    file = tmp_path / "bomb.zip"
    buffer = io.BytesIO(pack(folder).read_bytes())
    with zipfile.ZipFile(buffer, "a") as archive:
        add("big", bytes(1 << 20))(archive)
        entry = archive.getinfo("big")
        for number in range(50):
            other = zipfile.ZipInfo(f"big{number}")
            for fact in ("header_offset", "file_size", "compress_size", "CRC", "external_attr"):
                setattr(other, fact, getattr(entry, fact))
            archive.filelist.append(other)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(OptionError, match="members claim"):
        unpack_folder(UnpackOptions(file=file, folder=tmp_path / "new"))


def test_an_existing_folder_or_file_stays(folder: Path, tmp_path: Path) -> None:
    file = pack(folder)
    before = file.read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        pack_folder(PackOptions(folder=folder))
    (tmp_path / "new").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        unpack_folder(UnpackOptions(file=file, folder=tmp_path / "new"))
    with pytest.raises(OptionError, match="lies in the folder that it packs"):
        pack_folder(PackOptions(folder=folder, output=folder / "x.zip"))
    assert file.read_bytes() == before


def test_a_full_disk_and_ctrl_c_leave_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    file = pack(folder)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=SPARE_BYTES))
        for work in (
            lambda: pack_folder(PackOptions(folder=folder, output=tmp_path / "full.zip")),
            lambda: unpack_folder(UnpackOptions(file=file, folder=tmp_path / "new")),
        ):
            with pytest.raises(OutputError, match="Free some space"):
                work()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "utime", interrupt)
        with pytest.raises(KeyboardInterrupt):
            unpack_folder(UnpackOptions(file=file, folder=tmp_path / "new"))
    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "open", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack_folder(PackOptions(folder=folder, output=tmp_path / "stopped.zip"))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("pack.py", ["missing"], "missing"),
        ("pack.py", ["."], "run.toml: there is no such file. Describe the folder first"),
        ("unpack.py", ["missing.zip"], "missing.zip"),
        ("unpack.py", ["text.zip"], "not a complete `pack` file"),
        ("unpack.py", ["."], "is a folder"),
    ],
)
def test_slips_of_a_beginner(tmp_path: Path, script: str, words: list[str], told: str) -> None:
    (tmp_path / "text.zip").write_text("not a zip", encoding="utf-8")
    code, said = run_here(f"tools/{script}", *words, folder=tmp_path)
    assert_one_message(code, said, told)


def tensors_of(path: Path) -> dict[str, bytes]:
    with open_checkpoint(path) as checkpoint:
        # as bytes: on a processor that computes bfloat16 quickly, the LoRA is in bfloat16
        tensors = {name: checkpoint.read(name).reshape(-1) for name in checkpoint.tensors}
        return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def test_a_packed_folder_trains_to_the_same_lora_and_continues(tmp_path: Path) -> None:
    """By caches that came along, and from a state of the first machine."""
    here = tmp_path / "here"
    here.mkdir()
    Image.fromarray(moving_square(1, 32, 32, 0)[0]).save(here / "a.png")
    (here / "a.txt").write_text("a red square", encoding="utf-8")
    succeed_here("new_project.py", here, *MODEL, "--max_train_steps", 2, folder=tmp_path)
    run = (here / "run.toml").read_text(encoding="utf-8")
    (here / "run.toml").write_text(re.sub(r"(?m)^sample_.*\n", "", run), encoding="utf-8")
    dataset = ["--dataset_config", "dataset.toml"]
    pocket = ROOT / "pocket"
    vae = ["--vae", pocket / "vae.safetensors", "--vae_dtype", "float32"]
    succeed_here("wan_cache_latents.py", *dataset, *vae, folder=here)
    succeed_here(
        "wan_cache_text_encoder_outputs.py", *dataset, "--t5", pocket / "t5.safetensors", folder=here
    )
    train = ["wan_train_network.py", "--config_file", "run.toml"]
    first = pack(here)
    succeed_here(*train, folder=here)
    pack_folder(PackOptions(folder=here, output=tmp_path / "state.zip", with_state=True))
    assert str(tmp_path).encode() not in (tmp_path / "state.zip").read_bytes()

    there, later = tmp_path / "there", tmp_path / "later"
    for file, folder in ((first, there), (tmp_path / "state.zip", later)):
        unpack_folder(UnpackOptions(file=file, folder=folder, models=pocket))
    caches = {path: path.stat().st_mtime_ns for path in there.rglob("cache/**/*.safetensors")}
    said = succeed_here("wan_cache_latents.py", *dataset, *vae, folder=there)
    assert {path: path.stat().st_mtime_ns for path in caches} == caches, said
    succeed_here(*train, folder=there)
    lora = Path("output", "here.safetensors")
    assert tensors_of(there / lora) == tensors_of(here / lora)

    longer = ["--max_train_steps", 3, "--resume", "latest-or-fail"]
    succeed_here(*train, *longer, folder=here)
    succeed_here(*train, *longer, folder=later)
    assert tensors_of(later / lora) == tensors_of(here / lora)


@pytest.mark.parametrize(
    "text",
    [
        *('files = ["~nobody9/x"]', "files = 5", "files = [1]", 'files = "x"', f'files = ["{"n" * 5000}"]'),
        *('files = ["a\\u0000b"]', "files = [[]]", "files = {a = 1}", "x = 1\nx = 2", "[a]\n[a]"),
        f"x = {'9' * 100_000}",
        f"x = {'[' * 9000}",
        f"{'a.' * 9000}b = 1",
        "\xff",
        f"# {'long' * 100_000}",
    ],
)
def test_whatever_the_list_of_models_is_nothing_is_made(folder: Path, tmp_path: Path, text: str) -> None:
    content = f"[reelsmith]\n{text}\n".encode("latin-1")
    file = change(pack(folder), add("run.toml", content), without="run.toml")
    with pytest.raises(OptionError, match="not a complete `pack` file") as error:
        unpack_folder(UnpackOptions(file=file, folder=tmp_path / "place" / "deep" / "new"))
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("text", ["reelsmith = [1]", "reelsmith = 1", '[[reelsmith]]\nfiles = ["x"]'])
def test_a_list_of_models_that_is_no_table_makes_nothing(folder: Path, tmp_path: Path, text: str) -> None:
    file = change(pack(folder), add("run.toml", text.encode()), without="run.toml")
    with pytest.raises(OptionError, match="not a complete `pack` file"):
        unpack_folder(UnpackOptions(file=file, folder=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_member_that_is_damaged_leaves_no_folder_above(folder: Path, tmp_path: Path) -> None:
    file = pack(folder)
    file.write_bytes(file.read_bytes().replace(b"picture a.png", b"picture b.png"))
    with pytest.raises(OptionError, match="not a complete `pack` file"):
        unpack_folder(UnpackOptions(file=file, folder=tmp_path / "place" / "deep" / "new"))
    assert not (tmp_path / "place").exists()


def test_the_name_of_a_folder_is_no_option_of_the_next_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = change(pack(folder), damage_manifest(name="--help"), without=MANIFEST)
    monkeypatch.chdir(tmp_path)
    unpack_folder(UnpackOptions(file=file))
    assert f"run .{os.sep}--help" in capsys.readouterr().out.replace("\n", " ").replace("'", "")
    assert (tmp_path / "--help" / "run.toml").is_file()


def test_lines_of_a_history_end_at_newlines_only(tmp_path: Path) -> None:
    prompts = ["a cat", "a\u2028dog\u2029in\u0085fog", "a bird"]
    rows = [{"step": step, "prompt": prompt} for step, prompt in enumerate(prompts)]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows) + '{"step": 3, "pro'

    relocated = relocate_history(text, MachinePaths(tmp_path))

    assert [json.loads(line) for line in relocated.split("\n")[:-1]] == rows


def test_a_plain_word_as_the_download_folder_stays_a_word_elsewhere(tmp_path: Path) -> None:
    paths = MachinePaths(tmp_path, {"data": "models", "data/wan.safetensors": "models/a.safetensors"})

    assert paths.erase("a database of data, big-data/x") == "a database of data, big-data/x"
    assert paths.erase("--dit data/wan.safetensors --vae data/vae.pt") == (
        "--dit models/a.safetensors --vae models/vae.pt"
    )
    assert paths.erase("data") == "models"
