"""What `new` writes for each kind of folder and each family passes the checks of `run`, from any folder."""

import contextlib
import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import stable_diffusion.family  # noqa: F401  # packages of it warn when they are imported
from dataset.config import load_dataset_config
from dataset.listing import find_sources
from modules.installation import RUN_CHECKS, RUN_GOES_ON
from modules.text_files import parse_toml
from tests.commands import ROOT, run_script
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.sound_media import Track, write_media
from tests.tiny.new_models import MODELS, write_new_model
from tests.tiny.project import moving_square, write_clips

GERMAN = "ein größerer Bär läuft"


def write_photos(folder: Path, count: int = 3, captions: bool = True, stem: str = "p") -> list[Path]:
    """Write pictures that differ, below a folder with blanks and umlauts in its name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(moving_square(1, 64, 64, number + len(folder.name))[0]).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"a square, painted {number}", encoding="utf-8")
    return paths


def write_animation(path: Path) -> None:
    first, *others = (Image.fromarray(frame) for frame in moving_square(20, 64, 64, 3))
    first.save(path, save_all=True, append_images=others, duration=62)
    path.with_suffix(".txt").write_text("a square moves", encoding="utf-8")


def write_mixed(folder: Path) -> None:
    write_photos(folder)
    write_clips(folder, count=2, frames=60, width=64, height=64)
    write_animation(folder / "moving.gif")
    write_animation(folder / "moving too.webp")


def write_pairs(folder: Path) -> None:
    write_photos(folder)
    write_photos(folder / "control", captions=False)


def write_kohya(folder: Path) -> None:
    write_photos(folder / "img" / "10_ohwx man", captions=False)
    write_photos(folder / "img" / "2_ohwx dog")
    write_photos(folder / "reg" / "1_man", captions=False, stem="r")


def write_jsonl(folder: Path) -> None:
    paths = write_photos(folder, captions=False)
    rows = [{"file_name": path.name, "text": f"{GERMAN} {path.stem}"} for path in paths]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def write_csv(folder: Path) -> None:
    """Write captions as a German spreadsheet saves them."""
    paths = write_photos(folder, captions=False)
    with (folder / "captions.csv").open("w", encoding="cp1252", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Filename", "Caption"])
        rows.writerows([path.name, f"{GERMAN}; {path.stem}"] for path in paths)


def write_ansi(folder: Path) -> None:
    for path in write_photos(folder):
        path.with_suffix(".txt").write_bytes(GERMAN.encode("cp1252"))


def write_audios(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(3):
        write_media(folder / f"bell {number}.wav", Track(at=(0.5,), codec="pcm_s16le"), frames=0)
        (folder / f"bell {number}.txt").write_text(f"a bell, {number} times", encoding="utf-8")


def write_heard(folder: Path) -> None:
    """Write clips of five seconds and more, with sound; the first one has it in a file of its name."""
    folder.mkdir(parents=True)
    for number in range(2):
        track = Track(at=(0.5,), seconds=5.5)
        write_media(folder / f"bell {number}.mp4", *[track] * number, frames=130, fps=24)
        (folder / f"bell {number}.txt").write_text(f"a bell rings on a wall, {number}", encoding="utf-8")
    write_media(folder / "bell 0.wav", Track(at=(1.5,), codec="pcm_s16le", seconds=5.5), frames=0)


def write_nested(folder: Path) -> None:
    write_photos(folder / "day one")
    write_clips(folder / "day two", count=2, frames=60, width=64, height=64)


KINDS: dict[str, Callable[[Path], object]] = {
    "pictures": write_photos,
    "clips": lambda folder: write_clips(folder, count=2, frames=60, width=64, height=64),
    "mixed": write_mixed,
    "pairs": write_pairs,
    "kohya": write_kohya,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "ansi": write_ansi,
    "nested": write_nested,
    "no captions": lambda folder: write_photos(folder, captions=False),
    "sounds": write_audios,
    "heard": write_heard,
}
NEEDS_PAIRS = {
    "qwen_image edit-2511",
    "qwen_image_21 edit",
    "moss_image edit",
    "fibo_2 edit",
    "hidream_o1 edit",
    "krea2 edit",
    "flux_kontext dev",
}
NEEDS_CLIPS = {
    "wan i2v-14B-480p",
    "wan flf2v-14B",
    "skyreels i2v",
    "framepack i2v",
    "kandinsky k5-lite-i2v-5s-sd",
    "hunyuan_video_1_5 i2v-480p",
    "hunyuan_video_1_5 i2v-720p",
}
HEARS = {"ltx_2 av"}
NEEDS_SECONDS = {"minimax_h3 t2va", "minimax_h3 fl2va"}  # five: more than most clips here have


def default_kind(name: str) -> str:
    """Return a kind of folder that a model learns from."""
    if name in NEEDS_SECONDS:
        return "heard"
    return "pairs" if name in NEEDS_PAIRS else "mixed"


# pairs that are tried each day: all kinds with two families, and the first model of each with one
DAILY = {(name, kind) for name in ("wan t2v-1.3B", "z_image turbo") for kind in KINDS}
FIRST_MODELS = {name.split()[0]: name for name in reversed(MODELS)}
DAILY |= {(name, default_kind(name)) for name in FIRST_MODELS.values()}
DAILY |= {(name, "pairs") for name in NEEDS_PAIRS}
DAILY.add(("minimax_h3 t2va", "mixed"))  # pictures alone, as its clips are too short


def takes(name: str, kind: str) -> bool:
    if kind == "sounds":
        return name in HEARS
    if name == "ltx_2 av":  # it learns sound
        return kind == "heard"
    if name in NEEDS_SECONDS:
        return kind == "heard" or (name.endswith("t2va") and kind != "clips")
    if name in NEEDS_PAIRS:
        return kind == "pairs"
    return name not in NEEDS_CLIPS or kind in {"clips", "mixed", "nested", "heard"}


def describe(name: str, kind: str, models: Path, place: Path, *more: str) -> Path:
    """Write a folder of a kind, and describe it from another one. Returns it."""
    folder, elsewhere = place / "Bilder von Jörg" / kind, place / "elsewhere"
    KINDS[kind](folder)
    elsewhere.mkdir()
    words = write_new_model(name, models / name)
    words += ["--trigger_word", "ohwx"] if kind == "no captions" else []
    told = run_here("new_project.py", folder, *words, *more, folder=elsewhere)
    assert told == (0, "")
    return folder


def check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the checks that `run` begins with."""
    _, media, texts, *_, train = parse_toml((folder / "run.toml").read_text("utf-8"))["reelsmith"]["commands"]
    monkeypatch.setenv(RUN_GOES_ON, RUN_CHECKS)
    succeed_here(train[1], *train[2:], folder=folder)
    monkeypatch.delenv(RUN_GOES_ON)
    succeed_here(media[1], *media[2:], folder=folder)
    succeed_here(texts[1], *texts[2:], folder=folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny models")


PAIRS = [
    pytest.param(name, kind, marks=[] if (name, kind) in DAILY else pytest.mark.slow)
    for name in MODELS
    for kind in KINDS
]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_run_takes_what_new_writes(
    name: str, kind: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if takes(name, kind):
        check(describe(name, kind, models, tmp_path), monkeypatch)
        return
    folder = tmp_path / "Bilder von Jörg" / kind
    KINDS[kind](folder)
    before = sorted(folder.rglob("*"))
    words = write_new_model(name, models / name)
    assert_one_message(*run_here("new_project.py", folder, *words, folder=tmp_path))
    assert sorted(folder.rglob("*")) == before


POCKET = "pocket wan"
SLOW_WAYS = [(name, default_kind(name)) for name in MODELS if name != "ltx_2 av"]
SLOW_WAYS += [
    ("ltx_2 av", "sounds"),
    ("z_image turbo", "kohya"),
    ("stable_diffusion xl", "kohya"),
    (POCKET, "clips"),
    (POCKET, "csv"),
]


def describe_short(name: str, kind: str, models: Path, place: Path) -> tuple[Path, Path]:
    """Describe a folder for two steps with one short sample. Returns it, and the folder it was typed in."""
    folder, elsewhere = place / "Bilder von Jörg" / kind, place / "elsewhere"
    KINDS[kind](folder)
    elsewhere.mkdir()
    words = write_pocket() if name == POCKET else write_new_model(name, models / name)
    words += ["--max_train_steps", "2", "--output_name", "own"]
    told = run_here("new_project.py", Path("..") / folder.relative_to(place), *words, folder=elsewhere)
    assert told == (0, "")
    prompts = folder / "prompts.txt"
    first, *_ = prompts.read_text(encoding="utf-8").splitlines()
    prompts.write_text(f"{first} --s 1 --w 32 --h 32\n", encoding="utf-8")
    return folder, elsewhere


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("z_image turbo", "kohya", marks=pytest.mark.slow),
        ("stable_diffusion xl", "kohya"),
        (POCKET, "clips"),
    ],
)
def test_the_commands_of_run_lead_to_a_lora(name: str, kind: str, models: Path, tmp_path: Path) -> None:
    folder, elsewhere = describe_short(name, kind, models, tmp_path)
    data = folder / "dataset.toml"
    text = data.read_text(encoding="utf-8")
    if "subsets" not in text:  # whose sides are multiples of 64
        data.write_text(re.sub(r"resolution = .*", "resolution = [32, 32]", text), encoding="utf-8")
    _, *commands = parse_toml((folder / "run.toml").read_text("utf-8"))["reelsmith"]["commands"]

    for _, script, *words in commands:
        succeed_here(script, *words, folder=folder)

    assert (folder / "output" / "own.safetensors").is_file()
    assert list(elsewhere.iterdir()) == []


