"""Which mask belongs to which picture or clip, and what a person does with one of them."""

import tomllib
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from data_tools.masks.places import (
    METHOD_TEXT,
    Gray,
    MaskEntry,
    accept_mask,
    find_mask_entries,
    find_mask_entry,
    invert_mask,
    is_reviewed,
    mask_line,
    read_frame,
    read_frames,
    remove_mask,
    replace_mask,
    undo_change,
    write_mask,
)
from modules.errors import DatasetError
from modules.media.writing import write_video
from tests.commands import ROOT, run_python

LEFT = np.zeros((40, 60), np.uint8)
LEFT[:, :20] = 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a b ü"
    folder.mkdir()
    Image.new("RGB", (60, 40), (10, 20, 90)).save(folder / "cat.jpg")
    frames = [np.full((40, 60, 3), 9 * number, np.uint8) for number in range(4)]
    write_video(folder / "dance.mp4", frames, 8.0)
    return folder


def make(place: MaskEntry, is_folder: bool = False) -> MaskEntry:
    frames = [np.roll(LEFT, number, axis=1) for number in range(4)] if is_folder else [LEFT]
    assert write_mask(place, frames, is_folder, {METHOD_TEXT: "a test"})
    return place.refresh()


def frames_of(place: MaskEntry) -> list[Gray]:
    place = place.refresh()
    assert place.mask is not None
    return list(read_frames(place.mask))


def test_places_are_those_that_the_dataset_reads(folder: Path) -> None:
    masks = folder / "masks"
    masks.mkdir()
    Image.new("L", (60, 40)).save(masks / "cat.png")
    (masks / "dance").mkdir()
    Image.new("L", (60, 40)).save(masks / "dance" / "0.png")
    Image.new("L", (60, 40)).save(masks / "tree.png")
    cat, dance = find_mask_entries(folder)
    assert (cat.media_path, cat.kind, cat.mask) == (folder / "cat.jpg", "image", masks / "cat.png")
    assert (dance.kind, dance.mask) == ("video", masks / "dance")
    assert find_mask_entry(folder / "dance.mp4") == dance

    cat, dance = find_mask_entries(folder, folder)
    assert (cat.mask, dance.mask) == (None, None)
    assert make(cat).mask == folder / "cat-masklabel.png"
    assert make(dance, is_folder=True).mask == folder / "dance-masklabel"
    assert [place.media_path.name for place in find_mask_entries(folder, folder)] == ["cat.jpg", "dance.mp4"]


@pytest.mark.parametrize("moves", [False, True])
def test_each_change_is_made_and_undone(folder: Path, moves: bool) -> None:
    place = make(find_mask_entries(folder)[moves], moves)
    made = frames_of(place)
    assert not is_reviewed(place)

    accept_mask(place)
    place = place.refresh()
    assert is_reviewed(place)
    assert place.read_texts()[METHOD_TEXT] == "a test"
    np.testing.assert_array_equal(frames_of(place), made)

    invert_mask(place)
    np.testing.assert_array_equal(frames_of(place), [255 - frame for frame in made])
    assert METHOD_TEXT not in place.refresh().read_texts()
    assert undo_change(place.refresh())
    assert place.refresh().read_texts()[METHOD_TEXT] == "a test"
    np.testing.assert_array_equal(frames_of(place), made)
    assert not undo_change(place.refresh())

    remove_mask(place)
    gone = place.refresh()
    assert gone.mask is None
    assert gone.is_removed
    assert undo_change(gone)
    np.testing.assert_array_equal(frames_of(place), made)
    assert not [path for path in place.mask_folder.rglob("*") if path.name.endswith((".tmp", ".old"))]


def test_a_frame_of_a_clip_is_replaced_alone(folder: Path) -> None:
    place = make(find_mask_entries(folder)[1], is_folder=True)
    before = frames_of(place)
    drawn = np.zeros((40, 60, 3), np.uint8)
    drawn[5:9] = 255
    replace_mask(place, drawn, 2)
    after = frames_of(place)
    assert [np.array_equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False, True]
    np.testing.assert_array_equal(after[2], drawn[..., 0])
    assert place.mask is not None
    np.testing.assert_array_equal(read_frame(place.mask, 2), drawn[..., 0])
    assert is_reviewed(place.refresh())
    with pytest.raises(DatasetError, match="has no frame 4"):
        replace_mask(place, drawn, 4)

    replace_mask(place, LEFT)  # one picture for the whole clip
    place = place.refresh()
    assert place.masks == (place.mask_folder / "dance.png",)
    with pytest.raises(DatasetError, match="has no frame 0"):
        replace_mask(place, drawn, 0)
    undo_change(place)
    np.testing.assert_array_equal(frames_of(place), after)


def test_a_drawn_mask_where_there_was_none_is_undone_to_none(folder: Path) -> None:
    place = find_mask_entries(folder)[0]
    replace_mask(place, LEFT)
    place = place.refresh()
    assert place.mask == folder / "masks" / "cat.png"
    assert undo_change(place)
    assert place.refresh().mask is None
    assert not place.refresh().is_removed


def test_masks_that_teach_nothing_or_fit_nothing_are_refused(folder: Path) -> None:
    place = find_mask_entries(folder)[0]
    for act in (accept_mask, invert_mask, remove_mask):
        with pytest.raises(DatasetError, match=r"cat\.jpg has no mask in "):
            act(place)
    with pytest.raises(DatasetError, match="40x60 pixels, cat.jpg 60x40"):
        replace_mask(place, LEFT.T)
    with pytest.raises(DatasetError, match="all black"):
        replace_mask(place, np.zeros_like(LEFT))
    replace_mask(place, np.full_like(LEFT, 255))
    with pytest.raises(DatasetError, match="all white"):
        invert_mask(place.refresh())
    moving = find_mask_entries(folder)[1]
    assert not write_mask(moving, [np.zeros_like(LEFT)] * 3, is_folder=True, texts={})
    assert moving.refresh().mask is None
    with pytest.raises(DatasetError, match="cannot be listed"):
        find_mask_entries(folder / "nothing")


def test_the_line_of_a_dataset_file_quotes_any_folder() -> None:
    folder = PurePosixPath('/a "b" ü/masks')
    assert tomllib.loads(mask_line(folder)) == {"mask_directory": str(folder)}


def test_places_load_no_torch() -> None:
    code = "import data_tools.masks.places, sys; print('torch' in sys.modules)"
    assert run_python("-c", code, folder=ROOT).stdout == "False\n"
