"""`new --train`: a described folder trains a control network or an embedding, and `run` does it."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open

import stable_diffusion.family  # noqa: F401  # packages of it warn when they are imported
from checkpoints.writing import save_tensors
from data_tools.controls.run import ControlImageOptions, make_control_images
from modules.script_options import parse_options
from modules.text_files import parse_toml
from project.kinds.composing import BY_NAME, find_control_kind, list_kinds
from project.model_choice import _make_family_for_caching, read_model_info
from project.model_sizes import list_transformers, needs_image
from project.options import KIND_NAMES, RUN_FILE, find_models
from project.running import _list_run_scripts
from project.varied_captions import STYLES, make_captions
from tests.commands import ROOT
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.project.test_kinds_of_folders import write_photos
from tests.tiny.new_models import write_new_model
from training.config_options import PROJECT_TABLE

# of each script one model and kind that is no LoRA and no whole model
CASES: dict[Path, tuple[str, str]] = {}
for _model in find_models():
    for _kind in list_kinds(_model):
        if _kind.uses_control_images or (
            _kind.trains_embedding and _kind.switch not in _kind.find_training_command(_model)
        ):
            _script = _kind.find_script(_model)
            assert _script is not None
            CASES.setdefault(_script, (f"{_model.family} {_model.task}", _kind.name))
WORD = "zorb"


def write_pairs(folder: Path, place: str = "conditioning") -> None:
    write_photos(folder)
    write_photos(folder / place, captions=False)


def describe(folder: Path, name: str, *words: str) -> str:
    """Describe a folder for a model, `sd xl`, whose files are not there. Returns what is printed."""
    family, task = name.split()
    chosen = ["--family", family, "--task", task, "--memory", "24"]
    printed = io.StringIO()
    told = run_here("new_project.py", folder, *chosen, *words, folder=folder.parent, printed=printed)
    assert told == (0, "")
    return printed.getvalue()


def read_run(folder: Path) -> dict[str, Any]:
    return parse_toml((folder / RUN_FILE).read_text(encoding="utf-8"))


def test_kinds_are_those_of_the_models_that_have_a_script() -> None:
    kinds = {
        f"{model.family} {model.task}": [kind.name for kind in list_kinds(model)] for model in find_models()
    }
    assert kinds["stable_diffusion xl"] == ["lora", "lllite", "controlnet", "embedding", "whole"]
    assert kinds["z_image turbo"] == ["lora", "adapter", "embedding", "whole"]
    assert kinds["z_image turbo-adapter"] == ["lora"]
    assert kinds["stable_diffusion 1.5"] == ["lora", "controlnet", "embedding", "whole"]
    assert kinds["anima base"] == ["lora", "lllite", "lllite_inpainting", "embedding", "whole"]
    assert kinds["z_image base"] == ["lora", "embedding", "whole"]
    assert kinds["qwen_image edit"] == ["lora", "whole"]
    default = {name: find_control_kind(model) for model in find_models() for name in [model.task]}
    assert (default["xl"], default["1.5"]) == (BY_NAME["lllite"], BY_NAME["controlnet"])
    assert tuple(BY_NAME) == KIND_NAMES
    assert len(CASES) == 6
    assert {*CASES} <= _list_run_scripts()


@pytest.mark.parametrize("script", CASES, ids=lambda script: script.stem)
def test_its_script_takes_what_is_written(script: Path, tmp_path: Path) -> None:
    name, kind = CASES[script]
    folder = tmp_path / "photos"
    write_pairs(folder)

    describe(folder, name, "--train", kind, "--trigger_word", WORD)
    code, said = run_here(str(script), "--config_file", RUN_FILE, "--check", folder=folder)

    assert code == 1  # nothing is cached, and no file of the model is there
    known = "no such file", " downloads it.", "it gives no rights"
    assert not [line for line in said.splitlines() if not any(words in line for words in known)]
    run = read_run(folder)
    assert run[PROJECT_TABLE]["commands"][-1] == ["python", script.name, "--config_file", RUN_FILE]
    values = run["training"]
    assert not [key for key in values if key in {"network_module", "network_alpha", "lora_format"}]
    (table,) = parse_toml((folder / "dataset.toml").read_text(encoding="utf-8"))["datasets"]
    samples = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    if BY_NAME[kind].trains_embedding:
        assert (values["token_string"], values["output_name"]) == (WORD, WORD)
        assert "control_directory" not in table
        assert samples
        assert all(line.startswith(WORD) for line in samples)
    else:
        assert table["control_directory"] == "conditioning"
        assert [re.findall(r"--cn (\S+)", line) for line in samples] == [
            [f"conditioning/p{number}.jpg"] for number in (0, 1, 2)
        ]


@pytest.mark.parametrize("place", ["conditioning", "../control"])
def test_a_folder_of_pairs_becomes_a_control_network(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "top" / "pairs"
    write_pairs(folder, place)
    said = describe(folder, "sd xl")
    assert "a ControlNet-LLLite learns from its pairs with" in said
    assert "--train lora trains a LoRA without them" in said
    assert read_run(folder)[PROJECT_TABLE]["commands"][-1][1] == "sdxl_train_control_net_lllite.py"
    describe(folder, "sd xl", "--train", "lora", "--overwrite")
    assert read_run(folder)[PROJECT_TABLE]["commands"][-1][1] == "sdxl_train_network.py"


@pytest.mark.parametrize("why", ["other names", "another folder", "pictures", "a word", "of another", "none"])
def test_control_pictures_next_to_a_folder_are_its_own_only_if_nothing_contradicts(
    why: str, tmp_path: Path
) -> None:
    """They may have been drawn of another folder, whose pictures have the same names."""
    folder = tmp_path / "top" / "pairs"
    write_pairs(folder, "../conditioning")
    if why == "other names":
        write_photos(folder, count=1, stem="further")
    elif why == "another folder":
        write_photos(folder.parent / "fluffy")
    elif why == "pictures":
        write_photos(folder.parent, count=1)
    elif why == "of another":
        (folder.parent / "output" / "samples").mkdir(parents=True)  # of a run: that counts as nothing
    words = ["--trigger_word", WORD] if why == "a word" else []

    describe(folder, "sd xl", *words)

    script = read_run(folder)[PROJECT_TABLE]["commands"][-1][1]
    is_control = why in ("of another", "none")
    assert script == ("sdxl_train_control_net_lllite.py" if is_control else "sdxl_train_network.py")


def test_edges_that_are_drawn_leave_other_folders_alone(tmp_path: Path) -> None:
    for name in ("pictures", "fluffy"):
        write_photos(tmp_path / name)
    make_control_images(parse_options("", [str(tmp_path / "pictures"), "--canny"], ControlImageOptions)[0])

    scripts = {}
    for name in ("pictures", "fluffy"):
        describe(tmp_path / name, "sd xl")
        scripts[name] = read_run(tmp_path / name)[PROJECT_TABLE]["commands"][-1][1]

    assert scripts == {"pictures": "sdxl_train_control_net_lllite.py", "fluffy": "sdxl_train_network.py"}


# ten mistakes, each with the sentence that it gets


def assert_rejected(folder: Path, *words: str, told: str) -> None:
    answer = run_here("new_project.py", folder.name, *words, "--memory", "24", folder=folder.parent)
    assert_one_message(*answer, told)
    assert not (folder / RUN_FILE).exists()


SD_XL = ("--family", "sd", "--task", "xl")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*SD_XL, "--train", "lllite"], "no image has one. Put them into "),
        ([*SD_XL, "--train", "lllite_inpainting"], "with --train_inpainting. Omit it to train a LoRA"),
        (
            ["--family", "zimage", "--task", "base", "--train", "lllite_inpainting"],
            "new does not set up a ControlNet-LLLite for inpainting for",
        ),
        ([*SD_XL, "--train", "embedding"], "an embedding is a new word: pass it as --trigger_word"),
        ([*SD_XL, "--train", "embedding", "--word", "Cat"], "--trigger_word 'Cat' has capitals"),
        ([*SD_XL, "--train", "embedding", "--word", "a cat"], "pass one word"),
        ([*SD_XL, "--train", "embedding", "--word", "cat1"], "ends with a digit"),
        ([*SD_XL, "--train", "controlnets"], "controlnet"),
        ([*SD_XL, "--train", "lllite", "--whole_model"], "both say what is trained"),
        (
            ["--family", "zimage", "--task", "base", "--train", "controlnet"],
            "new does not set up a ControlNet for",
        ),
        (
            ["--family", "qwen", "--task", "edit", "--train", "embedding", "--word", "zorb"],
            "reads captions together with images, which cannot train a word",
        ),
    ],
)
def test_a_mistake_gets_a_sentence(words: list[str], told: str, tmp_path: Path) -> None:
    write_photos(tmp_path / "p")
    assert_rejected(tmp_path / "p", *words, told=told)


def test_models_whose_captions_are_read_with_images_learn_no_word() -> None:
    """The list of models says it, as the page asks for each model."""
    for model in find_models():
        rules = _make_family_for_caching(model).references
        sees_images = rules is not None and rules.seen_by_text and needs_image(model)
        sees_frames = model.family == "minimax_h3" and not model.task.startswith("t2")
        reads_ids = model.family == "hidream_o1"  # its caches have no outputs of an encoder to add a word to
        learns_none = model.has_adapter or sees_images or sees_frames or reads_ids
        assert (BY_NAME["embedding"] not in list_kinds(model)) == learns_none, f"{model.family} {model.task}"


@pytest.mark.parametrize("word", ["MrsFluff", "two words"])
def test_a_word_that_cannot_be_is_refused_before_the_model_is_made(word: str, tmp_path: Path) -> None:
    """Making the family loads torch and diffusers' networks, which takes seconds, and minutes under load."""
    write_photos(tmp_path / "p")
    words = [*SD_XL, "--train", "embedding", "--word", word, "--memory", "0"]
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import new_project
try:
    new_project.main(["p", *{words!r}])
