"""tools/regularize.py: the base model of a folder makes images of the class, and `run` trains on them too."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

import project.regularizing as regularizing
import stable_diffusion.family  # noqa: F401  # packages of it warn when they are imported
from dataset.config import load_dataset_config
from modules.errors import DatasetError
from modules.media.reading import image_size
from modules.text_files import parse_toml
from project.regularization import add_regularization, write_class_caption
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.project.test_kinds_of_folders import write_photos
from tests.tiny.new_models import write_new_model

TOOL = "tools/regularize.py"


def describe(root: Path, model: str = "stable_diffusion 1.5") -> Path:
    """Describe a folder of three pictures, one of them wide, for a tiny model."""
    folder = root / "a cät"
    write_photos(folder)
    for number, size in enumerate([(128, 128), (256, 64), (128, 128)]):
        Image.new("RGB", size, "red").save(folder / f"p{number}.jpg")
    (folder / "p0.txt").write_text("zwolf cat on a mat", encoding="utf-8")
    words = write_new_model(model, root / "models")
    more = ("--trigger_word", "zwolf", "--max_train_steps", "2")
    succeed_here("new_project.py", folder, *words, *more, folder=root)
    run = folder / "run.toml"
    run.write_text(run.read_text(encoding="utf-8").replace("sample_at_first = true\n", ""), encoding="utf-8")
    prompts = folder / "prompts.txt"
    text = re.sub("--s [0-9]+|--l [0-9.]+", "", prompts.read_text(encoding="utf-8"))
    prompts.write_text(text.replace("\n", " --s 2 --l 3 --n gray\n"), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("caption", "of_class"),
    [
        ("zwolf, a square", "cat, a square"),
        ("a photo of Zwolf cat", "a photo of cat"),
        ("zwolfs tail", "cat, zwolfs tail"),  # another word
        ("a cat sleeps", "a cat sleeps"),
        ("zwolf\nand zwolf --w 9", "cat and cat w 9"),  # one line, without options
        ("", "cat"),
    ],
)
def test_captions_show_the_class(caption: str, of_class: str) -> None:
    assert write_class_caption(caption, "zwolf", "cat") == of_class


def test_prompts_are_the_captions_in_the_sizes_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = describe(tmp_path)
    before = (folder / "dataset.toml").read_text(encoding="utf-8")
    commands: list[list[str]] = []
    lines: list[str] = []

    def generate(argv: list[str], place: Path) -> int:
        """Stand in for the generation script: all images but the second."""
        assert place == folder
        commands.append(argv)
        lines[:] = Path(argv[argv.index("--from_file") + 1]).read_text(encoding="utf-8").splitlines()
        made = Path(argv[argv.index("--save_path") + 1])
        made.mkdir()
        for line in lines:
            seed = line.rpartition(" ")[2]
            if seed != "43" or len(lines) == 1:
                Image.new("RGB", (64, 64)).save(made / f"20260101-000000_{seed}.png")
        return 0 if len(lines) == 1 else 1

    monkeypatch.setattr(regularizing, "run_command", generate)

    code, said = run_here(TOOL, folder, "--class_word", "cat", folder=tmp_path)

    assert code == 1
    assert lines == [
        "cat on a mat --w 128 --h 128 --d 42",  # 42: the seed of run.toml
        "cat, a square, painted 1 --w 256 --h 64 --d 43",
        "cat, a square, painted 2 --w 128 --h 128 --d 44",
    ]
    (argv,) = commands
    assert argv[:2] == ["python", "sd_generate_image.py"]
    values = dict(zip(argv, argv[1:], strict=False))
    assert values["--pretrained_model_name_or_path"].endswith("ckpt.safetensors")
    assert (values["--sampler"], values["--steps"], values["--guidance_scale"]) == ("euler_a", "2", "3.0")
    assert values["--negative_prompt"] == "gray"
    assert not {"--lora_weight", "--prompt", "--seed", "--image_size"} & {*argv}
    made = folder / "regularization_images"
    assert sorted(path.name for path in made.iterdir()) == ["p0.png", "p0.txt", "p2.png", "p2.txt"]
    assert (folder / "dataset.toml").read_text(encoding="utf-8") == before  # not all of them are there

    succeed_here(TOOL, folder, "--class_word", "cat", folder=tmp_path)  # continues

    assert [line.rpartition(" ")[2] for line in lines] == ["43"]
    assert (made / "p1.txt").read_text(encoding="utf-8") == "cat, a square, painted 1\n"
    own, of_class = load_dataset_config(folder / "dataset.toml").datasets
    assert (own.source.directory, own.learning.is_reg, own.captions.trigger_word) == (Path(), False, "zwolf")
    assert (of_class.source.directory, of_class.learning.is_reg) == (Path("regularization_images"), True)
    assert of_class.captions.trigger_word == ""
    assert of_class.group == own.group
    assert (folder / "dataset.toml.bak").read_text(encoding="utf-8") == before
    after = (folder / "dataset.toml").read_text(encoding="utf-8")
    succeed_here(TOOL, folder, "--class_word", "cat", folder=tmp_path)
    assert len(commands) == 2  # nothing is missing
    assert (folder / "dataset.toml").read_text(encoding="utf-8") == after


def test_each_resolution_of_a_file_with_subsets_gets_them_and_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "dataset.toml"
    table = (
        '[[datasets]]\nresolution = {}\n[[datasets.subsets]]  # mine\nimage_dir = "a"\ncaption_prefix = "x"\n'
    )
    path.write_text(table.format(512) + table.format(768), encoding="utf-8")
    text = add_regularization(path)
    assert text.count("# mine") == 2
    sizes = [
        (table["resolution"], [subset["image_dir"] for subset in table["subsets"]])
        for table in parse_toml(text)["datasets"]
    ]
    assert sizes == [(512, ["a", "regularization_images"]), (768, ["a", "regularization_images"])]
    path.write_text(text, encoding="utf-8")
    assert len({table.cache_directory for table in load_dataset_config(path).datasets}) == 4
    assert add_regularization(path) == text


def test_what_has_no_such_images_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regularizing, "run_command", lambda argv, folder: pytest.fail("it runs"))
    code, said = run_here(TOOL, tmp_path, folder=tmp_path)
    assert code == 2
    assert "--class_word is missing: pass the word for the class" in said
    code, said = run_here(TOOL, tmp_path, "--class_word", "cat", folder=tmp_path)
    assert_one_message(code, said, "Describe the folder first")
    path = tmp_path / "dataset.toml"
    path.write_text('[[datasets]]\nvideo_directory = "a"\n', encoding="utf-8")
    with pytest.raises(DatasetError, match="which have no video_directory"):
        add_regularization(path)


@pytest.mark.slow
def test_a_video_model_is_refused(tmp_path: Path) -> None:
    folder = describe(tmp_path, "wan t2v-1.3B")
    code, said = run_here(TOOL, folder, "--class_word", "cat", folder=tmp_path)
    assert_one_message(code, said, "trains a video model, which has no regularization images")
    assert not (folder / "regularization_images").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stable_diffusion 1.5", "chroma hd", "z_image turbo"])
def test_the_model_makes_images_that_its_training_reads(model: str, tmp_path: Path) -> None:
    folder = describe(tmp_path, model)
    printed = io.StringIO()
    assert run_here(TOOL, folder, "--class_word", "cat", folder=tmp_path, printed=printed)[0] == 0
    assert "3 regularization images made, 0 were there" in printed.getvalue()
    assert re.match("Next: .* run .*a cät", printed.getvalue().splitlines()[-1])
    made = folder / "regularization_images"
    sizes = [image_size(made / f"p{number}.png") for number in range(3)]
    assert sizes == [(128, 128), (256, 64), (128, 128)]
    pixels = {(made / f"p{number}.png").read_bytes() for number in range(3)}
    assert len(pixels) == 3

    succeed_here("run_project.py", folder, folder=tmp_path)

    with safe_open(folder / "output" / "a_cät.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_steps"] == "2"
    if "ss_num_reg_images" in metadata:  # of trainers in the form of sd-scripts
        assert (metadata["ss_num_train_images"], metadata["ss_num_reg_images"]) == ("3", "3")
    assert len([*(folder / "cache" / "images" / "regularization_images").glob("p*.safetensors")]) == 6
