"""Pictures with their layers: which file is whose, what is refused, and how they are read."""

import io
from pathlib import Path

import numpy
import pytest
from PIL import Image

from dataset.config import load_dataset_config
from dataset.listing import find_sources
from dataset.sources.decoding import decode_source
from dataset.sources.layers import check_layers
from dataset.sources.numbering import find_number_gaps
from dataset.table import DatasetTable
from modules.errors import DatasetError, MediaError
from tests.faults.messages import run_here


def write(path: Path, color: int = 0, alpha: int | None = 0, size: tuple[int, int] = (48, 32)) -> None:
    """Write a picture of one color. alpha: None for one without."""
    pixels = numpy.full((size[1], size[0], 4), color, numpy.uint8)
    pixels[..., 3] = 255 if alpha is None else alpha
    Image.fromarray(pixels).convert("RGB" if alpha is None else "RGBA").save(path)


def read_table(folder: Path, keys: str = "", source: str = 'image_directory = "{}"') -> DatasetTable:
    path = folder / "data.toml"
    lines = ["[general]", "resolution = [48, 32]", 'caption_extension = ".txt"', "[[datasets]]"]
    lines += [source.format(folder), f'cache_directory = "{folder}"', "multiple_target = true", keys]
    path.write_text("\n".join(lines), encoding="utf-8")
    (table,) = load_dataset_config(path).datasets
    return table


def caption(folder: Path, *stems: str) -> None:
    for stem in stems:
        (folder / f"{stem}.txt").write_text("a cat")


def layers_of(table: DatasetTable) -> dict[str, list[str]]:
    return {source.stem: [path.name for path in source.layers] for source in find_sources(table)}


def test_layers_belong_to_the_picture_whose_name_they_continue_in_the_order_of_their_numbers(
    tmp_path: Path,
) -> None:
    for name in ("a ü", "a ü_1", "a ü_2", "a ü_10", "a ü_9", "a ü_9_1", "b_x", "b_x_1"):
        write(tmp_path / f"{name}.png")
    caption(tmp_path, "a ü", "a ü_9", "b_x")  # a picture of its own has a caption

    found = layers_of(read_table(tmp_path))

    assert found == {
        "a ü": ["a ü_1.png", "a ü_2.png", "a ü_10.png"],
        "a ü_9": ["a ü_9_1.png"],
        "b_x": ["b_x_1.png"],
    }


def test_a_picture_without_layers_is_a_fault(tmp_path: Path) -> None:
    for name in ("a", "a_1", "b"):
        write(tmp_path / f"{name}.png")
    caption(tmp_path, "a", "b")
    with pytest.raises(DatasetError, match=r"b.png: it has no layers, such as b_1.png"):
        find_sources(read_table(tmp_path))


def test_two_files_of_one_layer_are_a_fault(tmp_path: Path) -> None:
    for name in ("a.png", "a_1.png", "a_1.webp"):
        write(tmp_path / name)
    caption(tmp_path, "a")
    with pytest.raises(DatasetError, match="two files are named a_1. Keep one"):
        find_sources(read_table(tmp_path))


@pytest.mark.parametrize("first", ["image_path", "image_path_0"])
def test_a_list_names_the_picture_and_its_layers_by_number(tmp_path: Path, first: str) -> None:
    for name in ("a", "x", "y"):
        write(tmp_path / f"{name}.png")
    line = f'{{"{first}": "a.png", "image_path_10": "y.png", "image_path_2": "x.png", "caption": "c"}}'
    (tmp_path / "list.jsonl").write_text(line)

    table = read_table(tmp_path, source='image_jsonl_file = "{}/list.jsonl"')

    assert layers_of(table) == {"a": ["x.png", "y.png"]}