def uncomment(run: str, first: str, count: int) -> str:
    """Return run.toml with `count` lines taken in, of which the first one is for the key `first`."""
    lines = run.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"# {first} = "))
    taken = [line.removeprefix("# ") for line in lines[begin : begin + count]]
    return "\n".join([*lines[:begin], *taken, *lines[begin + count :], ""])


@pytest.mark.parametrize("model", ["z_image turbo", "krea2 turbo", "flux schnell", "flux_2 klein-4b"])
def test_a_distilled_model_has_the_lines_of_targets_that_keep_its_steps(model: str, tmp_path: Path) -> None:
    """They are comments, and the empty prompt that one of them needs is cached."""
    write_photos(tmp_path)

    said = new(tmp_path, model=model)

    assert "from the lines of a target that keeps them, in [training] of run.toml" in said
    written = (tmp_path / "run.toml").read_text(encoding="utf-8")
    values = parse_toml(written)
    assert not {"guided_target", "teacher"} & values["training"].keys()
    texts = values["reelsmith"]["commands"][4]
    assert "--empty_prompt" in texts
    # schnell was trained with half the tokens of dev, which the encoders' files do not show
    assert ("--t5xxl_max_token_length 256" in " ".join(texts)) == (model == "flux schnell")
    taken = parse_toml(uncomment(written, "guided_target", 2))["training"]
    assert (taken["guided_target"], taken["guided_target_min_timestep"]) == (3, 150)
    has_base = model != "flux schnell"  # dev has an input for guidance, so it cannot be its teacher
    assert ("# teacher_delta = true" in written) == has_base


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), SLOW_WAYS)
def test_new_and_run_lead_to_a_lora(name: str, kind: str, models: Path, tmp_path: Path) -> None:
    folder, elsewhere = describe_short(name, kind, models, tmp_path)

    done = run_script("reelsmith.py", "run", f"../Bilder von Jörg/{kind}", folder=elsewhere)

    said = done.stdout.splitlines()
    assert said[-1] == f"The page of the training: ../Bilder von Jörg/{kind}/output/own.html"
    assert (folder / "output" / "own.safetensors").is_file()
    assert not any("cannot be read" in line for line in said)
    assert list(elsewhere.iterdir()) == []


