"""Reference pictures in --check, on its page, in the report and in what --debug_mode shows."""

from dataclasses import replace
from pathlib import Path

from data_tools.report.check import check_caching, check_training
from data_tools.report.page import write_check_page
from data_tools.report.views import side_by_side
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import load_dataset_config, with_references
from dataset.listing import find_sources
from dataset.sources.decoding import decode_source
from tests.data_tools.report.making import report
from tests.dataset.edit_sets import RULES, SIZE, EditFamily, make_set, read_set
from tests.dataset.making import make_image
from tests.dataset.toy_family import options


def test_a_check_counts_references_and_names_the_missing(tmp_path: Path) -> None:
    sizes = {"a": (SIZE,), "b": ((32, 32), SIZE), "c": (), "d": ((32, 40),), "e": ((32, 32),)}
    config = make_set(tmp_path, sizes, "no_resize_control = true\nbatch_size = 2")
    make_image(tmp_path / "refs/a_0.png", (1, 1))

    result = check_caching(EditFamily(), config, 1, False)

    (found,) = result.tables
    assert "reference images: 1 image with 0, 3 images with 1, 1 image with 2" in found.info_lines
    (error,), (remark,) = found.errors, found.warnings
    assert "a_0.png has 1x1 pixels, each side needs at least 16. Replace it" in error.text
    assert (remark.kind, remark.stem) == ("have no reference image, while others have", "c")
    lines = [line.strip() for line in found.lines()]
    assert "64x48 with 32x32: 2 items x 1, 1 batch of 2" in lines
    assert "64x48 with 32x32 and 64x48: 1 item x 1, 1 batch of 2 (the last has 1)" in lines
    assert "64x48: 1 item x 1, 1 batch of 2 (the last has 1)" in lines


def test_a_check_of_training_groups_as_training_does(tmp_path: Path) -> None:
    sizes = {"a": (SIZE,), "b": ((32, 32),), "c": (), "d": ((32, 40),)}
    config = make_set(tmp_path, sizes, "no_resize_control = true\nbatch_size = 2")
    cache_media(EditFamily(), config, options())
    cache_texts(EditFamily(), config, options())

    result = check_training(config, "toy", EditFamily().latent)

    (found,) = result.tables
    assert found.errors == []
    assert found.num_items_by_bucket == {(64, 48, 64, 48): 1, (64, 48, 32, 32): 2, (64, 48): 1}
    assert "An epoch: 4 items with repeats, 3 batches, 3 steps" in result.tail
    assert result.num_batches == 3


def test_the_page_shows_pairs(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": (SIZE, (100, 40)), "b": (SIZE,), "c": ()}, "no_resize_control = true")
    (tmp_path / "refs/b_0.png").write_bytes(b"no picture")
    family = EditFamily()
    result = check_caching(family, config, 1, False)

    write_check_page(tmp_path / "x.html", config, result, family.latent, 1.0, 500, workers=1)

    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count('<div class="figures"><figure>') == 2
    first = page[page.index("a_0.png: ") :]  # behind that of `b`, which has a fault
    assert 0 < first.index("a_1.png: ") < first.index("the result: make it blue")
    assert "100 x 40 → 96 x 32" in page
    assert page.count("<img") == 3 + 2  # the images and the references that can be read
    assert "b_0.png cannot be read" in page or "b_0.png is" in page


def test_the_report_counts_what_the_model_takes(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,) * 3, "b": (SIZE,), "c": ()})
    path = tmp_path / "data.toml"

    numbers = report(path, "--references", "2")

    assert numbers["tables"][0]["control"] == [
        {"files": 0, "count": 1},
        {"files": 1, "count": 1},
        {"files": 2, "count": 1},
    ]
    assert numbers["faults"] == []
    assert any("has 0 control images for c" in one["text"] for one in report(path)["faults"])


def test_references_of_other_sizes_stand_side_by_side(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": ((32, 96),)})
    (source,) = find_sources(read_set(tmp_path, "no_resize_control = true").datasets[0])
    media = decode_source(source, 1.0)

    shown = side_by_side(media.cut(media.spans[0]))

    assert shown.shape == (1, 48, 64 + 16, 3)


def test_a_model_that_edits_is_told_that_no_image_has_a_reference(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": (SIZE,), "b": ()})
    (tmp_path / "data.toml").write_text(
        "\n".join(line for line in (tmp_path / "data.toml").read_text().splitlines() if "refs" not in line)
    )
    without = with_references(load_dataset_config(tmp_path / "data.toml"), RULES)
    for config, number in ((without, 1), (read_set(tmp_path), 0)):
        cache_media(EditFamily(), config, options())
        cache_texts(EditFamily(), config, options())
        checked = check_caching(EditFamily(), config, 1, False)
        for result in (checked, check_training(config, "toy", EditFamily().latent)):
            text = "\n".join(result.lines)
            assert text.count("nothing has a reference: this trains on texts alone") == number
            assert result.exit_code == 0
    also_makes = with_references(
        load_dataset_config(tmp_path / "data.toml"), replace(RULES, edits_images=False)
    )
    assert "nothing has a reference" not in "\n".join(check_caching(EditFamily(), also_makes, 1, False).lines)
