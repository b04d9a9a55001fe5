"""The page Models: what is on disk, what uses it, loading after accepting licenses, removing into the bin."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import pytest

from browser.core.bin_folder import BinFolder
from browser.jobs import model_files
from browser.jobs.jobs import Job
from browser.jobs.model_files import (
    Download,
    find_task,
    list_tasks,
    list_unknown_files,
    read_model_part,
    remove_parts,
)
from downloads.catalogue import known_components
from modules.errors import OptionError, OutputError
from modules.progress import read_progress
from tests.browser.serving import Answer, Served, serve_runs
from tests.chromium import open_page, wait_until
from tests.downloads import fake_hub
from tests.downloads.test_fetching import content_of

VAE = "Wan2.1_VAE.pth"
DIT = "wan2.1_t2v_1.3B_bf16.safetensors"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
TASK = {"family": "wan", "task": "t2v-1.3B"}


def write_sparse(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)


def write_task(models: Path, family: str, task: str) -> None:
    """Write files of the sizes that the catalogue knows, without content."""
    for part in next(one for one in list_tasks(models) if one.name == f"{family} {task}").parts:
        for file in part.component.files:
            write_sparse(models / file.name, file.size_bytes or part.component.tensor_bytes or 1000)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def serve(tmp_path: Path, read_only: bool = False) -> Iterator[Served]:
    (tmp_path / "root").mkdir(exist_ok=True)
    with serve_runs(tmp_path / "root", models=tmp_path / "models", read_only=read_only) as served:
        yield served


def post(served: Served, what: str, **fields: str | list[str]) -> Answer:
    return served.ask(f"/models/{what}", "POST", urlencode(fields, doseq=True), Origin=served.url)


def test_a_task_is_on_disk_when_all_of_its_parts_are(models: Path) -> None:
    empty = find_task(models, "wan", "t2v-1.3B")
    assert empty is not None
    assert (empty.state, empty.is_there, len(empty.missing)) == ("to download", False, 4)

    write_task(models, "wan", "t2v-1.3B")
    full = find_task(models, "wan", "t2v-1.3B")
    assert full is not None
    assert (full.state, {part.state for part in full.parts}) == ("ready", {"ready"})

    (models / DIT).unlink()
    rest = find_task(models, "wan", "t2v-1.3B")
    assert rest is not None
    assert ([part.path for part in rest.missing], rest.state) == ([DIT], "2.8 GB to download")
    larger = find_task(models, "wan", "t2v-14B")  # has all but its transformer in common
    assert larger is not None
    assert [part.component.role for part in larger.missing] == ["transformer"]


def test_files_of_another_size_and_unfinished_downloads_are_told_apart(models: Path) -> None:
    component = known_components()["wan_vae"]
    write_sparse(models / VAE, 1000)
    assert (
        read_model_part(component, models).state
        == "judging by its size, a different file than the released one"
    )
    (models / VAE).unlink()

    write_sparse(models / f".{VAE}.0123456789ab.part", 200_000_000)
    part = read_model_part(component, models)
    assert (part.is_there, part.size_bytes, part.state) == (False, 200_000_000, "0.2 GB of it on disk")
    assert "wan22 t2v-A14B" in part.tasks

    write_sparse(models / DIT, 1_000_000)  # smaller than its tensors, whose size is known
    assert read_model_part(known_components()["wan_t2v_small"], models).has_other_size


def test_two_parts_in_one_folder_are_two(models: Path) -> None:
    first, second = (find_task(models, "tools", f"gimmvfi_{kind}") for kind in "fr")
    assert first is not None
    assert second is not None
    for file in first.parts[0].component.files:
        write_sparse(models / file.name, file.size_bytes or 1000)

    assert [find_task(models, "tools", f"gimmvfi_{kind}").is_there for kind in "fr"] == [True, False]  # type: ignore[union-attr]


def test_a_part_that_families_share_has_the_option_of_each(models: Path) -> None:
    vae = known_components()["flux_ae"]
    options = {
        task.name: part.component.option
        for task in list_tasks(models)
        for part in task.parts
        if part.component.files == vae.files
    }
    assert options["z_image turbo"] == "--vae"
    assert options["flux dev"] == "--ae"


def test_the_page_looks_for_each_part_once(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []
    monkeypatch.setattr(
        model_files,
        "read_model_part",
        lambda one, folder: parts.append(one.files) or read_model_part(one, folder),
    )
    with serve(tmp_path) as served:
        served.ask(f"/models?{urlencode({**TASK, 'ask': 'remove'})}")
    assert parts
    assert len(parts) == len(set(parts))


def test_files_that_no_part_knows_are_listed_the_largest_first(models: Path) -> None:
    write_sparse(models / VAE, 10)
    write_sparse(models / "mine" / "own.safetensors", 3000)
    write_sparse(models / "notes.txt", 20)
    write_sparse(models / "reelsmith-bin" / "x" / "gone.pth", 9000)
    write_sparse(models / f".{VAE}.0123456789ab.part", 10)
    (models / "circle").symlink_to(models)

    files = list_unknown_files(models)

    assert [(file.path.as_posix(), file.size_bytes) for file in files] == [
        ("mine/own.safetensors", 3000),
        ("notes.txt", 20),
    ]


def test_removing_moves_the_chosen_parts_with_their_unfinished_downloads(
    tmp_path: Path, models: Path
) -> None:
    write_task(models, "wan", "t2v-1.3B")
    write_sparse(models / f".{DIT}.0123456789ab.part", 10)
    files = find_task(models, "wan", "t2v-1.3B")
    assert files is not None
    tokenizer = next(part for part in files.parts if part.component.option is None)

    folder = remove_parts(models, files, [DIT, tokenizer.path], BinFolder(tmp_path / "bin"))

    moved = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    inner = {file.name for file in tokenizer.component.files}
    assert moved == {DIT, f".{DIT}.0123456789ab.part", *inner}
    assert sorted(path.name for path in models.iterdir()) == sorted([VAE, T5])  # no empty folder is left


def test_only_parts_of_the_task_can_be_removed_and_nothing_behind_links(tmp_path: Path, models: Path) -> None:
    write_task(models, "wan", "t2v-1.3B")
    outside = tmp_path / "outside.txt"
    outside.write_text("mine", encoding="utf-8")
    files = find_task(models, "wan", "t2v-1.3B")
    assert files is not None
    for path in ("../outside.txt", str(outside), "wan2.1_t2v_14B_bf16.safetensors"):
        with pytest.raises(OptionError, match="is not one of the parts of Wan2.1 t2v-1.3B on disk"):
            remove_parts(models, files, [path], BinFolder(tmp_path / "bin"))
    with pytest.raises(OptionError, match="Tick what to remove"):
        remove_parts(models, files, [], BinFolder(tmp_path / "bin"))

    tokenizer = next(part for part in files.parts if part.component.option is None)
    inner = models / Path(tokenizer.component.files[0].name).parts[0]
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link to a different place"):
        remove_parts(models, files, [tokenizer.path], BinFolder(tmp_path / "bin"))
    assert outside.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "bin").exists()


def test_a_link_to_a_file_is_removed_and_its_target_stays(tmp_path: Path, models: Path) -> None:
    write_sparse(tmp_path / "store" / VAE, 507609880)
    (models / VAE).symlink_to(tmp_path / "store" / VAE)
    files = find_task(models, "wan", "t2v-1.3B")
    assert files is not None

    folder = remove_parts(models, files, [VAE], BinFolder(tmp_path / "bin"))

    assert (folder / VAE).is_symlink()
    assert (tmp_path / "store" / VAE).is_file()


def test_the_page_lists_tasks_parts_licences_and_foreign_files(tmp_path: Path, models: Path) -> None:
    write_task(models, "wan", "t2v-1.3B")
    write_sparse(models / "<b>own.safetensors", 3_000_000)
    with serve(tmp_path) as served:
        text = served.ask("/models").text
        assert '#task">Wan2.1 t2v-1.3B</a>' in text
        assert text.count('#task">FLUX.1 dev</a>') == 1
        assert "&lt;b&gt;own.safetensors" in text
        assert "<b>own" not in text
        assert re.search(r"14\.7 GB on disk in <code>.*models</code> · [\d.]+ [GM]B free", text)
        chosen = re.sub("<!--.*?-->", "", served.ask(f"/models?{urlencode(TASK)}").text)
    command = f"--family wan --task t2v-1.3B --to {models} --verify</code>"
    assert command in chosen
    assert ">Apache-2.0</a>: any use; keep the notices" in chosen
    assert "--verify</code> compares" in chosen
    assert "<button>Load</button>" not in chosen


def test_the_login_is_told_without_its_text(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    with serve(tmp_path) as served:
        text = served.ask("/models").text
    assert "A token was found in the variable HF_TOKEN." in text
    assert "hf_secret" not in text

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with serve(tmp_path) as served:
        assert "No token. Models whose license" in served.ask("/models").text
        (tmp_path / "token").write_text("hf_secretsecretsecret", encoding="utf-8")
        text = served.ask("/models").text
    assert "A token was found in the file" in text
    assert "hf_secret" not in text


def test_mistakes_are_refused_with_the_page(tmp_path: Path, models: Path) -> None:
    with serve(tmp_path) as served:
        answer = post(served, "load", **TASK)
        assert (answer.status, "tick that you accept them" in answer.text) == (422, True)
        answer = post(served, "load", family="wan", task="--verify", accept="yes")
        assert (answer.status, "Choose a task from the list" in answer.text) == (422, True)
        answer = post(served, "remove", **TASK)
        assert (answer.status, "Tick what to remove" in answer.text) == (422, True)
        assert post(served, "steal", **TASK).status == 404
        assert served.ask("/models/load", "POST", "", Origin="http://evil.example").status == 403
        assert served.ask("/models?family=wan&task=none").status == 422
    write_task(models, "wan", "t2v-1.3B")
    with serve(tmp_path) as served:
        answer = post(served, "load", **TASK, accept="yes")
    assert (answer.status, "All of its parts are on disk" in answer.text) == (422, True)


def test_with_read_only_nothing_can_be_loaded_or_removed(tmp_path: Path, models: Path) -> None:
    write_task(models, "wan", "t2v-1.3B")
    with serve(tmp_path, read_only=True) as served:
        text = served.ask(f"/models?{urlencode({**TASK, 'ask': 'remove'})}").text
        assert "hx-post" not in text
        assert "<button" not in text
        assert post(served, "remove", **TASK, part=VAE).status == 403
    assert (models / VAE).is_file()


def test_shared_parts_are_named_and_left_unticked(tmp_path: Path, models: Path) -> None:
    write_task(models, "wan", "t2v-1.3B")
    write_task(models, "wan", "t2v-14B")
    with serve(tmp_path) as served:
        text = served.ask(f"/models?{urlencode({**TASK, 'ask': 'remove'})}").text
    assert f'value="{DIT}" checked> {DIT}, 2.8 GB</label></li>' in text
    assert f'value="{VAE}"> {VAE}, 0.5 GB</label> <span class="warn">also needed by: Wan2.1 t2v-14B' in text


def test_a_person_loads_and_removes_by_labels(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    write_task(models, "wan", "t2v-1.3B")
    (models / DIT).unlink()
    with serve(tmp_path) as served, open_page(f"{served.url}/models") as page:
        page.get_by_role("link", name="Wan2.1 t2v-1.3B", exact=True).first.click()
        page.wait_for_load_state("load")
        page.get_by_role("button", name="Load").click()
        wait_until(page, "document.getElementById('said')?.textContent.includes('accept them')")
        assert page.evaluate("document.activeElement.textContent") == "Load"
        page.get_by_label("I have read the licenses and accept them").check()
        page.get_by_role("button", name="Load").click()
        page.wait_for_selector("#loading .died")
        assert "cannot be reached" in page.locator("#loading").inner_text()
        page.get_by_role("link", name="Remove", exact=True).click()
        page.wait_for_load_state("load")
        page.get_by_label(VAE).uncheck()
        page.get_by_label(T5).uncheck()
        page.get_by_role("button", name="Move to the bin").click()
        page.wait_for_selector("[role=status]")
        assert f"{VAE}" in [path.name for path in models.iterdir()]
        page.get_by_role("link", name="Settings").first.click()
        page.get_by_role("link", name="Empty the bin").click()
        page.wait_for_load_state("load")
        page.get_by_role("button", name="Delete for good").click()
        page.wait_for_selector("#bin small:text('empty')")
    assert [*(tmp_path / "root" / "reelsmith-bin").iterdir()] == []


def test_the_command_of_a_task_in_8_bits_loads_other_parts(models: Path) -> None:
    files = find_task(models, "wan", "t2v-1.3B", in_fp8=True)
    assert files is not None
    assert files.download_words(models)[-1] == "--fp8_encoders"
    assert T5 not in [part.path for part in files.parts]
    assert "--fp8_encoders" not in replace(files, in_fp8=False).download_words(models)


def test_a_download_says_how_much_has_arrived(tmp_path: Path, models: Path) -> None:
    job = Job(1, "reelsmith download", str(tmp_path), tmp_path / "x.log", process={})
    files = find_task(models, "wan", "t2v-1.3B")
    assert files is not None
    download = Download(files, job)
    assert (download.progress_words, download.fraction) == ("", None)

    (tmp_path / "x.progress").write_text('[3100000000, 12400000000, "B"]', encoding="utf-8")

    assert (download.progress_words, download.fraction) == (", 3.1 of 12.4 GB", 0.25)


@pytest.mark.slow  # the command loads torch to look at the files
def test_load_downloads_what_is_missing_and_notes_its_progress(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_hub.serve() as hub:
        files = find_task(models, "z_image", "turbo")
        assert files is not None
        for file in (file for part in files.parts for file in part.component.files):
            hub.add(file.repository, file.file, content_of(file.file, file.file))
        for name, value in {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        chosen = {"family": "z_image", "task": "turbo"}
        with serve(tmp_path) as served, open_page(f"{served.url}/models?{urlencode(chosen)}") as page:
            page.get_by_label("I have read the licenses and accept them").check()
            page.get_by_role("button", name="Load").click()
            page.wait_for_selector("#loading .finished", timeout=120_000)
            assert "loaded · Z-Image Turbo" in page.locator("#loading").inner_text()
    loaded = find_task(models, "z_image", "turbo")
    assert loaded is not None
    assert loaded.is_there
    (noted,) = (tmp_path / "root" / "reelsmith-queue" / "logs").glob("download-*.progress")
    progress = read_progress(noted)
    assert progress is not None
    assert progress.done == progress.total


def test_no_column_is_cut_off_on_a_phone(tmp_path: Path, models: Path) -> None:
    with (
        serve(tmp_path) as served,
        open_page(f"{served.url}/models?family=wan&task=t2v-1.3B", width=390) as page,
    ):
        cells = page.evaluate(
            "[...document.querySelectorAll('.parts td, .models td')].filter((one) => one.offsetWidth)"
            ".map((one) => one.getBoundingClientRect().right)"
        )
        heights = page.evaluate(
            "[...document.querySelectorAll(':is(.parts, .models) :is(a, summary)')]"
            ".filter((one) => one.checkVisibility()).map((one) => one.getBoundingClientRect().height)"
        )
        height = page.evaluate("document.body.scrollHeight")
        rows = page.locator(".models .folded")
        assert 0 < rows.filter(visible=True).count() < rows.count() / 2  # those of the chosen family
        page.get_by_role("checkbox", name=re.compile("^FLUX.1 .$")).check()
        assert page.get_by_role("link", name="FLUX.1 dev").is_visible()
    assert height < 10 * 844
    assert len(cells) > 50
    assert max(cells) <= 390
    assert min(heights) >= 24  # a finger meets it