def write_pocket() -> list[str]:
    """Return the options of `new` for the tiny Wan of the repository."""
    words = ["--family", "wan", "--task", "t2v-1.3B", "--memory", "0"]
    for option in ("dit", "vae", "t5"):
        words += ["--model_file", f"{option}={ROOT / 'pocket' / option}.safetensors"]
    return words


# --- what the files say ---------------------------------------------------------------------------------


def new(folder: Path, *words: object, model: str = "z_image turbo") -> str:
    """Describe a folder. Returns what was said."""
    family, task = model.split()
    names = ["--family", family, "--task", task, "--memory", "0"]
    return run_script("new_project.py", folder, *names, *words).stdout


def captions_of(folder: Path) -> dict[str, str | None]:
    """Return the captions that training uses, by the name of their file."""
    tables = load_dataset_config(folder / "dataset.toml").datasets
    with contextlib.chdir(folder):
        return {one.path.name: one.caption for table in tables for one in find_sources(table)}


def test_folders_of_kohya_are_repeated_and_named(tmp_path: Path) -> None:
    write_kohya(tmp_path)

    said = new(tmp_path, "--trigger_word", "ohwx")

    man, dog = load_dataset_config(tmp_path / "dataset.toml").datasets
    assert (man.source.directory, man.learning.num_repeats, man.captions.class_tokens) == (
        Path("img/10_ohwx man"),
        10,
        "ohwx man",
    )
    assert (dog.source.directory, dog.learning.num_repeats, dog.captions.class_tokens) == (
        Path("img/2_ohwx dog"),
        2,
        None,
    )
    assert captions_of(tmp_path)["p0.jpg"] in {"ohwx man", "ohwx, a square, painted 0"}
    assert "by its name, each file is trained 10 times an epoch" in said
    assert f"{tmp_path / 'reg' / '1_man'}: left out, as reg is the name of a folder of regularization" in said


