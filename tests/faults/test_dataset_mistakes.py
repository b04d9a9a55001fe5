"""Mistakes that users make with dataset files: one short message each, before any model is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dataset.config import load_dataset_config
from modules.command import quote_for_shell
from modules.errors import DatasetError
from tests.dataset.making import make_clip, make_image
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.wan_encoders import t5_tensors, vae_tensors, write_tokenizer

CONFIG = """[general]
resolution = [32, 32]
caption_extension = ".txt"
enable_bucket = true
batch_size = 1

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [5]
"""
SECOND = '\n[[datasets]]\nvideo_directory = "more"\ncache_directory = "cache 2"\n'
LATENTS = ("wan_cache_latents.py", "--vae", "model/vae.safetensors", "--vae_dtype", "float32")
TEXTS = ("wan_cache_text_encoder_outputs.py", "--t5", "model/t5.safetensors")
MAX_LINES = 4  # of a message about one mistake

# what is replaced in dataset.toml, by what, and what the message has to hold
IN_THE_FILE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "huge side": ("[32, 32]", "100000", ("resolution = 100000", "at most 16384")),
    "huge area": ("[32, 32]", "[16384, 16384]", ("[16384, 16384]", "33,177,600 pixels")),
    "size as a text": ("[32, 32]", '"512x512"', ('"512x512" (text)', "[960, 544]")),
    "one side": ("[32, 32]", "[32]", ("resolution = [32]",)),
    "smaller than a bucket": ("[32, 32]", "[8, 8]", ("resolution = [8, 8]", "16x16")),
    "no multiple": ("enable_bucket = true\n", "", ("[40, 40] is not a multiple of 16", "enable_bucket")),
    "None": ("[32, 32]", "None", ("TOML has no null", "line 2")),
    "True": ("true", "True", ("true or false, in lower case", "line 4")),
    "a switch in quotes": ("true", '"true"', ("without quotes",)),
    "text without quotes": ('".txt"', "txt", ("A text needs quotes", "line 3")),
    "curly quotes": ('".txt"', "\u201c.txt\u201d", ("straight quotes",)),
    "backslashes": ('"clips"', '"C:\\data\\clips"', ("forward slashes or single quotes",)),
    "a colon": ("resolution =", "resolution:", ("joined with =", "line 2")),
    "a key twice": ("batch_size = 1", "batch_size = 1\nbatch_size = 2", ("line 6", "remove one of the two")),
    "one bracket": ("[[datasets]]", "[datasets]", ("[[datasets]]", "needs double brackets")),
    "two brackets": ("[general]", "[[general]]", ("write [general]",)),
    "two general tables": ("[[datasets]]", "[general]\n[[datasets]]", ("may occur once", "join the tables")),
    "misspelt table": ("[[datasets]]", "[[dataset]]", ("Did you mean datasets?",)),
    "key of the folder misspelt": ("video_directory", "video_dir", ("Did you mean video_directory?",)),
    "key in the wrong table": ("batch_size", "target_frames", ("only in a [[datasets]] table",)),
    "key of subsets": ("batch_size", "shuffle_caption", ("is a key of tables with [[datasets.subsets]]",)),
    "key of subsets in a table": (
        *("[5]", "[5]\ncaption_tag_dropout_rate = 0.1"),
        ("caption_tag_dropout_rate = 0.1 is a key of tables with [[datasets.subsets]]",),
    ),
    "extension without a dot": ('".txt"', '"txt"', ("with its dot",)),
    "batch as a text": ("= 1", '= "4"', ('batch_size = "4" (text)', "a whole number, 1 or more")),
    "batch as a switch": ("= 1", "= true", ("batch_size = true (true or false)",)),
    "repeats to fill a memory": (
        *("batch_size = 1", "num_repeats = 1000000000"),
        ("1000000000", "at most 100000"),
    ),
    "no frames": ("[5]", "[0]", ("target_frames = [0]",)),
    "spans to fill a memory": ("[5]", "[5]\nframe_sample = 1000000000", ("1000000000", "at most 10000")),
    "no spans": ("[5]", "[]", ("target_frames = [] (a list)",)),
    "unknown mode": ("[5]", '[5]\nframe_extraction = "heads"', ('Did you mean "head"?',)),
    "no rate": ("[5]", "[5]\nsource_fps = 0", ("source_fps = 0",)),
    "key of images": (
        *("[5]", "[5]\nfp_1f_target_index = 1"),
        ("fp_1f_target_index = 1 is for image tables", "video_directory makes this one videos"),
    ),
    "places beyond all": (
        *("[5]", f"[5]{SECOND.replace('video', 'image')}fp_1f_target_index = {10**20}"),
        ("fp_1f_target_index = 1000", "a whole number below 10000"),
    ),
    "two sources": ('"clips"', '"clips"\nimage_directory = "clips"', ("exclude each other",)),
    "no source": ("video_directory", "#", ("video_directory", "missing")),
    "near folder": ('"clips"', '"clip"', ("clip: No such file", "Did you mean clips?")),
    "far folder": ('"clips"', '"/nowhere/at all"', ("nowhere", "Correct the path")),
    "a file as folder": ('"clips"', '"clips/a.mp4"', ("a.mp4", "Not a directory")),
    "empty folder": ('"clips"', '"empty"', ("has no videos (it is empty",)),
    "only folders": ('"clips"', '"."', ("has no videos", "folders inside it are not searched")),
    "pictures": ('"clips"', '"pictures"', ("no videos but 2 images", "image_directory")),
    "cache is a file": ('"cache"', '"clips/a.mp4"', ("cache_directory", "a.mp4 is a file", "folder")),
    "no control": ("[5]", '[5]\ncontrol_directory = "controls"', ("controls", "Did you mean control?")),
    "control of other names": ("[5]", '[5]\ncontrol_directory = "pictures"', ("no control clip for a.mp4",)),
    "a shared cache": ("[5]", f"[5]{SECOND.replace('cache 2', 'cache')}", ("share the cache directory",)),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("clips", "pictures", "empty", "more", "control"):
        (folder / name).mkdir()
    (folder / "model").mkdir()
    save_file(vae_tensors(), folder / "model" / "vae.safetensors")
    save_file(t5_tensors(), folder / "model" / "t5.safetensors")
    write_tokenizer(folder / "model")
    make_clip(folder / "clips" / "a.mp4", 5)
    for path in ("clips/b.mp4", "clips/c.mp4", "more/d.mp4"):
        shutil.copy(folder / "clips" / "a.mp4", folder / path)
    for path in ("clips/a", "clips/b", "clips/c", "more/d"):
        (folder / f"{path}.txt").write_text("a square", encoding="utf-8")
    make_image(folder / "pictures" / "p.png")
    make_image(folder / "pictures" / "q.png")
    return folder


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    (tmp_path / "dataset.toml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def told(folder: Path, command: tuple[str, ...], *words: str, more: tuple[str, ...] = ()) -> str:
    code, said = run_here(*command, "--dataset_config", "dataset.toml", *more, folder=folder)
    message = assert_one_message(code, said, *words, remedy=False)
    assert len(message.splitlines()) <= MAX_LINES, message
    assert not list(folder.rglob("*_wan*.safetensors"))
    return message


@pytest.mark.parametrize("mistake", IN_THE_FILE)
def test_a_mistake_in_the_configuration_is_one_short_message(mistake: str, folder: Path) -> None:
    old, new, words = IN_THE_FILE[mistake]
    assert old in CONFIG
    text = CONFIG.replace(old, new, 1)
    if mistake == "no multiple":
        text = text.replace("[32, 32]", "40")
    (folder / "dataset.toml").write_text(text, encoding="utf-8")

    told(folder, LATENTS, *words)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_a_configuration_in_another_encoding_is_told_with_it(encoding: str, folder: Path) -> None:
    content = f"# für die Schönheit der Küste\n{CONFIG}".encode(encoding)
    (folder / "dataset.toml").write_bytes(content)

    told(
        folder, LATENTS, "not UTF-8", "UTF-16" if encoding == "utf-16" else "Windows-1252", "Save it as UTF-8"
    )


def test_a_byte_order_mark_is_no_mistake(folder: Path) -> None:
    (folder / "dataset.toml").write_text(CONFIG, encoding="utf-8-sig")

    succeed_here(*LATENTS, "--dataset_config", "dataset.toml", folder=folder)


@pytest.mark.parametrize("name", ["nowhere.toml", "clips", "dataset.yaml", "dataset"])
def test_a_configuration_that_cannot_be_read_is_named(name: str, folder: Path) -> None:
    (folder / "dataset.yaml").write_text(CONFIG, encoding="utf-8")

    told(folder, LATENTS, name, more=("--dataset_config", name))


def test_faults_of_two_tables_are_told_together(folder: Path) -> None:
    text = CONFIG.replace("target_frames", "target_frame") + SECOND + "numrepeats = 2\n"
    (folder / "dataset.toml").write_text(text, encoding="utf-8")

    told(folder, LATENTS, "[[datasets]] 1", "Did you mean target_frames?", "[[datasets]] 2", "num_repeats")


def test_a_json_file_with_a_comma_too_many_is_told_with_its_place(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"datasets": [{"video_directory": "clips",}]}', encoding="utf-8")

    told(folder, LATENTS, "not valid JSON", "line 1", more=("--dataset_config", "dataset.json"))


# --- captions and lists -------------------------------------------------------------------------------------


def write_list(folder: Path, content: bytes) -> None:
    (folder / "list.jsonl").write_bytes(content)
    text = CONFIG.replace('video_directory = "clips"', 'video_jsonl_file = "list.jsonl"')
    (folder / "dataset.toml").write_text(text, encoding="utf-8")


def two_encodings(folder: Path) -> None:
    (folder / "clips" / "a.txt").write_bytes("девушка в красном платье".encode("cp1251"))
    (folder / "clips" / "b.txt").write_bytes("赤いドレスを着た女性".encode("cp932"))


def no_captions(folder: Path) -> None:
    (folder / "clips" / "a.txt").unlink()
    (folder / "clips" / "c.txt").unlink()


def no_extension(folder: Path) -> None:
    (folder / "dataset.toml").write_text(CONFIG.replace('caption_extension = ".txt"', ""), encoding="utf-8")


def caption_is_a_folder(folder: Path) -> None:
    (folder / "clips" / "a.txt").unlink()
    (folder / "clips" / "a.txt").mkdir()


def two_bad_lines(folder: Path) -> None:
    good = json.dumps({"video_path": "clips/a.mp4", "caption": "a"})
    write_list(folder, f"{good}\n\n{{'video_path': 1}}\n{good},\n".encode())


def without_caption(folder: Path) -> None:
    write_list(folder, json.dumps({"video_path": "clips/a.mp4"}).encode())


IN_TEXTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "captions in other encodings": (
        two_encodings,
        (
            "2 have a caption that cannot be used",
            "a.txt",
            "Windows-1251",
            "девушка",
            "b.txt",
            "Shift-JIS",
            "赤い",
            "--repair_captions",
        ),
    ),
    "no captions": (no_captions, ("2 of 3 captions are missing", "no a.txt", "no c.txt")),
    "no extension": (no_extension, ("caption_extension",)),
    "a folder": (caption_is_a_folder, ("a.txt", "Is a directory")),
    "two bad lines": (two_bad_lines, ("2 lines", "line 3", "line 4", "there is a comma after the object")),
    "a line without a caption": (without_caption, ('no "caption" in its line',)),
    "a list in UTF-16": (lambda folder: write_list(folder, "{}".encode("utf-16")), ("UTF-16", "list.jsonl")),
    "an empty list": (lambda folder: write_list(folder, b""), ("has no lines",)),
}


@pytest.mark.parametrize("mistake", IN_TEXTS)
def test_a_mistake_in_captions_is_told_before_the_encoder_is_opened(mistake: str, folder: Path) -> None:
    make, words = IN_TEXTS[mistake]
    make(folder)

    told(folder, TEXTS, *words)


def test_latent_caching_warns_of_missing_captions(folder: Path) -> None:
    no_captions(folder)

    _, said = run_here(*LATENTS, "--dataset_config", "dataset.toml", folder=folder)

    assert "2 of 3 have no caption, and text caching needs one for each. The first: " in said
    assert "no a.txt next to it" in said


OTHER_TRAINER_FILES = {
    "dp.toml": ("[[directory]]\npath = 'clips'\n", "diffusion-pipe", "[[directory]] is [[datasets]]"),
    "a.toml": ("[[datasets]]\nfolder_path = 'clips'\n", "AI Toolkit", "caption_extension"),
    "a.yaml": ("job: x\n", "AI Toolkit", "folder_path is image_directory"),
    "s.json": ('[{"instance_data_dir": "clips"}]', "SimpleTuner", "num_repeats"),
    "o.json": ('{"concepts": [{"path": "clips"}]}', "OneTrainer", "[[datasets]]"),
}


@pytest.mark.parametrize("name", OTHER_TRAINER_FILES)
def test_a_file_of_another_trainer_is_translated(name: str, tmp_path: Path) -> None:
    text, *words = OTHER_TRAINER_FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError) as raised:
        load_dataset_config(tmp_path / name)
    for word in (*words, "reelsmith.py new FOLDER"):
        assert word in str(raised.value)


@pytest.mark.parametrize(("key", "is_theirs"), [("directory", False), ("folder_path", True)])
def test_the_problems_of_a_file_are_told_whoever_it_is_of(key: str, is_theirs: bool, tmp_path: Path) -> None:
    path = tmp_path / "d.toml"
    path.write_text(f"[[datasets]]\n{key} = 'clips'\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="the source of its items is missing") as raised:
        load_dataset_config(path)
    assert ("seems to be a file of" in str(raised.value)) is is_theirs


FOUND_FROM_THE_FILE = {
    "control": ("[5]", '[5]\ncontrol_directory = "control"', "control"),
    "masks": ("[5]", '[5]\nmask_directory = "control"', "control"),
    "list": ('video_directory = "clips"', 'video_jsonl_file = "rows.jsonl"', "rows.jsonl"),
    "tars": ('video_directory = "clips"', 'video_tars = ["rows.jsonl"]', "rows.jsonl"),
}


@pytest.mark.parametrize("mistake", FOUND_FROM_THE_FILE)
def test_a_relative_path_of_a_file_in_another_folder_is_told_with_both_places(
    mistake: str, folder: Path
) -> None:
    old, new, name = FOUND_FROM_THE_FILE[mistake]
    clips = folder / "clips"
    text = CONFIG.replace(old, new, 1).replace('"clips"', f'"{clips.as_posix()}"')
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    (folder / "rows.jsonl").touch()
    elsewhere = folder / "élse where"
    elsewhere.mkdir()

    vae = folder / "model" / "vae.safetensors"

    code, said = run_here(LATENTS[0], "--vae", vae, "--dataset_config", "../dataset.toml", folder=elsewhere)

    move = quote_for_shell(["cd", str(folder)])
    looked = f"(looked for at {elsewhere / name})"
    assert_one_message(code, said, name, looked, f"first `{move}`", remedy=False)


def test_a_configuration_that_is_not_there_is_told_with_the_place_it_was_looked_for(folder: Path) -> None:
    (folder / "dataset.toml").unlink()
    told(folder, LATENTS, "dataset.toml cannot be read", f"(looked for at {folder / 'dataset.toml'})")
