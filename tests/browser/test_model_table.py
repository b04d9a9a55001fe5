"""The table of models: what each makes, which come first, and what a file is."""

from pathlib import Path

from browser.folders.folders import MediaFolder
from browser.pages.new.model_table import describe_file, describe_kind, list_missing, list_model_rows
from project.model_choice import describe_outputs, read_model_info
from project.options import find_models
from tests.commands import ROOT


def test_what_models_make_is_what_new_says() -> None:
    models = find_models()
    assert [describe_kind(model) for model in models] == [
        describe_outputs(model, read_model_info(model)) for model in models
    ]


def folder(pictures: int = 0, clips: int = 0) -> MediaFolder:
    return MediaFolder(
        path=Path("x"),
        num_images=pictures,
        num_clips=clips,
        num_audios=0,
        num_uncaptioned=0,
        shown_file=None,
        is_described=False,
    )


def test_models_that_suit_the_folder_and_the_card_come_first() -> None:
    first = list_model_rows(Path("models"), 24, folder(clips=3))[0]
    assert (first.value, first.makes, first.fit, first.is_suggested) == (
        "wan t2v-1.3B",
        "clips",
        "fits",
        True,
    )
    rows = list_model_rows(Path("models"), 24, folder(pictures=3))
    assert (rows[0].makes, rows[0].fit) == ("images", "fits")
    assert [row.is_suggested for row in rows[:4]] == [True, True, True, False]
    suggested = [row.value for row in rows[:3]]  # none of them is for drawings
    assert suggested == ["stable_diffusion xl", "lumina 2.0", "flux_2 klein-base-4b"]
    slow = [row.value for row in list_model_rows(Path("models"), 0, folder(pictures=3))[:3]]
    assert slow == ["stable_diffusion 1.5", "stable_diffusion 2.1", "stable_diffusion xl"]
    assert not any(row.is_suggested for row in list_model_rows(Path("models"), 24))
    assert len(rows) == len(find_models())


def test_only_what_is_not_there_is_loaded(tmp_path: Path) -> None:
    [model] = [model for model in find_models() if (model.family, model.task) == ("wan", "t2v-1.3B")]
    options = [part.option for part in list_missing(model, tmp_path, {"dit": "x"})]
    assert options == ["--vae", "--t5"]
    for part in model.components:
        (tmp_path / part.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part.path).touch()
    assert list_missing(model, tmp_path, {}) == []
    row = next(row for row in list_model_rows(tmp_path, 0) if row.model.task == "t2v-1.3B")
    assert (row.size, row.fit) == ("ready", "Slow on a CPU")


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    assert describe_file(str(ROOT / "pocket/vae.safetensors")) == "a Wan2.1 VAE (--vae), 5 MB"
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert describe_file(str(tmp_path / "x.safetensors")).startswith("It cannot be read: ")
    full = (ROOT / "pocket/vae.safetensors").read_bytes()
    for content, message in (
        (b"", "It is empty. Download or copy it again."),
        (b"<!DOCTYPE html><title>Sign in</title>", "It is a web page, not a model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "It is a Git LFS pointer"),
        (full[:-1], f"It is incomplete: it has {len(full) - 1:,} of {len(full):,} bytes."),
    ):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert describe_file(str(tmp_path / "x.safetensors")).startswith(message)
    assert describe_file(str(tmp_path / "y.safetensors")) == "There is no such file."
    assert describe_file("/etc/passwd").startswith("This is not a model file")
    assert describe_file("vae.safetensors").startswith("Enter an absolute path")
    assert describe_file(" ") == ""