def write_reg(folder: Path) -> None:
    write_photos(folder / "10_ohwx man", captions=False)
    write_photos(folder / "1_man", captions=False, stem="r")


def write_img_beside_reg(folder: Path) -> None:
    write_photos(folder / "10_ohwx man", captions=False)
    write_photos(folder.parent / "reg" / "1_man", captions=False, stem="r")


@pytest.mark.parametrize(
    ("write", "reg"), [(write_reg, "1_man"), (write_img_beside_reg, "../reg/1_man")], ids=["inside", "beside"]
)
def test_stable_diffusion_learns_the_class_of_kohyas_folders(
    write: Callable[[Path], None], reg: str, tmp_path: Path
) -> None:
    folder = tmp_path / "img"
    write(folder)

    said = new(folder, "--trigger_word", "ohwx", model="stable_diffusion xl")

    man, of_class = load_dataset_config(folder / "dataset.toml").datasets
    assert (man.source.directory, man.learning.num_repeats, man.learning.is_reg) == (
        Path("10_ohwx man"),
        10,
        False,
    )
    assert (of_class.source.directory, of_class.learning.is_reg) == (Path(reg), True)
    assert (man.buckets.resolution, man.group) == (
        of_class.buckets.resolution,
        of_class.group,
    )  # they share batches
    texts = captions_of(folder)
    assert (texts["p0.jpg"], texts["r0.jpg"]) == ("ohwx man", "man")  # the class has no word
    assert of_class.cache_directory is not None
    assert not of_class.cache_directory.is_absolute()
    assert of_class.cache_directory.parts[0] == "cache"  # `run` writes nothing elsewhere
    assert "3 regularization images (is_reg), `man` for those without a caption" in said


