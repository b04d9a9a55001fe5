"""Tags that are written as captions: a tiny tagger's answers are computed by hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_tools.tags.labels import GENERAL, Label, read_labels
from data_tools.tags.model import Tagger, load_tagger
from data_tools.tags.run import TaggingOptions, tag_folder
from data_tools.tags.words import extend_caption, make_tag_selection
from modules import limits
from modules.errors import CheckpointError, DatasetError, OptionError
from modules.media.writing import write_video
from modules.script_options import parse_options
from tests.data_tools.captions.making import everything_in
from tests.data_tools.tags.making import (
    ROWS,
    SIDE,
    first_pixel_weights,
    make_growing_model,
    make_model,
    write_tagger,
)
from tests.dataset.making import make_image
from tests.faults.messages import run_here

# probability of a tag for a picture of one color: red by R, 1girl by G, blue_eyes by B
BY_COLOR = first_pixel_weights(
    red=(0, 0, 1 / 255), **{"1girl": (0, 1 / 255, 0), "blue_eyes": (1 / 255, 0, 0)}
)


def options_of(folder: Path, *words: object) -> TaggingOptions:
    return parse_options("", [str(folder), *map(str, words)], TaggingOptions)[0]


def tag(folder: Path, tagger: Path, *words: object) -> None:
    tag_folder(options_of(folder, "--model_dir", tagger, *words))


def texts_of(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of one color, RGB, in a folder with blanks."""
    images = tmp_path / "a b ü"
    images.mkdir()
    colors = {"red": (255, 0, 0), "pale": (200, 100, 0), "cyan": (0, 255, 255)}
    for name, color in colors.items():
        make_image(images / f"{name}.png", colour=color)
    return images


def load(tagger: Path, batch_size: int = 1, averages_frames: bool = False) -> Tagger:
    return load_tagger(tagger, batch_size, averages_frames, max_frames=8)


def test_tags_are_those_of_the_colours_and_a_second_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    (folder / "red.txt").write_text("by hand", encoding="utf-8")

    tag(folder, tagger, "--remove_underscore", "--batch_size", 2)

    # 100/255 = 0.392 is above 0.35; the order is that of the list
    assert texts_of(folder) == {"red": "by hand", "pale": "1girl, red", "cyan": "1girl, blue eyes"}
    state = everything_in(folder)
    tag(folder, tagger, "--thresh", 0.4)
    assert everything_in(folder) == state
    tag(folder, tagger, "--thresh", 0.4, "--overwrite")
    assert texts_of(folder) == {"red": "by hand", "pale": "red", "cyan": "1girl, blue_eyes"}
    tag(folder, tagger, "--overwrite_all")
    assert texts_of(folder)["red"] == "red"
    assert (folder / "red.txt.bak").read_text(encoding="utf-8") == "by hand"