except Exception as error:
    print(error)
print("loaded", sorted(sys.modules.keys() & {{"stable_diffusion.family", "diffusers"}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert f"--trigger_word {word!r}" in done.stdout, done.stderr[-2000:]
    assert "loaded []" in done.stdout


def test_an_empty_folder_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    assert_rejected(tmp_path / "p", *SD_XL, "--train", "lllite", told="has no clip and no image")


def test_faults_of_pairs_come_before_the_command_that_trains(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    write_pairs(folder)
    (folder / "conditioning" / "p1.jpg").rename(folder / "conditioning" / "q.jpg")
    said = describe(folder, "sd xl")
    assert f"control media of {folder / 'dataset.toml'}, [[datasets]] 1" in said
    assert "p1" in said
    assert "First fix the problems listed above. Then" in said
    (folder / "p1.jpg").unlink()
    (folder / "p1.txt").unlink()
    said = describe(folder, "sd xl", "--overwrite")
    assert "1 control image without an image of the same name: q.jpg" in said
    assert "First fix the problems listed above. Then" in said


def test_a_control_picture_of_another_shape_is_named(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    Image.new("RGB", (128, 64)).save(tmp_path / "pairs" / "conditioning" / "p1.jpg")
    said = describe(tmp_path / "pairs", "sd xl")
    assert "1 control image with a different aspect ratio than the image" in said
    assert "p1.jpg (128x64 and 64x64)" in said


def test_a_trained_file_of_another_kind_is_not_taken_for_the_result(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    describe(tmp_path / "pairs", "sd xl")
    (tmp_path / "pairs" / "output").mkdir()
    trained = tmp_path / "pairs" / "output" / "pairs.safetensors"
    texts = {"ss_steps": "2000", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    save_tensors(trained, {"a": torch.zeros(1)}, texts)
    answer = run_here("run_project.py", "pairs", folder=tmp_path)
    difference = "belongs to a different model (stable-diffusion-xl-v1-base/lora)"
    assert_one_message(*answer, difference, "output_name")

    of_kind = {**texts, "modelspec.architecture": "stable-diffusion-xl-v1-base/control-net-lllite"}
    save_tensors(trained, {"a": torch.zeros(1)}, of_kind)
    assert run_here("run_project.py", "pairs", folder=tmp_path) == (0, "")


def test_a_packed_folder_takes_its_control_pictures_along(tmp_path: Path) -> None:
    folder = tmp_path / "my pairs"
    write_pairs(folder)
    describe(folder, "sd xl")
    succeed_here("tools/pack.py", folder, folder=tmp_path)
    (tmp_path / "there").mkdir()
    succeed_here("tools/unpack.py", tmp_path / "my pairs-pack.zip", folder=tmp_path / "there")
    there = tmp_path / "there" / "my pairs"
    for name in ("prompts.txt", "dataset.toml", "conditioning/p0.jpg"):
        assert (there / name).read_bytes() == (folder / name).read_bytes()
    printed = io.StringIO()
    assert run_here("run_project.py", there, "--dry_run", folder=tmp_path, printed=printed) == (0, "")
    assert "sdxl_train_control_net_lllite.py --config_file run.toml" in printed.getvalue().replace("'", "")


# from the folder to a picture


def train_as_described(folder: Path, *words: str) -> list[str]:
    """Do what `run` does, with one sample of one step. Returns the words of the command that generates."""
    prompts = folder / "prompts.txt"
    line = prompts.read_text(encoding="utf-8").splitlines()[0]
    prompts.write_text(f"{line} --s 1\n", encoding="utf-8")
    _, *commands, training = read_run(folder)[PROJECT_TABLE]["commands"]
    for command in commands:
        succeed_here(command[1], *command[2:], folder=folder)
    succeed_here(training[1], *training[2:], *words, folder=folder)
    (history,) = (folder / "output").glob("*-history.jsonl")
    rows = [json.loads(row) for row in history.read_text(encoding="utf-8").splitlines()]
    listed = [command for row in rows for command in row.get("commands", ())]
    return shlex.split([line for title, line, *_ in listed if title == "Generate with it"][-1])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("anima base", "lllite"),
        ("anima base", "lllite_inpainting"),
        ("stable_diffusion 1.5", "embedding"),
        ("anima base", "embedding"),
        pytest.param("stable_diffusion 1.5", "controlnet", marks=pytest.mark.slow),
        pytest.param("stable_diffusion xl", "lllite", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_it_and_its_command_generates(name: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "a b ü"
    write_pairs(folder)
    model = write_new_model(name, tmp_path / "models")
    typed = ["--train", kind, "--trigger_word", WORD, "--max_train_steps", "2"]
    assert run_here("new_project.py", folder, *model, *typed, folder=tmp_path) == (0, "")

    _, script, *words = train_as_described(folder)
    if kind == "lllite_inpainting":  # the seed of a sample has drawn its mask; a generation is given one
        words[words.index("MASK")] = str(next((folder / "conditioning").glob("*.jpg")))
    succeed_here(script, *words, folder=folder)

    values = read_run(folder)["training"]
    with safe_open(folder / "output" / f"{values['output_name']}.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "2"
    assert len([*(folder / "output" / "generated").glob("*.png")]) == 1
    printed = io.StringIO()
    assert run_here("run_project.py", folder, folder=tmp_path, printed=printed)[0] == 0
    assert "is trained already: 2 of 2 steps" in printed.getvalue()


def test_the_models_that_an_adapter_can_be_made_for_are_those_that_were_distilled() -> None:
    """The list of models says it, as the page asks for each model."""
    for model in find_models():
        paths = {(part.option or "").lstrip("-"): str(part.path) for part in list_transformers(model)}
        is_distilled = model.has_adapter or read_model_info(model, paths).few_step_advice is not None
        assert bool(model.properties.get("distilled")) == is_distilled, f"{model.family} {model.task}"


def test_an_adapter_of_an_empty_folder_begins_with_varied_captions(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()

    said = describe(folder, "z_image turbo", "--train", "adapter")

    lines = (folder / "own_prompts.txt").read_text(encoding="utf-8").splitlines()
    captions = [line.rpartition(" --d ")[0] for line in lines]
    assert len(set(captions)) == len(lines) == 500
    counts = Counter(word for caption in captions for word in STYLES if caption.endswith(word))
    assert max(counts[word] for word in STYLES) - min(counts[word] for word in STYLES) <= 1
    assert captions == make_captions()
    assert [path.name for path in folder.iterdir()] == ["own_prompts.txt"]
    assert "download --family z_image --task turbo" in said
    assert "--from_file own_prompts.txt --save_path own" in said
    assert describe(folder, "z_image turbo", "--train", "adapter") == said  # again, as nothing is there


def test_what_an_adapter_prints_for_its_own_images_is_typed_as_it_is(tmp_path: Path) -> None:
    """With the models, the memory and the length of this `new`; there it is not advised again."""
    folder, models = tmp_path / "a b \u00fc", tmp_path / "mo dels"
    write_photos(folder)
    words = ["--train", "adapter", "--models", models, "--memory", "0", "--max_train_steps", "100"]

    said = describe(folder, "z_image turbo", *map(str, words))

    # a path with blanks is in quotes
    printed = [shlex.split(line) for line in said.splitlines() if re.search(r"reelsmith\.py'? new ", line)]
    own = folder / "own"
    write_photos(own)  # by another program, whose pictures hold no prompt
    assert [line[2:4] for line in printed] == [["new", str(own)]]
    output = io.StringIO()
    assert run_here("new_project.py", *printed[0][3:], folder=tmp_path, printed=output) == (0, "")
    assert read_run(own)["training"]["max_train_steps"] == 100
    dit = parse_toml((folder / RUN_FILE).read_text(encoding="utf-8"))["training"]["dit"]
    assert read_run(own)["training"]["dit"] == dit
    assert Path(dit).parent == models
    assert "on a CPU" in output.getvalue()
    assert "own_prompts.txt" not in output.getvalue()
    assert not (own / "own_prompts.txt").exists()


def test_an_adapter_of_pictures_without_captions_has_no_prompts_to_make_others(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", captions=False)

    said = describe(tmp_path / "photos", "z_image turbo", "--train", "adapter")

    assert "own_prompts.txt" not in said
    assert not (tmp_path / "photos" / "own_prompts.txt").exists()


def test_an_adapter_learns_the_folder_or_what_the_model_made_of_its_captions(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write_photos(folder)

    said = describe(folder, "z_image turbo", "--train", "adapter")
    values = read_run(folder)["training"]

    assert values["make_adapter"] == "real"
    assert values["output_name"] == "photos_training_adapter_v1"
    assert (values["network_dim"], values["network_alpha"], values["ema_decay"]) == (32, 32, 0.998)
    lines = (folder / "own_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines
    assert all(re.fullmatch(r".+ --d \d+", line) for line in lines)
    assert "--from_file own_prompts.txt --save_path own" in said
    assert "2,000 steps: published adapters took 4,000 to 30,000" in " ".join(said.split())
    assert "With 10 files or more, a tenth is held out" in " ".join(said.split())
    assert "unlearns" not in said
    own = folder / "own"
    own.mkdir()
    for number in range(2):
        text = PngInfo()
        text.add_text("bt_prompt", f"a cat\nnumber {number}")
        Image.new("RGB", (64, 64), (90 * number, 0, 0)).save(own / f"{number}.png", pnginfo=text)

    for number in range(10):  # so many that some are held back
        shutil.copy(own / f"{number % 2}.png", own / f"c{number}.png")

    said = describe(own, "z_image turbo", "--train", "adapter", "--max_train_steps", "4000")

    assert read_run(own)["training"]["validation_split"] == 0.1
    assert "finished when the validation loss no longer falls" in " ".join(said.split())
    assert read_run(own)["training"]["early_stopping_patience"] == 5
    assert "published adapters took" not in said
    assert read_run(own)["training"]["make_adapter"] == "own"
    assert "12 generated files: their prompts are written into .txt files, as captions" in said
    assert (own / "1.txt").read_text(encoding="utf-8") == "a cat\nnumber 1\n"
    describe(folder, "z_image turbo", "--train", "adapter", "--overwrite")
    assert read_run(folder)["training"]["make_adapter"] == "mixed"
    tables = parse_toml((folder / "dataset.toml").read_text(encoding="utf-8"))["datasets"]
    num_real = len([*folder.glob("*.jpg")])
    assert {table["image_directory"]: table.get("num_repeats", 1) for table in tables} == {
        ".": round(12 / num_real),
        "own": 1,
    }


def test_images_are_their_own_control_images_for_inpainting(tmp_path: Path) -> None:
    folder = tmp_path / "a b ü"
    write_pairs(folder)

    said = describe(folder, "anima base", "--train", "lllite_inpainting")

    assert "each step masks a random part to repaint" in said
    assert f"{folder / 'conditioning'}: left out. a ControlNet-LLLite for inpainting learns from the" in said
    content = parse_toml((folder / "dataset.toml").read_text(encoding="utf-8"))
    table: dict[str, Any] = content["datasets"][0]
    if "subsets" in table:
        table = table["subsets"][0]
        assert table["image_dir"] == table["conditioning_data_dir"]
    else:
        assert table["image_directory"] == table["control_directory"]
    run = read_run(folder)
    assert run["training"]["lllite_inpaint_masked_input"] is True
    assert run[PROJECT_TABLE]["commands"][-1][-1] == "--lllite_cond_in_channels=4"
    assert "network_dim" not in run["training"]