def read_prompts(folder: Path) -> list[str]:
    return (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("model", ["stable_diffusion xl", "flux_3 klein-base"])
def test_samples_show_the_subject_and_not_its_class(model: str, tmp_path: Path) -> None:
    write_reg(tmp_path)
    new(tmp_path, model=model)
    assert [line.partition(",")[0] for line in read_prompts(tmp_path)[:2]] == ["ohwx man"] * 2


def test_samples_of_pairs_are_edits_of_models_that_also_make_pictures(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    new(tmp_path, model="flux_3 klein-base")
    assert re.match("make it a pencil drawing .* --ci control/p2.jpg ", read_prompts(tmp_path)[2])


def test_transparency_is_learned_by_a_model_that_has_it(tmp_path: Path) -> None:
    Image.new("RGBA", (300, 300), (200, 0, 0, 90)).save(tmp_path / "a.png")
    words = ("--trigger_word", "ohwx", "--overwrite")
    told = "a.png: transparent in part, which is learned"
    assert f"{told}; " in new(tmp_path, *words, model="qwen_image_21 base")
    assert f"{told} as white; " in new(tmp_path, *words, model="flux_3 klein-base")


def test_clips_that_are_too_short_for_a_model_say_nothing_of_the_others(tmp_path: Path) -> None:
    """They are not learned: neither silent nor small, and the size is that of what is learned."""
    write_clips(tmp_path, count=4, frames=30, width=64, height=64)
    Image.new("RGB", (320, 256)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a wall", encoding="utf-8")
    said = new(tmp_path, model="minimax_h3 t2va")
    assert "320x256: the size of a typical file, a.png" in said
    assert "too short for a clip of this model, which cannot train" in said
    assert "only their pictures are used" not in said
    assert "tiny" not in said


def test_a_folder_of_few_steps_is_known_by_its_whole_name(tmp_path: Path) -> None:
    """Qwen-Image-2.1-Turbo is a folder: what is behind its last dot is no ending."""
    write_photos(tmp_path)
    said = new(tmp_path, model="qwen_image_21 turbo")
    assert "qwen_image_21 turbo was distilled to few steps" in said
    assert "seems to be" not in said


def test_regularisation_pictures_without_a_class_are_left_out(tmp_path: Path) -> None:
    write_photos(tmp_path / "10_ohwx man", captions=False)
    write_photos(tmp_path / "reg", captions=False, stem="r")

    said = new(tmp_path, model="stable_diffusion xl")

    assert "is_reg" not in (tmp_path / "dataset.toml").read_text(encoding="utf-8")
    assert f"{tmp_path / 'reg'}: left out: r0.jpg, r1.jpg, r2.jpg: regularization images without" in said
    assert "Call it 1_man" in said


def test_a_class_beside_its_subject_is_left_out(tmp_path: Path) -> None:
    write_photos(tmp_path / "10_ohwx man", captions=False)
    write_photos(tmp_path / "1_man", captions=False)
    said = new(tmp_path)
    (table,) = load_dataset_config(tmp_path / "dataset.toml").datasets
    assert table.source.directory == Path("10_ohwx man")
    assert "1_man: left out, as `man` is the class of `ohwx man`" in said

    new(tmp_path / "1_man")  # alone it is what is learned
    (table,) = load_dataset_config(tmp_path / "1_man" / "dataset.toml").datasets
    assert (table.captions.class_tokens, table.learning.num_repeats) == ("man", 1)


def test_caches_of_a_linked_folder_are_below_the_described_one(tmp_path: Path) -> None:
    """`run` writes nothing elsewhere."""
    write_photos(tmp_path / "far" / "away")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "day").symlink_to("../far/away", target_is_directory=True)
    new(tmp_path / "set")
    (table,) = load_dataset_config(tmp_path / "set" / "dataset.toml").datasets
    assert table.cache_directory == Path("cache/images/day")


def write_json(folder: Path) -> None:
    for path in write_photos(folder, captions=False):
        path.with_suffix(".json").write_text(
            json.dumps({"caption": f"{GERMAN} {path.stem}"}), encoding="utf-8"
        )


def write_one_json(folder: Path) -> None:
    captions = {
        path.stem: {"caption": f"{GERMAN} {path.stem}"} for path in write_photos(folder, captions=False)
    }
    (folder / "meta_cap.json").write_text(json.dumps(captions), encoding="utf-8")


def write_bare_csv(folder: Path) -> None:
    """Write a list made by hand: no names of columns, tabs."""
    lines = [f"{path.name}\t{GERMAN} {path.stem}\n" for path in write_photos(folder, captions=False)]
    (folder / "list.tsv").write_text("".join(lines), encoding="utf-8-sig")


def write_rows_of_others(folder: Path) -> None:
    """Write paths as another machine has them, and a row of a file that is not here."""
    rows = [
        {"image_path": f"D:\\data\\{path.name}", "prompt": f"{GERMAN} {path.stem}"}
        for path in write_photos(folder, captions=False)
    ]
    rows.append({"image_path": "gone.jpg", "prompt": "nothing"})
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


LISTS = [write_jsonl, write_json, write_one_json, write_bare_csv, write_rows_of_others]


@pytest.mark.parametrize("write", LISTS)
def test_captions_of_lists_are_written_into_caption_files(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path)
    (tmp_path / "p1.txt").write_text("my own", encoding="utf-8")

    said = new(tmp_path)

    expected = {"p0.jpg": f"{GERMAN} p0", "p1.jpg": "my own", "p2.jpg": f"{GERMAN} p2"}
    assert captions_of(tmp_path) == expected
    assert "2 are written into .txt files, which are used from now on" in said
    assert "p1.jpg: the .txt file differs from the list, and is used" in said
    assert ("1 row for files that are not here: gone.jpg" in said) is (write is write_rows_of_others)
    assert "without a caption" not in said


def test_captions_of_sounds_in_another_encoding_are_read_with_a_remark(tmp_path: Path) -> None:
    folder = tmp_path / "bells"
    write_audios(folder)
    (folder / "bell 0.txt").write_text(GERMAN, encoding="cp1252")

    said = new(folder, model="ltx_2 av")

    assert f"captions that are not UTF-8: {folder / 'bell 0.txt'}" in said


def test_a_spreadsheet_in_another_encoding_is_read_with_a_remark(tmp_path: Path) -> None:
    write_csv(tmp_path)
    said = new(tmp_path)
    assert captions_of(tmp_path)["p0.jpg"] == f"{GERMAN}; p0"
    assert "captions.csv: not UTF-8, and read as Windows-1252 (Western European)" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,score\np0.jpg,3\n", "has no column of captions (text); it has file_name, score"),
        ("file_name,text\nx.jpg,a\n", "it has captions for none of the files"),
        ("file_name,text\np0.jpg,a dog, on a mat\n", "line 2: left out, it has 3 cells, the header has 2"),
        ("", "captions.csv is empty"),
    ],
)
def test_a_list_that_is_not_read_has_a_reason(text: str, words: str, tmp_path: Path) -> None:
    write_photos(tmp_path)
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8")
    assert words in new(tmp_path)