def test_a_probability_equal_to_the_threshold_is_enough(folder: Path, tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", first_pixel_weights(red=(0, 0, 2**-9)))
    make_image(folder / "half.png", colour=(128, 0, 0))
    with pytest.raises(DatasetError, match=r"1 of 4 got no caption(.|\n)*as probable as --thresh"):
        tag(folder, tagger, "--general_threshold", 0.25)
    assert texts_of(folder) == dict.fromkeys(("half", "red", "pale"), "red")


@pytest.mark.parametrize("batch", ["N", 2])
def test_probabilities_are_the_runtimes_own(tmp_path: Path, batch: int | str) -> None:
    import onnxruntime

    numbers = np.random.default_rng(0)
    weights = numbers.random((SIDE * SIDE * 3, len(ROWS)), np.float32) / 10_000
    tagger = load(write_tagger(tmp_path / "tagger", weights, batch), batch_size=2)
    frames = [numbers.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(4)]

    found = tagger.predict_probabilities([tagger.pad_and_resize(frame) for frame in frames])

    session = onnxruntime.InferenceSession(str(tmp_path / "tagger" / "model.onnx"))
    for start in (0, 2):
        images = np.stack([frame[..., ::-1].astype(np.float32) for frame in frames[start : start + 2]])
        (expected,) = session.run(None, {"picture": images})
        assert np.array_equal(found[start : start + 2], expected)
    odd = tagger.predict_probabilities([tagger.pad_and_resize(frame) for frame in frames[:3]])
    assert odd.shape == (3, len(ROWS))
    np.testing.assert_allclose(odd, found[:3], rtol=1e-6)


def test_a_picture_lies_in_the_middle_of_white_in_bgr(tmp_path: Path) -> None:
    tagger = load(write_tagger(tmp_path / "tagger", BY_COLOR))
    wide = np.zeros((2, SIDE, 3), np.uint8)
    wide[..., 0] = 10

    square = tagger.pad_and_resize(wide)

    assert square[1:3].tolist() == [[[0, 0, 10]] * SIDE] * 2
    assert np.all(square[[0, 3]] == 255)
    assert tagger.to_model_input(square).dtype == np.float32
    assert tagger.to_model_input(square)[1, 0].tolist() == [0, 0, 10]
    assert tagger.pad_and_resize(np.full((9, 9, 3), 7, np.uint8)).tolist() == [[[7] * 3] * SIDE] * SIDE
    assert tagger.pad_and_resize(np.full((2, 2, 3), 7, np.uint8)).tolist() == [[[7] * 3] * SIDE] * SIDE


def test_a_mapping_means_logits_and_colours_around_zero(tmp_path: Path) -> None:
    weights = first_pixel_weights(red=(0, 0, 3), **{"1girl": (0, 1, 0)})
    tagger = tmp_path / "tagger"
    tagger.mkdir()
    # channels first: the rows of the first pixel are those of its channels
    rows = np.zeros_like(weights)
    rows[[0, SIDE * SIDE, 2 * SIDE * SIDE]] = weights[:3]
    (tagger / "model.onnx").write_bytes(make_model(("N", 3, SIDE, SIDE), rows))
    names = {9: "Rating", 0: "General", 4: "Character"}
    mapping = {str(i): {"tag": name, "category": names[kind]} for i, (name, kind) in enumerate(ROWS)}
    (tagger / "tag_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    loaded = load(tagger)

    (found,) = loaded.predict_probabilities(
        [loaded.pad_and_resize(np.full((4, 4, 3), (255, 0, 0), np.uint8))]
    )

    by_name = dict(zip([name for name, _ in ROWS], found.tolist(), strict=True))
    assert by_name["red"] == pytest.approx(1 / (1 + np.exp(-3)))
    assert by_name["1girl"] == pytest.approx(1 / (1 + np.exp(1)))
    options = options_of(tmp_path, "--thresh", 0.2)
    choice = make_tag_selection(options.thresholds, options.words, sorts_by_probability=True)
    assert choice.select_tags(loaded.labels, found.tolist())[0] == "red"


PROBABILITIES = [0.2, 0.7, 0.9, 0.5, 0.4, 0.1, 0.8, 0.6]  # of ROWS


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        ("", "1girl, blue_eyes, ^_^, miku_(vocaloid), saber_(fate)"),
        ("--general_threshold 0.45 --character_threshold 0.7", "1girl, blue_eyes, miku_(vocaloid)"),
        ("--thresh 0.7", "1girl, miku_(vocaloid)"),
        ("--remove_underscore", "1girl, blue eyes, ^_^, miku (vocaloid), saber (fate)"),
        ("--character_tags_first", "miku_(vocaloid), saber_(fate), 1girl, blue_eyes, ^_^"),
        ("--character_tag_expand --thresh 0.65", "1girl, miku, vocaloid"),
        ("--always_first_tags ^_^,red,blue_eyes", "^_^, blue_eyes, 1girl, miku_(vocaloid), saber_(fate)"),
        ("--undesired_tags 1girl,saber_(fate)", "blue_eyes, ^_^, miku_(vocaloid)"),
        ("--tag_replacement 1girl,woman;^_^,a\\,b --character_threshold 1", "woman, blue_eyes, a,b"),
        ("--use_rating_tags --thresh 0.85", "sensitive, 1girl"),
        ("--use_rating_tags_as_last_tag --thresh 0.85", "1girl, sensitive"),
    ],
)
def test_words_of_the_command_line_choose_and_order_the_tags(tmp_path: Path, words: str, tags: str) -> None:
    labels = read_labels(write_tagger(tmp_path / "tagger", BY_COLOR))
    options = options_of(tmp_path, *words.split())
    choice = make_tag_selection(options.thresholds, options.words, sorts_by_probability=False)
    assert ", ".join(choice.select_tags(labels, PROBABILITIES)) == tags


