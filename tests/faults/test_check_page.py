"""--check --html through the commands: caching scripts and training, of every family."""

from pathlib import Path

from tests.faults.messages import run_here
from tests.faults.runs import Scripts, copy_data

LONG = " ".join(f"word {number}" for number in range(600))


def test_the_page_of_text_caching_shows_frames_and_tokens(
    scripts: Scripts, project: Path, tmp_path: Path
) -> None:
    config = copy_data(project, tmp_path, cached=False)
    text = next(path for folder in tmp_path.iterdir() if folder.is_dir() for path in folder.glob("*.txt"))
    text.write_text(LONG, encoding="utf-8")
    page = tmp_path / "check.html"

    code, said = run_here(
        *scripts.cache_texts, "--dataset_config", config, "--check", "--html", page, folder=project
    )

    assert code == 0, said
    written = page.read_text(encoding="utf-8")
    assert written.count("<article") >= 4
    assert written.count("data:image/jpeg") >= 4
    assert f"{text.name}: " in written
    assert 'class="lost"' in written
    assert " tokens, " in written


def test_text_caching_warns_of_captions_that_are_cut(scripts: Scripts, project: Path, tmp_path: Path) -> None:
    config = copy_data(project, tmp_path, cached=False)
    text = next(path for folder in tmp_path.iterdir() if folder.is_dir() for path in folder.glob("*.txt"))
    text.write_text(LONG, encoding="utf-8")

    code, said = run_here(*scripts.cache_texts, "--dataset_config", config, folder=project)

    assert code == 0, said
    assert "captions are longer than" in said
    assert text.name in said
    assert "; lost: " in said


def test_the_page_of_training_shows_the_caches_and_their_steps(
    scripts: Scripts, project: Path, tmp_path: Path
) -> None:
    page = tmp_path / "check.html"

    code, said = run_here(*scripts.train_only, "--check", "--html", page, folder=project)

    assert code == 0, said
    written = page.read_text(encoding="utf-8")
    assert "An epoch: " in written
    assert " tokens" in written
    assert not (project / "out").exists()