def test_a_picture_model_learns_the_first_frames_of_clips(tmp_path: Path) -> None:
    write_clips(tmp_path, count=2, width=64, height=64)
    write_animation(tmp_path / "moving.gif")
    (tmp_path / "deep").mkdir()
    shutil.copy(tmp_path / "clip 0.mp4", tmp_path / "deep" / "clip 0.mp4")

    said = new(tmp_path, "--trigger_word", "ohwx")
    again = new(tmp_path, "--trigger_word", "ohwx", "--overwrite")

    for text in (said, again):
        assert f"{tmp_path}: 4 images. " in text
        assert "clip 0.mp4, clip 1.mp4, clip 0.mp4: z_image turbo is trained only on images." in text
    tables = load_dataset_config(tmp_path / "dataset.toml").datasets
    folders = {
        str(table.source.directory and table.source.directory.as_posix()): table.kind for table in tables
    }
    assert folders == dict.fromkeys([".", "first_frames", "first_frames/deep"], "image")
    captions = captions_of(tmp_path)
    assert captions["moving.gif"] == "ohwx, a square moves"
    assert captions["clip 1.png"] == "ohwx, a blue circle moves left"
    with Image.open(tmp_path / "first_frames" / "deep" / "clip 0.png") as image:
        assert image.size == (64, 64)


def test_copies_empty_captions_and_the_size_are_told(tmp_path: Path) -> None:
    write_photos(tmp_path)
    shutil.copy(tmp_path / "p0.jpg", tmp_path / "p0 (1).jpg")
    (tmp_path / "p0 (1).txt").write_text(" ", encoding="utf-8")

    said = new(tmp_path, "--trigger_word", "ohwx")

    assert "p0 (1).jpg = p0.jpg: equal copies, which are trained more often than others" in said
    assert "p0 (1).jpg: an empty caption: only ohwx is learned there" in said
    assert "64x64: the size of a typical file, p1.jpg (64x64)" in said


def test_the_size_is_that_of_files_which_are_learned(tmp_path: Path) -> None:
    write_clips(tmp_path, count=2, frames=30, width=64, height=96)
    for number in range(5):
        Image.new("RGB", (1600, 1200), (number, 0, 0)).save(tmp_path / f"p{number}.png")
    said = new(tmp_path, "--trigger_word", "ohwx", model="wan i2v-14B-480p")
    assert "64x96: the size of a typical file, clip 1.mp4 (64x96)" in said
    said = new(tmp_path, "--overwrite", "--trigger_word", "ohwx")
    assert "1184x896: the size of a typical file, p" in said
    assert "of files from 64x96 to 1600x1200, reduced to the area of 1024x1024" in said