def test_the_command_of_a_download_is_said_once(folder: Path, tmp_path: Path) -> None:
    code, said = run_here("tools/tag.py", folder, "--model_dir", "models/wd_tagger", folder=tmp_path)
    assert code != 0
    assert said.count("--task wd_tagger") == 1
    assert "after its size and license" in said


FACES = "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||"


@pytest.mark.parametrize("face", FACES.split())
def test_faces_of_the_taggers_keep_their_underscores(tmp_path: Path, face: str) -> None:
    """The list is that of the taggers' own demonstration (SmilingWolf/wd-tagger)."""
    options = options_of(tmp_path, "--remove_underscore")
    choice = make_tag_selection(options.thresholds, options.words, sorts_by_probability=False)
    labels = [Label(face, GENERAL), Label("red_hair", GENERAL)]
    assert choice.select_tags(labels, [0.9, 0.9]) == [face, "red hair"]


def test_tags_are_put_behind_captions_that_lack_them(folder: Path, tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    (folder / "pale.txt").write_text("by hand, red,", encoding="utf-8")

    tag(folder, tagger, "--append_tags")

    assert texts_of(folder)["pale"] == "by hand, red, 1girl"
    assert (folder / "pale.txt.bak").read_text(encoding="utf-8") == "by hand, red,"
    tag(folder, tagger, "--append_tags")
    assert texts_of(folder)["pale"] == "by hand, red, 1girl"
    assert extend_caption("a; b", ["b", "c"], "; ") == "a; b; c"
    assert extend_caption("a ||| b", ["a", "b", "c"], ", ") == "a ||| b, c"  # two kinds of tags, not one tag


def test_tags_break_no_caption_that_is_a_json_object(folder: Path, tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    caption = '{"short_description": "a pale square"}'
    (folder / "pale.txt").write_text(caption, encoding="utf-8")

    with pytest.raises(OptionError, match=r"pale.*: its caption is a JSON object"):
        tag(folder, tagger, "--append_tags")
    assert texts_of(folder)["pale"] == caption

    (folder / "pale.txt").write_text("{by hand|drawn}", encoding="utf-8")  # a choice of words is none
    tag(folder, tagger, "--append_tags")
    assert texts_of(folder)["pale"] == "{by hand|drawn}, 1girl, red"


def test_the_tags_of_a_clips_frames_are_joined(tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    clips = tmp_path / "clips" / "deep"
    clips.mkdir(parents=True)
    # red for one half, then green
    frames = [np.full((32, 32, 3), color, np.uint8) for color in [(255, 0, 0)] * 6 + [(0, 255, 0)] * 2]
    write_video(clips / "c.mp4", frames, 24, crf=1, preset="ultrafast")
    with pytest.raises(DatasetError, match="--recursive"):
        tag(tmp_path / "clips", tagger)

    tag(tmp_path / "clips", tagger, "--recursive", "--num_frames", 4)
    assert texts_of(clips) == {"c": "1girl, red"}
    tag(tmp_path / "clips", tagger, "--recursive", "--num_frames", 4, "--join_frames", "mean", "--overwrite")
    assert texts_of(clips) == {"c": "red"}


def test_looking_writes_nothing_and_counts_tags(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    state = everything_in(folder)
    tag(folder, tagger, "--dry_run")
    assert "3 captions would be made, 0 are kept" in capsys.readouterr().out
    tag(folder, tagger, "--try_on", 3, "--frequency_tags")
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("tags found in this run:") + 1 :] == [
        "     2 1girl",
        "     2 red",
        "     1 blue_eyes",
    ]
    assert everything_in(folder) == state


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"model.onnx": b"x" * 99}, "not an ONNX file, or it is damaged"),
        ({"selected_tags.csv": b"a,b\n1,2\n"}, "first line has to name the columns"),
        ({"selected_tags.csv": b"tag_id,name,category,count\n1,x,7,1\n"}, "line 2: category 7 is unknown"),
        ({"selected_tags.csv": b"\xff\xfe"}, "is not a list of tags"),
        ({"selected_tags.csv": b"tag_id,name,category,count\n1,x,0,1\n"}, "list has 1 tags"),
        ({"selected_tags.csv": None}, "no selected_tags.csv and no tag_mapping.json"),
        (
            {"selected_tags.csv": None, "tag_mapping.json": b'{"1": {"tag": "x", "category": "General"}}'},
            "no tag with index 0",
        ),
        ({"model.onnx": None}, "--family tools --task wd_tagger --to"),
    ],
)
def test_a_damaged_tagger_is_named(
    folder: Path, tmp_path: Path, damage: dict[str, bytes | None], message: str
) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    for name, content in damage.items():
        (tagger / name).unlink(missing_ok=True)
        if content is not None:
            (tagger / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        tag(folder, tagger)
    assert texts_of(folder) == {}


def test_a_model_of_other_shapes_is_refused(tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    (tagger / "model.onnx").write_bytes(make_model(("N", 48), BY_COLOR))
    with pytest.raises(CheckpointError, match="not square images"):
        load(tagger)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tag_replacement a", "two tags"),
        ("--caption_extension txt", "such as .txt"),
        ("--append_tags --overwrite", "append_tags"),
        ("--thresh 1.5", "--thresh"),
    ],
)
def test_mistyped_options_are_named(folder: Path, tmp_path: Path, words: str, message: str) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    with pytest.raises(OptionError, match=message):
        tag(folder, tagger, *words.split())


