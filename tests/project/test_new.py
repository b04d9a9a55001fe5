"""What `new` makes of folders that people have: pairs, phone photos, damaged files; and what it asks."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from browser.folders.described_folder import read_described
from dataset.config import load_dataset_config
from modules.errors import OutputError
from modules.script_options import parse_options
from modules.text_files import parse_toml
from project import model_choice as choosing
from project.files import write_project
from project.new_options import NewOptions
from project.options import find_models
from runtime.options import PlanOptions
from tests.commands import run_script
from tests.faults.messages import assert_one_message, run_here
from tests.sound_media import Track, write_media
from tests.tiny.project import write_clips
from tests.tiny.stable_diffusion import write_sd1, write_tiny_stable_diffusion
from training.config_options import PROJECT_TABLE

EDIT = ["--family", "qwen", "--task", "edit-2511", "--memory", "24"]


def write_photos(
    folder: Path, count: int = 3, captions: bool = True, stem: str = "p", size: int = 300
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (size, size), (number * 40, 90, 10)).save(folder / f"{stem}{number}.jpg")
        if captions:
            (folder / f"{stem}{number}.txt").write_text(f"make it blue {number}", encoding="utf-8")


# where results and what they are made from lie, below the folder of `new`
LAYOUTS = {
    "inside": (".", "control"),
    "two folders": ("after", "before_pictures"),
    "images and before": ("pictures", "before"),
    "beside": (".", "../source"),
    "nested": ("set", "set/control_images"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "model", ["qwen edit-2511", "kontext dev", "flux_2 klein-base-4b", "flux_3 klein-base", "krea2 edit"]
)
def test_pairs_become_references(layout: str, model: str, tmp_path: Path) -> None:
    results, sources = LAYOUTS[layout]
    folder = tmp_path / "top" / "pairs"
    write_photos(folder / results)
    write_photos(folder / sources, captions=False)
    shutil.move(folder / sources / "p2.jpg", folder / sources / "p2_0.jpg")  # several have numbers
    shutil.copy(folder / sources / "p2_0.jpg", folder / sources / "p2_1.jpg")
    family, task = model.split()

    told = run_here("new_project.py", folder, "--family", family, "--task", task, folder=tmp_path)

    assert told == (0, "")
    (table,) = load_dataset_config(folder / "dataset.toml").datasets
    assert (table.source.directory, table.references.control_directory) == (Path(results), Path(sources))
    assert (table.references.control_resolution is not None) is (family == "qwen")
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    shown = [line.split("--ci ")[1].split(" --")[0].strip() for line in prompts]
    assert shown == [(Path(sources) / name).as_posix() for name in ("p0.jpg", "p1.jpg", "p2_0.jpg")]
    assert all((folder / name).exists() for name in shown)
    instructions = [line.split(" --", 1)[0] for line in prompts]
    assert instructions == ["make it blue 0", "make it blue 1", "make it a pencil drawing"]


JSON_EDITS = [
    '{"structured_caption": {"short_description": "a hat"}, "edit_instruction": "give her a hat --s 3"}',
    '{"edit_instruction": "ohwx: take the hat away", "short_description": "a bare head"}',
    "{broken",
]


@pytest.mark.parametrize(
    ("captions", "word", "expected"),
    [
        (JSON_EDITS, "ohwx", ["ohwx, give her a hat s 3", "ohwx: take the hat away"]),
        ([], "ohwx", ["ohwx", "ohwx"]),
        ([], None, []),
    ],
)
def test_samples_of_edits_are_what_a_user_would_ask_for(
    captions: list[str], word: str | None, expected: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    write_photos(folder, captions=False)
    write_photos(folder / "control", captions=False)
    for number, caption in enumerate(captions):
        (folder / f"p{number}.txt").write_text(caption, encoding="utf-8")
    words = ["--trigger_word", word] if word else []

    told = run_here("new_project.py", folder, "--family", "fibo_2", *words, folder=tmp_path)

    assert told == (0, "")
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" --", 1)[0] for line in prompts] == [*expected, "make it a pencil drawing"]


def test_samples_of_json_captions_name_the_subject_and_not_the_keys(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_photos(folder, captions=False)
    for number in range(3):
        caption = {"short_description": f"a red hat, {number}", "context": "a catalog"}
        (folder / f"p{number}.txt").write_text(json.dumps(caption), encoding="utf-8")

    told = run_here("new_project.py", folder, "--family", "fibo_2", "--task", "dev", folder=tmp_path)

    assert told == (0, "")
    first, *_ = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("a red hat, in falling snow --w ")


def test_an_unreadable_reference_is_told_and_in_no_sample(tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    write_photos(tmp_path / "set" / "control", captions=False)
    (tmp_path / "set" / "control" / "p1.jpg").write_bytes(b"no image")
    said = run_script("new_project.py", tmp_path / "set", *EDIT).stdout
    assert "p1.jpg: not trained on, its reference cannot be read" in said
    prompts = (tmp_path / "set" / "prompts.txt").read_text(encoding="utf-8")
    assert "control/p0.jpg" in prompts
    assert "control/p1.jpg" not in prompts


@pytest.mark.skipif(os.name == "nt", reason="it can have no such folder")
def test_a_folder_named_like_a_device_of_windows_gives_another_name(tmp_path: Path) -> None:
    write_photos(tmp_path / "aux")
    run_script("new_project.py", tmp_path / "aux", "--family", "zimage", "--task", "base")
    assert 'output_name = "lora_aux"' in (tmp_path / "aux" / "run.toml").read_text(encoding="utf-8")


def test_a_model_that_does_not_edit_refuses_references_as_targets(tmp_path: Path) -> None:
    write_photos(tmp_path / "set" / "after")
    write_photos(tmp_path / "set" / "before", captions=False)
    done = run_script("new_project.py", tmp_path / "set", "--family", "zimage", "--task", "base")
    assert f"{tmp_path / 'set' / 'before'}: left out" in done.stdout
    (table,) = load_dataset_config(tmp_path / "set" / "dataset.toml").datasets
    assert (table.source.directory, table.references.control_directory) == (Path("after"), None)


@pytest.mark.parametrize("place", ["conditioning", "../control"])
def test_control_pictures_are_told_with_the_script_that_learns_them(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "top" / "pairs"
    write_photos(folder)
    write_photos(folder / place, count=2, captions=False)
    write_photos(folder / place, count=1, captions=False, stem="lone")
    chosen = ["--family", "sd", "--task", "xl", "--memory", "24", "--dry_run", "--train", "lora"]

    done = run_script("new_project.py", folder, *chosen)

    (line,) = [text for text in done.stdout.splitlines() if "as a LoRA does not use control images" in text]
    assert "2 of 3 images have one there. Without a control image: p2.jpg. " in line
    assert "Without an image: lone0.jpg. " in line
    assert line.endswith("--train lllite trains a ControlNet-LLLite on such pairs (docs/control.md)")
    assert "does not edit" not in done.stdout


def test_numbered_pictures_beside_their_results_get_a_sentence(tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    write_photos(tmp_path / "set", captions=False, stem="p0_")
    said = assert_one_message(
        *run_here("new_project.py", "set", *EDIT, folder=tmp_path), "set/control/cat.jpg"
    )
    assert "p0_0.jpg, p0_1.jpg, p0_2.jpg seem to be such images: move them into set/control" in said


def test_a_folder_of_references_with_other_names_is_told(tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    write_photos(tmp_path / "set" / "control", captions=False, stem="q")
    (tmp_path / "set" / "p0_before.jpg").write_bytes((tmp_path / "set" / "p0.jpg").read_bytes())
    said = assert_one_message(*run_here("new_project.py", "set", *EDIT, folder=tmp_path), "cat.jpg")
    assert "set/control: left out. No file there has the name" in said
    assert "p0_before.jpg seem to be" in said


def test_what_is_left_out_or_odd_gets_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_photos(folder, size=300)
    Image.new("RGBA", (300, 300), (9, 9, 9, 0)).save(folder / "cut.png")
    Image.new("RGB", (60, 40)).save(folder / "small.png")
    for name in ("IMG_1.HEIC", "scan.jp2", "empty.jpg", "notes.pdf", "bell.wav"):
        (folder / name).touch()
    write_photos(folder / "c" / "raw" / "deep")
    write_photos(folder / "output")
    (folder / "loop").symlink_to(folder)
    (folder / "scan.txt").touch()
    write_photos(folder / "masks")
    write_clips(folder, count=1, frames=30, width=300, height=300)
    write_media(folder / "heard.mp4", Track())

    words = ["--family", "ltx2", "--task", "av", "--trigger_word", "ohwx"]
    said = run_script("new_project.py", folder, *words).stdout

    for line in (
        "IMG_1.HEIC: left out, this kind is not read; convert them to PNG, or `pip install pillow-heif`",
        "scan.jp2: left out, this kind is not read; convert them to PNG",
        "notes.pdf: left out, neither media nor captions",
        "bell.wav: left out, this kind is not read; audio_directory in dataset.toml takes sounds",
        f"left out: {folder / 'empty.jpg'} is empty",
        f"{folder / 'c' / 'raw' / 'deep'}: left out because it is too deep",
        f'{folder / "masks"}: masks are left out. mask_directory = "masks" in dataset.toml',
        f"{folder / 'output'}: left out. Runs write into a folder of this name",
        "scan.txt: captions without a file",
        f"{folder}: 2 clips and 5 images. ",
        "cut.png: transparent in part",
        "small.png",
        "clip 0.mp4: without sound: only their pictures are used",
        "to download",
    ):
        assert line in said


@pytest.mark.parametrize(("end", "found"), [(".TXT", 3), (".caption", 3), (".jpg.txt", 0)])
def test_captions_of_other_names(end: str, found: int, tmp_path: Path) -> None:
    folder = tmp_path / "10_ohwx"
    write_photos(folder, captions=False)
    photos = sorted(folder.iterdir())
    write_photos(tmp_path / "2024_06", count=1, stem="q")  # in the fewer files
    for path in photos:
        path.with_name(path.stem + end).write_text("a cat", encoding="utf-8")
    (folder / "Thumbs.db").touch()
    (folder / "gone.jpg").symlink_to("nowhere.jpg")

    said = run_script("new_project.py", tmp_path, "--family", "lumina", "--trigger_word", "ohwx").stdout

    assert "gone.jpg is a link to nowhere.jpg, which does not exist" in said
    assert "10_ohwx: by its name, each file is trained 10 times an epoch" in said
    assert "2024_06: by its name" not in said
    told = f"q0.txt: left out, captions are read from {end} files. Rename them"
    assert (told in said and 'caption_extension = ".txt"' in said) is (end == ".caption")
    assert "Thumbs" not in said
    name, stem = photos[0].name, photos[0].stem
    assert (f"{name}.txt seems to be that of {name}: call it {stem}.txt" in said) is (found == 0)
    table, other = load_dataset_config(tmp_path / "dataset.toml").datasets
    assert (table.captions.caption_extension, table.captions.class_tokens is None) == (
        end if found else ".txt",
        found == 3,
    )
    assert (table.learning.num_repeats, other.learning.num_repeats) == (10, 1)


@pytest.mark.parametrize("words", ["12", "12GB", "12 GB", "12gib", "=12G", "=12 GiB"])
def test_memory_is_read_as_people_write_it(words: str, tmp_path: Path) -> None:
    typed = f"--memory{words}" if words[0] == "=" else f"--memory {words}"
    (options,) = parse_options(None, [str(tmp_path), *typed.split(" ")], NewOptions)
    assert options.memory == 12
    (planned,) = parse_options(None, ["--plan", *f"2x{words.lstrip('=')}".split(" ")], PlanOptions)
    assert planned.plan == "2x12"


def test_the_reason_is_told_if_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "film.mp4").write_bytes(b"no film")
    told = run_here("new_project.py", "set", "--family", "wan", "--task", "t2v-14B", folder=tmp_path)
    assert_one_message(*told, "no clip and no image", "film.mp4")


@pytest.mark.parametrize("word", [None, "ohwx"])
def test_pictures_without_captions_get_the_word_or_both_ways_out(word: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write_photos(folder, captions=False)
    words = ["--family", "zimage", "--task", "turbo", "--max_train_steps", "7"]
    words += ["--trigger_word", word] if word else []

    said = run_script("new_project.py", folder, *words).stdout

    (table,) = load_dataset_config(folder / "dataset.toml").datasets
    assert table.captions.class_tokens == word
    assert "was distilled to few steps" in said
    assert "--training_adapter" in said
    assert all(("--s 8" in line) for line in (folder / "prompts.txt").read_text("utf-8").splitlines())
    ways = ("tools/caption_dataset.py --dataset_config dataset.toml", "--max_train_steps 7 --overwrite")
    assert all((way in said) is (word is None) for way in ways)


@pytest.mark.parametrize(("family", "task"), [("fibo_2", "dev"), ("zimage", "base")])
def test_captions_are_written_in_the_form_that_the_model_was_trained_with(
    family: str, task: str, tmp_path: Path
) -> None:
    write_photos(tmp_path / "set", captions=False)
    said = run_script("new_project.py", tmp_path / "set", "--family", family, "--task", task).stdout

    (line,) = [line for line in said.splitlines() if "tools/caption_dataset.py" in line]
    assert ("--caption_format fibo_2" in line) is (family == "fibo_2")


def test_prompts_are_as_the_page_recommends(tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    expected = {
        "zimage base": "--s 28 --l 4",
        "krea2 turbo": "--s 8 --l 1",
        "hunyuan_image 2.1": "--s 50",
        "chroma hd": "--n blurry, low quality",
    }
    for model, words in expected.items():
        family, task = model.split()
        run_here("new_project.py", "set", "--family", family, "--task", task, "--overwrite", folder=tmp_path)
        (first, *_) = (tmp_path / "set" / "prompts.txt").read_text(encoding="utf-8").splitlines()
        assert first == f"make it blue, in falling snow --w 288 --h 288 {words} --d 1"
    values = parse_toml((tmp_path / "set" / "run.toml").read_text(encoding="utf-8"))["training"]
    assert "validation_split" not in values  # of three pictures


@pytest.mark.parametrize(
    ("answers", "model", "word"),
    [
        (["won", "1", "T2V-1.3b", ""], ("wan", "t2v-1.3B"), None),
        (["Kontext", "a\x1bb", "ohwx"], ("flux_kontext", "dev"), "ohwx"),
        (["HV", "mrsfluff"], ("hunyuan_video", "t2v"), "mrsfluff"),
        (["z-image turbo", ""], ("z_image", "turbo"), None),
        (["flux.2", "klein", "4", "ohwx"], ("flux_2", "klein-base-9b"), "ohwx"),
        (["LTX-2", "9", "2", ""], ("ltx_2", "v"), None),
        (["flf2v", ""], ("wan", "flf2v-14B"), None),
        (["krea", "raw", ""], ("krea2", "raw"), None),
        (["krea2-turbo", ""], ("krea2", "turbo"), None),
        (["krea/Krea-2-Raw", ""], ("krea2", "raw"), None),
        (["Z-Image-Turbo", ""], ("z_image", "turbo"), None),
    ],
)
def test_a_terminal_is_asked_until_the_answer_is_right(
    answers: list[str],
    model: tuple[str, str],
    word: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []

    def answer(question: str) -> str:
        shown.append(question)
        return f"{answers.pop(0)}\n"

    monkeypatch.setattr(choosing, "has_terminal", lambda: True)
    monkeypatch.setattr(choosing, "ask_on_terminal", answer)

    chosen = choosing.select_model(NewOptions(folder=tmp_path), 12, reject_before_questions=lambda: None)

    assert ((chosen.model.family, chosen.model.task), chosen.trigger, answers) == (model, word, [])
    assert all(f"{number + 1:<2}  {name}" in shown[0] for number, name in enumerate(FAMILY_NAMES))
    assert not [word for word in ("edits", "sound", " GB ", "fits in 8 bits") if word not in shown[0]]


FAMILY_NAMES = list(dict.fromkeys(one.family for one in find_models()))


def test_a_moved_folder_is_as_good(tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    run_here("new_project.py", "set", "--family", "lumina", folder=tmp_path)
    for name in ("dataset.toml", "prompts.txt", "run.toml"):
        text = (tmp_path / "set" / name).read_text(encoding="utf-8")
        assert str(tmp_path / "set") not in text


def test_a_dry_run_shows_how_the_files_would_change_and_writes_nothing(tmp_path: Path) -> None:
    write_photos(tmp_path / "set")
    words = [tmp_path / "set", "--family", "zimage", "--task", "base", "--memory", "24"]

    said = run_script("new_project.py", *words, "--dry_run").stdout

    assert "+++ dataset.toml as it would be" in said
    assert "+max_train_steps = 2000" in said
    assert not any((tmp_path / "set").glob("*.toml"))
    run_script("new_project.py", *words)
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    said = run_script("new_project.py", *words, "--dry_run", "--output_name", "other").stdout
    assert ('-output_name = "set"' in said, '+output_name = "other"' in said) == (True, True)
    assert "dataset.toml as it would be" not in said
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    said = run_script("new_project.py", *words, "--dry_run").stdout
    assert said.splitlines()[-1] == "Nothing is written: the three files would stay as they are."


def test_masks_next_to_their_pictures_are_named_as_dataset_toml_takes_them(tmp_path: Path) -> None:
    inner = tmp_path / "set" / "my cat"
    write_photos(inner)
    for image in [*inner.glob("*.jpg")]:
        Image.new("L", (300, 300), 255).save(image.with_name(f"{image.stem}-masklabel.png"))
    said = run_script("new_project.py", tmp_path / "set", "--family", "lumina").stdout
    assert 'masks are left out. mask_directory = "my cat" in dataset.toml' in said
    path = tmp_path / "set" / "dataset.toml"
    path.write_text(path.read_text(encoding="utf-8") + 'mask_directory = "my cat"\n', encoding="utf-8")
    (table,) = load_dataset_config(path).datasets
    assert table.source.mask_directory == table.source.directory


def test_a_named_checkpoint_brings_its_own_vae_and_is_not_downloaded_again(tmp_path: Path) -> None:
    write_photos(tmp_path / "p")
    write_tiny_stable_diffusion(tmp_path / "own", "sdxl")
    words = ["p", "--family", "sdxl", "--model_file", f"--ckpt = {tmp_path / 'own' / 'ckpt.safetensors'}"]

    told = run_script("new_project.py", *words, folder=tmp_path)

    run = parse_toml((tmp_path / "p" / "run.toml").read_text("utf-8"))
    assert "--vae: taken from" in told.stdout
    assert "its files are there" in told.stdout
    assert "vae" not in run["training"]
    assert len(run[PROJECT_TABLE]["files"]) == 1
    download, *others = run[PROJECT_TABLE]["commands"]
    assert "--fp8_encoders" not in download
    assert download[download.index("--without") + 1 :][:2] == ["ckpt", "vae"]
    assert not any("--vae" in words for words in others)
    described = read_described(tmp_path / "p")
    assert [*described.model_files] == ["ckpt"]
    vae = tmp_path / "own" / "vae.safetensors"
    run_script("new_project.py", *words, "--model_file", f"vae={vae}", "--overwrite", folder=tmp_path)
    run = parse_toml((tmp_path / "p" / "run.toml").read_text("utf-8"))
    assert Path(run["training"]["vae"]) == vae


@pytest.mark.parametrize(("processor", "memory"), [("AVX2", "0"), ("AVX512", "0"), ("AVX2", "12")])
@pytest.mark.parametrize("family", ["wan", "flux", "sdxl"])
def test_a_cpu_that_is_slow_in_bfloat16_gets_float32_in_all_commands(
    processor: str,
    memory: str,
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    write_photos(tmp_path / "p")
    task = {"wan": "t2v-1.3B", "flux": "dev", "sdxl": "xl"}[family]
    words = [str(tmp_path / "p"), "--family", family, "--task", task, "--memory", memory]

    write_project(parse_options("", words, NewOptions)[0])

    run = parse_toml((tmp_path / "p" / "run.toml").read_text("utf-8"))
    is_slow = (processor, memory) == ("AVX2", "0")
    assert run["training"]["mixed_precision"] == ("no" if is_slow else "bf16")
    assert (run["training"].get("dit_dtype") == "float32") == (is_slow and family != "sdxl")
    _, check, _, latents, texts, _ = run[PROJECT_TABLE]["commands"]
    for command in (check, latents):
        assert ("--vae_dtype" in command) == (is_slow and family != "sdxl")
    assert ("--text_encoder_dtype" in texts) == (is_slow and family != "wan")
    assert ("slower than float32" in capsys.readouterr().out) == is_slow


@pytest.mark.parametrize(
    ("capability", "memory", "train", "precision"),
    [
        ((7, 5), "16", "lora", "fp16"),
        ((7, 5), "0", "lora", "bf16"),
        ((8, 0), "16", "lora", "bf16"),
        ((7, 5), "48", "whole", "bf16"),  # its weights are bfloat16
    ],
)
def test_a_gpu_without_bfloat16_trains_in_float16(
    capability: tuple[int, int],
    memory: str,
    train: str,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    write_photos(tmp_path / "p")
    words = [str(tmp_path / "p"), "--family", "sdxl", "--task", "xl", "--memory", memory, "--train", train]

    write_project(parse_options("", words, NewOptions)[0])

    run = parse_toml((tmp_path / "p" / "run.toml").read_text("utf-8"))
    assert run["training"]["mixed_precision"] == precision
    assert ("has no bfloat16" in capsys.readouterr().out) == (precision == "fp16")


@pytest.mark.parametrize(
    ("family", "task", "right"), [("wan", "ti2v-5B", "wan22"), ("wan22", "t2v-1.3B", "wan")]
)
def test_a_task_of_a_sister_family_names_it(family: str, task: str, right: str, tmp_path: Path) -> None:
    write_photos(tmp_path / "p")

    told = run_here("new_project.py", "p", "--family", family, "--task", task, folder=tmp_path)

    assert told[0] != 0
    assert f"--task {task} is one of --family {right}; {family} has " in told[1]


def test_a_checkpoint_of_another_kind_names_its_scripts_and_its_family(tmp_path: Path) -> None:
    write_photos(tmp_path / "p")
    ckpt = write_sd1(tmp_path)

    told = run_here(
        "new_project.py", "p", "--family", "sdxl", "--model_file", f"ckpt={ckpt}", folder=tmp_path
    )

    assert (
        "train_network.py and sd_generate_image.py; for `new` --family stable_diffusion --task 1.5" in told[1]
    )


@pytest.mark.parametrize(
    "mistyped",
    [
        ["--family", "lumina", "--task", "edit"],
        ["--family", "luminosa"],
        ["--family", "lumina", "--train", "lllite"],
        ["--family", "lumina", "--model_file", "clip=a.safetensors"],
        ["--from", "missing.toml"],
    ],
    ids=["task", "family", "what is trained", "file", "project"],
)
def test_what_is_mistyped_is_told_before_the_files_that_are_there(
    mistyped: list[str], tmp_path: Path
) -> None:
    """It would be told again after the advice to give --overwrite."""
    write_photos(tmp_path / "set")
    run_here("new_project.py", "set", "--family", "lumina", folder=tmp_path)
    before = (tmp_path / "set" / "run.toml").read_bytes()

    told = run_here("new_project.py", "set", *mistyped, folder=tmp_path)

    said = assert_one_message(*told, mistyped[-1])
    assert "--overwrite" not in said
    assert_one_message(
        *run_here("new_project.py", "set", "--family", "lumina", folder=tmp_path), "--overwrite"
    )
    assert (tmp_path / "set" / "run.toml").read_bytes() == before


def test_nobody_is_asked_about_a_folder_whose_files_are_to_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path)
    (tmp_path / "run.toml").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(choosing, "has_terminal", lambda: True)
    monkeypatch.setattr(choosing, "ask_on_terminal", lambda question: pytest.fail(question))

    for family in (None, "flux_2"):  # which has several tasks
        with pytest.raises(OutputError, match=r"run\.toml already exists"):
            write_project(NewOptions(folder=tmp_path, family=family))