@pytest.mark.parametrize("model", ["krea2 raw", "qwen_image original", "hunyuan_image 2.1", "ltx_2 v"])
def test_a_cpu_gets_no_weights_in_8_bits(model: str, tmp_path: Path) -> None:
    (write_clips if model == "ltx_2 v" else write_photos)(tmp_path)
    new(tmp_path, model=model)
    values = parse_toml((tmp_path / "run.toml").read_text(encoding="utf-8"))["training"]
    assert not {"fp8_base", "fp8_scaled", "convrot_int8", "nf4_base"} & values.keys()
    assert values["optimizer_type"] == "adamw"
    new(tmp_path, "--memory", "12", "--overwrite", model=model)
    values = parse_toml((tmp_path / "run.toml").read_text(encoding="utf-8"))["training"]
    assert not {"fp8_base", "fp8_scaled"} & values.keys()  # docs/small_cards.md
    assert {"convrot_int8", "nf4_base"} & values.keys()


RELEASED = "krea2 turbo was distilled to few steps"
SEEMS_RAW = "raw.safetensors seems to be the model before it was distilled to few steps"
SEEMS_TURBO = "turbo.safetensors seems to be a model of few steps"


@pytest.mark.parametrize(
    ("task", "file", "told"),
    [
        ("turbo", None, {RELEASED}),
        ("turbo", "turbo", {RELEASED}),
        ("turbo", "mine", {RELEASED}),
        ("turbo", "raw", {SEEMS_RAW, "pass --task raw"}),
        ("raw", "turbo", {SEEMS_TURBO, "pass --task turbo", "It was distilled to few steps"}),
        ("raw", "raw", set()),
        ("raw", None, set()),
    ],
)
def test_a_model_of_few_steps_is_told_by_its_task_or_file(
    task: str, file: str | None, told: set[str], models: Path, tmp_path: Path
) -> None:
    write_photos(tmp_path)
    words: list[str] = []
    if file is not None:
        write_new_model("krea2 raw", models / "krea2 raw")
        named = models / "krea2 raw" / f"{file}.safetensors"
        if not named.exists():
            shutil.copy(models / "krea2 raw" / "dit.safetensors", named)
        words = ["--model_file", f"dit={named}"]

    said = new(tmp_path, *words, model=f"krea2 {task}")

    known = {RELEASED, SEEMS_RAW, SEEMS_TURBO, "pass --task raw", "pass --task turbo"}
    known.add("It was distilled to few steps")
    assert {words for words in known if words in said} == told


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_another_model_is_refused(name: str, models: Path, tmp_path: Path) -> None:
    write_new_model("krea2 raw", models / "krea2 raw")
    write_new_model("z_image turbo", models / "z_image turbo")
    other = "z_image turbo" if name.startswith("krea2") else "krea2 raw"
    (write_pairs if name in NEEDS_PAIRS else write_mixed)(tmp_path / "set")
    family, task = name.split()
    option = next(iter(MODELS[name][1]))
    words = [
        "--family",
        family,
        "--task",
        task,
        "--model_file",
        f"{option}={models / other / 'dit.safetensors'}",
    ]

    told = run_here("new_project.py", "set", *words, folder=tmp_path)

    assert_one_message(*told, "dit.safetensors")
    assert not (tmp_path / "set" / "dataset.toml").exists()


def test_the_sound_file_of_a_clip_is_its_sound(tmp_path: Path) -> None:
    """MiniMax-H3 finds it by its name; LTX-2 needs a key for it."""
    write_heard(tmp_path / "a")
    said = new(tmp_path / "a", model="minimax_h3 t2va")
    assert "bell 0" not in said.replace("bell 0.mp4, bell 1.mp4: tiny", "")
    write_media(tmp_path / "a" / "noise.wav", Track(codec="pcm_s16le"), frames=0)
    (tmp_path / "a" / "bell 0.wav").unlink()
    said = new(tmp_path / "a", "--overwrite", model="minimax_h3 t2va")
    assert "noise.wav: left out, this kind is not read" in said
    assert "bell 0.mp4: without sound: only their pictures are used" in said
    assert "bell 0.wav: left out" in new(write_again(tmp_path / "b"), model="ltx_2 av")


def write_again(folder: Path) -> Path:
    write_heard(folder)
    return folder