def test_a_picture_and_its_layers_are_read_as_frames_with_alpha(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 10, None, size=(96, 64))
    write(tmp_path / "a_1.png", 20, 255, size=(96, 64))
    write(tmp_path / "a_2.png", 30, 128, size=(96, 64))
    caption(tmp_path, "a")
    (source,) = find_sources(read_table(tmp_path))

    media = decode_source(source, 1.0, has_alpha=True)

    assert media.frames.shape == (3, 32, 48, 4)
    assert media.spans == ((0, 3),)
    assert media.frames[:, 0, 0].tolist() == [[10, 10, 10, 255], [20, 20, 20, 255], [30, 30, 30, 128]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"alpha": None}, "a_2.png is opaque, so it hides the layers below it"),
        ({"size": (32, 32)}, "a_2.png has 32x32 pixels, but its image, .*a.png, has 48x32"),
    ],
)
def test_layers_that_cannot_be_are_refused(tmp_path: Path, second: dict[str, int], message: str) -> None:
    write(tmp_path / "a.png", alpha=None)
    write(tmp_path / "a_1.png", alpha=None)  # the lowest one may be opaque
    write(tmp_path / "a_2.png", **second)  # type: ignore[arg-type]
    caption(tmp_path, "a")
    (source,) = find_sources(read_table(tmp_path))
    with pytest.raises(MediaError, match=message):
        decode_source(source, 1.0, has_alpha=True)


@pytest.mark.parametrize("name", ["a_2.png", "a_3.png"])
def test_check_finds_a_layer_that_hides_others_before_anything_is_cached(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a.png", alpha=None)
    for number in (1, 2, 3):
        write(tmp_path / f"a_{number}.png", alpha=255 if f"a_{number}.png" == name else 9)
    caption(tmp_path, "a")
    read_table(tmp_path)

    words = ["--model_version", "layered", "--dataset_config", "data.toml", "--check"]
    printed = io.StringIO()
    code, _ = run_here("qwen_image_cache_latents.py", *words, folder=tmp_path, printed=printed)

    assert code == 1
    assert f"{name} is opaque, so it hides the layers below it" in printed.getvalue()


@pytest.mark.parametrize(
    ("names", "gap"),
    [("a_1 a_3", "a_2"), ("a_0 a_1 a_3", "a_2"), ("a_2 a_3", "a_1"), ("a_1 a_2", ""), ("a_0 a_1", "")],
)
def test_a_number_that_layers_leave_out_is_told(names: str, gap: str, tmp_path: Path) -> None:
    for name in ("a", *names.split()):
        write(tmp_path / f"{name}.png")
    caption(tmp_path, "a")

    remarks = [one.text for one in find_number_gaps(find_sources(read_table(tmp_path)))]

    last = names.split()[-1]
    assert remarks == ([f"{tmp_path / 'a.png'}: there is no {gap}, but {last}"] if gap else [])


@pytest.mark.parametrize("column", ["image_path", "control_path"])
def test_a_number_that_a_list_leaves_out_is_told(
    column: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "x", "y"):
        write(tmp_path / f"{name}.png")
    line = f'{{"image_path": "a.png", "{column}_1": "x.png", "{column}_3": "y.png", "caption": "c"}}'
    (tmp_path / "list.jsonl").write_text(line)
    table = read_table(tmp_path, source='image_jsonl_file = "{}/list.jsonl"')
    if column == "control_path":
        table = table.with_values(multiple_target=False)

    find_sources(table)

    assert f"there is no {column}_2, but {column}_3" in caplog.text


@pytest.mark.parametrize("keys", ["alpha_mask = true", 'worse_directory = "worse"'])
def test_what_layers_exclude_is_refused(tmp_path: Path, keys: str) -> None:
    with pytest.raises(DatasetError, match="cannot be used with multiple_target"):
        read_table(tmp_path, keys)


def test_control_pictures_of_layers_are_refused_before_missing_ones_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    read_table(tmp_path, 'control_directory = "before"')
    with pytest.raises(DatasetError, match="Layered takes no control images.* Omit it"):
        check_layers(load_dataset_config(tmp_path / "data.toml"), True, "Layered")


def test_a_model_and_its_tables_agree_about_layers(tmp_path: Path) -> None:
    read_table(tmp_path)
    config = load_dataset_config(tmp_path / "data.toml")

    check_layers(config, True, "Layered")
    with pytest.raises(DatasetError, match="Krea does not learn layers. Omit it"):
        check_layers(config, False, "Krea")
    (tmp_path / "data.toml").write_text(
        (tmp_path / "data.toml").read_text().replace("multiple_target = true", "")
    )
    with pytest.raises(DatasetError, match="Set multiple_target = true"):
        check_layers(load_dataset_config(tmp_path / "data.toml"), True, "Layered")
