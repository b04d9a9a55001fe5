"""Reference pictures through the command lines of a model that edits pictures."""

from pathlib import Path

from PIL import Image

from dataset.cache_files import read_entry
from tests.commands import run_script
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import FAMILIES, TinyFamily
from tests.tiny.project import write_image

RUN = ["--max_train_steps", "2", "--seed", "1", "--max_data_loader_n_workers", "0", "--output_dir", "out"]
# of the references of four pictures of 48 x 48: the last has none
NONE = "nothing has a reference: this trains on texts alone"
SIZES = [(48, 48), (80, 33), (80, 40)]


def make(folder: Path, keys: str = "") -> TinyFamily:
    """A tiny model and a data set whose references have sizes of their own."""
    family = next(each for each in FAMILIES if each.name == "kontext")
    family.prepare(folder)
    for path in (folder / "control").iterdir():
        path.unlink()
    for index, size in enumerate(SIZES):
        write_image(folder / "control" / f"picture {index}.png", *size)
    set_keys(folder, keys)
    return family


def set_keys(folder: Path, keys: str) -> None:
    path = folder / "dataset.toml"
    text = path.read_text(encoding="utf-8").split("# keys")[0]
    path.write_text(f"{text}# keys\n{keys}\n", encoding="utf-8")


def sizes_of(folder: Path) -> list[str]:
    """The names of the latents of references, by the order of their pictures."""
    found = sorted((folder / "cache").glob("*_fk.safetensors"))
    names = [[name for name in read_entry(path).named if "control" in name] for path in found]
    return [" ".join(one).removeprefix("latents_control_").removesuffix("_float32") for one in names]


def test_training_tells_references_added_or_dropped_since_caching(tmp_path: Path) -> None:
    family = make(tmp_path)
    dataset, control = tmp_path / "dataset.toml", tmp_path / "control"
    with_control = dataset.read_text(encoding="utf-8")
    without = "".join(line for line in with_control.splitlines(True) if "control_directory" not in line)
    equal = "1 has a reference image that is equal to the image"
    said = run_script(*family.cache_latents, "--check", folder=tmp_path).stdout
    assert equal in said  # of the first, which has its size
    again, command = "flux_kontext_cache_latents.py", [*family.train, *RUN, "--output_name", "x"]
    succeed_here(*family.cache_texts, folder=tmp_path)

    dataset.write_text(without, encoding="utf-8")
    assert NONE in succeed_here(*family.cache_latents, folder=tmp_path)
    assert NONE in succeed_here(*command, folder=tmp_path)
    dataset.write_text(with_control, encoding="utf-8")
    code, said = run_here(*command, folder=tmp_path)
    assert_one_message(code, said, "made with 0 reference images, but now its image has 1", again)
    code, _ = run_here(*command, "--check", folder=tmp_path)
    assert code == 1

    succeed_here(*family.cache_latents, folder=tmp_path)
    dataset.write_text(without, encoding="utf-8")
    code, said = run_here(*command, folder=tmp_path)
    assert_one_message(code, said, "made with reference images", "has no control_directory", again)

    dataset.write_text(with_control, encoding="utf-8")
    control.rename(tmp_path / "gone")  # caches are enough
    succeed_here(*command, folder=tmp_path)


def test_bad_references_cost_their_pictures_alone(tmp_path: Path) -> None:
    family = make(tmp_path, "no_resize_control = true")
    Image.new("RGB", (1, 1)).save(tmp_path / "control/picture 0.png")
    (tmp_path / "control/picture 1.png").write_bytes(b"no picture")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "control/picture 2.png")

    code, said = run_here(*family.cache_latents, folder=tmp_path)

    message = assert_one_message(code, said, "3 of the sources could not be used; all others are done")
    for index, why in enumerate(
        ("1x1 pixels, each side needs at least 16", "not an image that can be read", "134 million pixels")
    ):
        assert f"a reference image of picture {index}.png cannot be used" in message
        assert why in message
    assert sizes_of(tmp_path) == [""]


def test_a_model_without_references_refuses_the_keys(tmp_path: Path) -> None:
    family = next(each for each in FAMILIES if each.name == "hunyuan_image")
    family.prepare(tmp_path)
    set_keys(tmp_path, "control_resolution = 64")

    for command in (family.cache_latents, family.cache_texts, [*family.train, *RUN, "--output_name", "x"]):
        code, said = run_here(*command, folder=tmp_path)

        assert_one_message(code, said, "control_resolution: this model resizes control images")