def test_the_last_line_says_what_is_missing(models: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "a", captions=False)
    write_photos(tmp_path / "b")
    write_photos(tmp_path / "c")
    shutil.copy(tmp_path / "c" / "p1.jpg", tmp_path / "c" / "p0.png")  # two files, one name of caches
    words = write_new_model("z_image turbo", models / "z_image turbo")[4:]

    first, second, third = (new(tmp_path / name, *words).splitlines()[-1] for name in "abc")

    run = "python reelsmith.py run"
    assert first.startswith("First add captions or a trigger word as above. Then python ")
    assert second == f"{run} {tmp_path / 'b'} checks, caches and trains"
    assert third.startswith("First fix the problems listed above. Then python ")
    assert new(tmp_path / "b", "--overwrite").splitlines()[-1] == (
        f"{run} {tmp_path / 'b'} --download downloads the model, checks, caches and trains"
    )


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ("--family krea-2", "raw"),
        ("--family z-image", "base"),
        ("--family flux", "dev"),
        ("--family qwen_image_21", "base"),
    ],
)
def test_the_one_task_to_train_is_taken_with_a_word(words: str, task: str, tmp_path: Path) -> None:
    write_photos(tmp_path)
    said = run_script("new_project.py", tmp_path, *words.split(), "--memory", "0").stdout
    assert f"--task {task} is taken: " in said


def test_a_task_whose_name_is_nearly_typed_is_taken_with_a_word(tmp_path: Path) -> None:
    write_photos(tmp_path)
    assert "--task klein: klein-base is taken, " in new(tmp_path, model="flux_3 klein")
    assert "is taken" not in new(tmp_path, "--overwrite", model="flux_3 klein-base")


def test_the_name_of_a_training_task_is_taken(tmp_path: Path) -> None:
    write_clips(tmp_path, frames=30)
    said = run_script(
        "new_project.py", tmp_path, "--family", "wan", "--task", "i2v-14B", "--memory", 0
    ).stdout
    assert "--task i2v-14B-480p is taken: " in said
    assert "Others: i2v-14B-720p" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (". --family vace", "learns from control clips, which `new` does not describe: see docs/vace.md"),
        (". --family wan --task t2v-1.3B-FC", "Wan2.1 t2v-1.3B-FC learns from control clips"),
        ("set/p0.jpg --family lumina", "it is a file. Pass the folder that it is in: set"),
        ("bells --family wan --task t2v-1.3B", "--family ltx_2 or --family ltx_25 learns sounds alone"),
        ("bells --family ltx_25 --task v", "Pass a folder that has one. --task av learns sounds alone"),
        ("set --family minimax_h3 --task ref2va", "is not described by `new`: see docs/minimax_h3.md"),
    ],
)
def test_what_new_cannot_describe_has_a_remedy(words: str, told: str, tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    write_audios(tmp_path / "bells")
    assert_one_message(*run_here("new_project.py", *words.split(), folder=tmp_path), told)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="who may write everywhere meets no refusal")
def test_a_folder_that_cannot_be_written_is_no_full_disk(tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    (tmp_path / "set").chmod(0o555)
    told = run_here("new_project.py", "set", "--family", "lumina", folder=tmp_path)
    (tmp_path / "set").chmod(0o755)
    said = assert_one_message(*told, "make set one that you may write in")
    assert "Free some space" not in said


def test_new_says_what_run_stops_at(tmp_path: Path) -> None:
    write_photos(tmp_path)
    (tmp_path / "p0.txt").write_bytes("девушка в красном".encode("cp1251"))
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")

    said = new(tmp_path)

    assert f"{tmp_path}: 3 images. " in said  # a caption that cannot be read leaves no picture out
    assert "1 has a caption that cannot be used:" in said
    assert "It looks like Windows-1251 (Cyrillic): 'девушка в красном'" in said
    assert f"left out: {tmp_path / 'broken.gif'} is" in said
    assert "1 cannot be read and has no caption, which ends a run: delete each" in said
    assert said.splitlines()[-1].startswith("First fix the problems listed above. ")
    said = new(tmp_path, "--trigger_word", "ohwx", "--overwrite")
    assert "cannot be read and has no caption" not in said  # the word stands for it too


def test_run_toml_is_printed_and_writes_nothing(tmp_path: Path) -> None:
    write_photos(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    printed = new(tmp_path, "--print_run")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    new(tmp_path)
    written = (tmp_path / "run.toml").read_text(encoding="utf-8")
    assert printed.strip() == written.strip()
    (tmp_path / "run.toml").write_text("mine", encoding="utf-8")
    assert new(tmp_path, "--print_run").strip() == written.strip()  # also of a described folder
    assert (tmp_path / "run.toml").read_text(encoding="utf-8") == "mine"