def test_a_dataset_file_says_where_tags_go(folder: Path, tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    config = tmp_path / "data.toml"
    config.write_text(
        f"[[datasets]]\nimage_directory = {os.fspath(folder)!r}\ncaption_extension = '.tags'\n",
        encoding="utf-8",
    )
    tag(config, tagger)
    assert (folder / "red.tags").read_text(encoding="utf-8") == "red"


def test_a_tagger_that_makes_more_than_memory_holds_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    (tagger / "model.onnx").write_bytes(make_growing_model(BY_COLOR, 1 << 29))  # 2 GiB
    monkeypatch.setattr(limits, "MAX_ONNX_MEMORY", 1 << 28)
    with pytest.raises(CheckpointError, match="it needs more memory"):
        load(tagger).predict_probabilities([np.zeros((SIDE, SIDE, 3), np.uint8)])
    (tagger / "model.onnx").write_bytes(make_growing_model(BY_COLOR, 1 << 10))
    assert load(tagger).predict_probabilities([np.zeros((SIDE, SIDE, 3), np.uint8)]).shape == (1, len(ROWS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_model((1, SIDE, SIDE, 3), BY_COLOR, kind="Loop"), "cannot be run"),
        (make_model((1, SIDE, SIDE, 3), BY_COLOR, kind="Scan"), "cannot be run"),
        (make_model((1, SIDE, SIDE, 3), BY_COLOR, is_outside=True), "cannot be run"),
        (b"", "not an ONNX file"),
        (b"\x3a\xff\xff\xff\xff\x0f", "not an ONNX file"),
        (b"\0" * 1000, "not an ONNX file"),
    ],
)
def test_graphs_that_could_have_no_end_or_read_other_files_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR)
    (tagger / "model.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(tagger)


def test_a_tagger_that_takes_more_pictures_at_once_than_memory_holds_is_refused(tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger", BY_COLOR, batch=10**8)
    with pytest.raises(CheckpointError, match="requires batches of 100,000,000 images of 4 x 4 pixels"):
        load(tagger)


@pytest.mark.parametrize("size", [(200_000, 8), (8, 200_000)])
def test_a_strip_is_fitted_without_a_square_of_its_length(size: tuple[int, int], tmp_path: Path) -> None:
    fitted = load(write_tagger(tmp_path / "tagger", BY_COLOR)).pad_and_resize(np.zeros((*size, 3), np.uint8))
    assert fitted.shape == (SIDE, SIDE, 3)
    assert 0 < (fitted == 0).sum() < fitted.size
