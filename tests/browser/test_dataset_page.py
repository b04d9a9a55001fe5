"""The page of a dataset: its files, their captions, which are edited, and whether their caches hold."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from PIL import Image

import anima.configs
import flux.spec
import flux_2.configs
import hunyuan_image.configs
import lumina.configs
import qwen_image.configs
import qwen_image_21.configs
import z_image.configs
from browser.folders.captions import CaptionText
from browser.folders.datasets import (
    IMAGE_MODELS_BY_STEP,
    MODELS,
    Datasets,
    FoundDataset,
    Measurement,
    _report_options,
    image_families,
)
from browser.folders.folders import read_media_folder
from browser.pages.datasets.dataset_pages import passes_filters
from browser.runs.runs import Runs
from data_tools.report.check import check_caching
from dataset.config import load_dataset_config
from pocket.clips import write_clips
from pocket.concepts import CONCEPTS
from pocket.measure import POCKET
from stable_diffusion.contract import SD1, SDXL
from stable_diffusion.family import latent_spec
from tests.browser.serving import Answer, Served, serve_runs, write_run
from tests.browser.test_accessible import assert_fits
from tests.browser.test_server import SECRET, ways_out
from tests.chromium import open_page, wait_until
from tests.commands import MAX_SECONDS, QUIET, run_script
from tests.data_tools.report.making import save_clip, save_image, write_config
from tests.dataset.toy_family import ToyFamily
from tests.waiting import wait_for
from tests.warm_processes import CAN_BE_WARM, WarmProcess
from tools import dataset_report


def save_set(folder: Path) -> Path:
    """A picture with a caption in CRLF, one without a caption, a clip and one too short."""
    (folder / "set").mkdir(parents=True)
    save_image(folder / "set/a.png", 1, (100, 40), caption=None)
    (folder / "set/a.txt").write_bytes(b"\xef\xbb\xbf a cat\r\non a mat\r\n")
    save_image(folder / "set/b.png", 2, caption=None)
    save_clip(folder / "set/c.mp4", 3, 9, caption="a dog")
    save_clip(folder / "set/tiny.mp4", 4, 3, caption="a bird")
    tables = ("image_directory = '{folder}/set'", "video_directory = '{folder}/set'\ntarget_frames = [5]")
    return write_config(folder, *tables)


class Page:
    """A dataset as the server shows it."""

    def __init__(self, served: Served, text: str = "data.toml") -> None:
        self.served = served
        links = re.findall(r'href="(/dataset/\w+/)"><b>([^<]*)<', served.ask("/datasets").text)
        self.address = next(address for address, name in links if text in name)

    def ask(self, rest: str = "", body: Any = None, **headers: str) -> Answer:
        """GET, or POST with a body, by default from our own origin."""
        if body is None:
            return self.served.ask(self.address + rest, **headers)
        sent = body if isinstance(body, str) else json.dumps(body)
        return self.served.ask(self.address + rest, "POST", sent, **(headers or {"Origin": self.served.url}))

    def measured(self, rest: str = "", minimum: int = 1) -> dict[str, Any]:
        """The answer once the dataset has been measured `minimum` times."""
        news: dict[str, Any] = {}

        def is_measured() -> bool:
            news.update(self.ask(f"items?count=200&{rest}").json())
            return news["state"] != "measuring" and news.get("version", minimum) >= minimum

        wait_for(is_measured, lambda: f"it is never measured: {news}")
        return news

    def file(self, name: str) -> dict[str, Any]:
        """A file as the page shows it."""
        [file] = [one for one in self.measured()["files"] if one["pictures"][0]["name"] == name]
        return file

    def write(self, file: dict[str, Any], what: str, text: str = "", **changes: str) -> Answer:
        """Save or undo the caption of a file."""
        body = {"what": what, "text": text, "have": file["caption"]["mark"], **changes}
        return self.ask(f"caption/{file['id']}", body)


class WarmReport:
    """What `browser.folders.datasets` starts to measure a dataset, with its libraries loaded before."""

    def __init__(self, command: Sequence[str], cwd: Path, env: Mapping[str, str], **streams: int) -> None:
        self._said = tempfile.TemporaryDirectory()
        files = (Path(self._said.name) / name for name in ("out", "err"))
        self._process = WarmProcess(command[1:], cwd, QUIET, *files, place=env)
        self.kill = self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def communicate(self) -> tuple[bytes, bytes]:
        self._process.wait(timeout=MAX_SECONDS)
        with self._said:
            done = self._process.done()
        return done.stdout.encode(), done.stderr.encode()


@pytest.fixture(autouse=True)
def warm_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in copies of a process that has loaded torch already; `kept` starts a new one, as users do."""
    if CAN_BE_WARM and "kept" not in request.fixturenames:
        started = SimpleNamespace(Popen=WarmReport, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE)
        monkeypatch.setattr("browser.folders.datasets.subprocess", started)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page whose files no test changes, beside a secret."""
    folder = tmp_path_factory.mktemp("a place \u00fc")
    (folder / "secret.txt").write_text(SECRET, encoding="utf-8")
    save_set(folder / "data")
    with serve_runs(folder / "data") as served:
        yield Page(served)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    save_set(tmp_path / "data")
    with serve_runs(tmp_path / "data") as served:
        yield Page(served)


NAMES = ["a.png", "b.png", "c.mp4", "tiny.mp4"]


def test_every_route_answers(kept: Page) -> None:
    assert 'href="/datasets"' in kept.served.ask("/").text
    assert '<option value="models of images">models of images</option>' in kept.ask().text
    in_japanese = kept.ask(**{"Accept-Language": "ja"}).text
    assert '<option value="models of images">画像のモデル</option>' in in_japanese
    news = kept.measured()
    files = {one["pictures"][0]["name"]: one for one in news["files"]}
    assert (list(files), news["items"]) == (NAMES, 3)
    assert news["counts"] == {"": 4, "dropped": 1, "told": 2, "uncaptioned": 1, "outdated": 3}
    config = load_dataset_config(kept.served.runs.roots[0] / "data.toml")
    checked = check_caching(ToyFamily(), config, 1, False, parts=["media", "latents"])
    assert news["totals"] == {"faults": checked.num_errors, "remarks": checked.num_warnings}
    assert files["a.png"]["fit"] == {"resized": [96, 38], "crop": [0, 3], "bucket": [96, 32]}
    assert [files[name]["caption"]["text"] for name in NAMES[:2]] == ["a cat\non a mat", ""]
    assert files["tiny.mp4"]["dropped"] == "3 frames, the shortest of target_frames is 5"
    image = kept.served.ask(files["c.mp4"]["pictures"][0]["address"])
    assert (image.headers["content-type"], image.body[:3]) == ("image/jpeg", b"\xff\xd8\xff")
    assert "immutable" in image.headers["cache-control"]
    chosen = kept.measured("only=dropped&text=BIRD")
    assert [one["pictures"][0]["name"] for one in chosen["files"]] == ["tiny.mp4"]
    assert len(kept.measured("from=1")["files"]) == 3
    assert kept.ask("items?from=x").status == 400
    for missing in ("/dataset/0123/", "/dataset/0123/items", f"{kept.address}picture/x/0/1"):
        assert kept.served.ask(missing).status == 404


def test_a_caption_is_saved_as_its_file_was_and_each_save_can_be_undone(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "data/set/a.txt"
    first, names = path.read_bytes(), sorted(os.listdir(path.parent))
    path.chmod(0o640)

    for text in ("a lion\non a mat", "a <b>tiger</b>"):
        answer = page.write(page.file("a.png"), "save", text)
        assert (answer.status, answer.json()["file"]["caption"]["text"]) == (200, text)
    assert path.read_bytes() == b"\xef\xbb\xbf a <b>tiger</b>\r\n"
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o777 == 0o640
    page.write(page.file("a.png"), "undo")
    assert path.read_bytes() == b"\xef\xbb\xbf a lion\r\non a mat\r\n"
    assert page.write(page.file("a.png"), "back").json()["file"]["caption"]["saves"] == 0
    assert path.read_bytes() == first
    assert page.write(page.file("a.png"), "undo").status == 409
    assert sorted(os.listdir(path.parent)) == names


@pytest.mark.slow
def test_a_missing_caption_is_written_and_undone(page: Page, tmp_path: Path) -> None:
    assert page.write(page.file("b.png"), "save", "a hill").status == 200
    assert (tmp_path / "data/set/b.txt").read_bytes() == b"a hill"
    assert page.write(page.file("b.png"), "undo").status == 200
    assert not (tmp_path / "data/set/b.txt").exists()


def test_counts_follow_a_caption_that_was_saved() -> None:
    valid = {"wan": {"media": ("valid", ""), "text": ("valid", "")}}
    file = {
        "parts": [{"path": "a.png"}],
        "text": "a cat",
        "captions": ["a cat"],
        "dropped": "",
        "caches": valid,
    }
    found = [[passes_filters(file, (), only) for only in ("outdated", "uncaptioned")]]
    for text in ("a dog", ""):
        file["edited"] = text
        found.append([passes_filters(file, (), only) for only in ("outdated", "uncaptioned")])
    assert found == [[False, False], [True, False], [True, True]]


@pytest.mark.parametrize("model", [*MODELS])
def test_a_dataset_is_measured_for_each_model_of_the_list(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report refused the frame step of models of images."""
    dataset = FoundDataset(save_set(tmp_path), tmp_path)

    dataset_report.main(_report_options(dataset, Measurement(model=model)))

    assert len(json.loads(capsys.readouterr().out)["tables"]) == 2


def test_a_dataset_is_measured_with_the_sides_of_the_model_that_was_trained() -> None:
    latents = {kind.name: latent_spec(kind) for kind in (SD1, SDXL)} | {
        "flux": flux.spec.LATENT,
        "flux_2": flux_2.configs.LATENT,
        "z_image": z_image.configs.LATENT,
        "lumina": lumina.configs.LATENT,
        "qwen_image": qwen_image.configs.LATENT,
        "anima": anima.configs.LATENT,
        "hunyuan_image": hunyuan_image.configs.LATENT,
        "qwen_image_21": qwen_image_21.configs.LATENT,
    }
    for name, latent in latents.items():
        _, pixel_step, frame_step = MODELS[IMAGE_MODELS_BY_STEP[image_families()[name]]]
        assert (int(pixel_step), int(frame_step)) == (latent.pixel_step, latent.frame_step), name


def test_the_list_has_a_picture_the_number_of_files_and_the_state(kept: Page) -> None:
    kept.measured()
    page = kept.served.ask("/datasets").text
    assert "2 images, 2 clips · 1 dropped, not cached" in page
    image = kept.ask("first")
    assert (image.status, image.body[:3]) == (200, b"\xff\xd8\xff")


@pytest.mark.parametrize("beside", ["control_directory", "mask_directory", "conditioning_data_dir"])
def test_what_belongs_to_pictures_is_counted_with_them_as_on_the_page_new(
    beside: str, tmp_path: Path
) -> None:
    for number in range(3):
        for place in ("set", "pairs"):
            (tmp_path / place).mkdir(exist_ok=True)
            save_image(tmp_path / place / f"{number}.png", number, caption=None)
    (tmp_path / "set" / "sung.wav").touch()
    write_config(tmp_path, f"image_directory = '{{folder}}/set'\n{beside} = '{{folder}}/pairs'")
    with serve_runs(tmp_path) as served:
        assert ">3 images, 1 sound · " in served.ask("/datasets").text
    folder = read_media_folder(tmp_path / "set")
    assert folder is not None
    assert folder.summary.startswith("3 images, 1 sound")


def test_a_described_folder_is_put_into_the_queue_from_its_page(tmp_path: Path) -> None:
    project = save_project(tmp_path / "Bilder von Jörg")
    with serve_runs(project, read_only=True) as served:
        assert "reelsmith run" not in Page(served, "dataset.toml").ask().text
    with serve_runs(project) as served:
        page = Page(served, "dataset.toml").ask().text
        assert f'name="line" value="reelsmith run &#39;{project}&#39;"' in page
        sent = urlencode({"line": f"reelsmith run '{project}'"})
        assert served.ask("/queue/add", "POST", sent, Origin=served.url).status == 303


def test_what_others_wrote_meanwhile_is_shown_and_not_overwritten(page: Page, tmp_path: Path) -> None:
    path, before = tmp_path / "data/set/a.txt", page.file("a.png")
    path.write_text("theirs", encoding="utf-8")

    assert page.write(before, "undo").status == 409
    answer = page.write(before, "save", "mine")
    theirs = answer.json()["file"]

    assert (answer.status, theirs["caption"]["text"], path.read_text()) == (409, "theirs", "theirs")
    assert page.write(theirs, "save", "mine").status == 200
    path.unlink()
    assert page.write(theirs, "undo").status == 409


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"what": "save", "text": "a\0b"}, 400),
        ({"what": "save", "text": "\ud800"}, 400),
        ({"what": "save", "text": "x" * 70_000}, 400),
        ({"what": "rm", "text": ""}, 404),
        ("[]", 400),
        ("[" * 100_000, 400),
    ],
    ids=["zero", "no text", "long", "no command", "not an object", "nested"],
)
def test_a_wrong_request_changes_nothing(kept: Page, body: Any, status: int) -> None:
    file = kept.file("c.mp4")
    sent = {**body, "have": file["caption"]["mark"]} if isinstance(body, dict) else body
    assert kept.ask(f"caption/{file['id']}", sent).status == status
    assert kept.file("c.mp4")["caption"] == file["caption"]


def test_with_read_only_no_caption_is_edited_and_no_button_is_there(tmp_path: Path) -> None:
    save_set(tmp_path)
    with serve_runs(tmp_path, read_only=True) as served:
        page = Page(served)
        caption = page.file("c.mp4")["caption"]
        assert (caption["can_edit"], "--read_only" in caption["where"]) == (False, True)
        assert 'id="measure"' not in page.ask().text


def save_project(folder: Path, caption: str = "a cat") -> Path:
    """A folder of pictures that `new` has described: paths in its dataset.toml are relative to it."""
    folder.mkdir(parents=True)
    for name in ("ä 1", "b"):
        save_image(folder / f"{name}.png", 1, (64, 64), caption=caption)
    (folder / "dataset.toml").write_text(
        '[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\n\n'
        '[[datasets]]\nimage_directory = "."\ncache_directory = "cache/images"\n',
        encoding="utf-8",
    )
    (folder / "run.toml").write_text("[training]\n", encoding="utf-8")
    return folder


def write_project_run(folder: Path, name: str = "x", **places: str) -> None:
    write_run(
        folder / "output",
        name,
        changed=[["dataset_config", "dataset.toml"], ["output_dir", "output"]],
        **places,
    )


ROOTS = ("output", ".", "..")


@pytest.mark.parametrize("version", ["untrained", "older", "now"])
@pytest.mark.parametrize("root", ROOTS)
def test_a_folder_that_new_described_is_open_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, version: str
) -> None:
    project = save_project(tmp_path / "all" / "Bilder von Jörg")
    if version == "now":
        write_project_run(project, written_in=str(project / "output"), working_folder=str(project))
    elif version == "older":
        write_project_run(project)
    monkeypatch.chdir(save_project(tmp_path / "decoy", "another project"))

    datasets = Datasets(Runs([project / root]))
    [dataset] = datasets.list_all()

    assert (dataset.path, dataset.base_folder) == (project / "dataset.toml", project)
    assert [name for _, name in dataset.runs] == ([] if version == "untrained" else ["x"])
    assert datasets.list_hidden_folders(dataset) == []


@pytest.mark.parametrize(
    "root", ["output", *(pytest.param(one, marks=pytest.mark.slow) for one in ROOTS[1:])]
)
def test_files_captions_and_caches_of_a_described_folder_are_shown_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    project = save_project(tmp_path / "all" / "Bilder von Jörg")
    decoy = save_project(tmp_path / "decoy", "another project")
    write_project_run(project)
    monkeypatch.chdir(decoy)
    with serve_runs(project / root) as served:
        page = Page(served, "dataset.toml")
        news = page.measured()
        assert (news["state"], news["items"], news["outside"], news["remarks"]) == ("ready", 2, 0, [])
        assert [one["pictures"][0]["name"] for one in news["files"]] == ["b.png", "ä 1.png"]
        for file in news["files"]:
            assert (file["caption"]["text"], file["caption"]["can_edit"]) == ("a cat", True)
            assert served.ask(file["pictures"][0]["address"]).status == 200
        assert news["counts"]["outdated"] == 2  # not cached yet
        assert page.write(page.file("b.png"), "save", "a dog").status == 200
    assert (project / "b.txt").read_text() == "a dog"
    assert (decoy / "b.txt").read_text() == "another project"


def test_a_run_is_of_the_dataset_where_its_command_was_typed(tmp_path: Path) -> None:
    project = save_project(tmp_path / "project")
    places = {"written_in": str(tmp_path / "runs/output"), "working_folder": str(project)}
    write_project_run(tmp_path / "runs", **places)
    (tmp_path / "runs/dataset.toml").write_text("[[datasets]]\n", encoding="utf-8")

    found = {one.path: one for one in Datasets(Runs([tmp_path])).list_all()}

    assert [name for _, name in found[project / "dataset.toml"].runs] == ["x"]
    assert found[tmp_path / "runs/dataset.toml"].runs == ()


def test_a_moved_project_is_found_at_its_new_place(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    save_project(before)
    write_project_run(before, written_in=str(before / "output"), working_folder=str(before))
    before.rename(after)

    runs = Runs([after / "output"])

    [run], [dataset] = runs.list_all(), Datasets(runs).list_all()
    assert (run.working_folder, dataset.path, len(dataset.runs)) == (after, after / "dataset.toml", 1)


def test_only_the_dataset_file_of_a_project_opens_its_folder(tmp_path: Path) -> None:
    """Files in `output` may be somebody else's: theirs name files of the project in vain."""
    project = save_project(tmp_path / "project")
    write_project_run(project)
    (project / "output" / "dataset.toml").write_text("[[datasets]]\n", encoding="utf-8")
    text = '[[datasets]]\nimage_directory = "{}"\ncaption_extension = ".txt"\n'
    for name, place in (("theirs", project), ("above", tmp_path)):
        (project / "output" / f"{name}.toml").write_text(text.format(place), encoding="utf-8")

    datasets = Datasets(Runs([project / "output"]))

    outside = {
        one.path.name: datasets.list_hidden_folders(one)
        for one in datasets.list_all()
        if one.path.parent != project
    }
    assert outside == {"dataset.toml": [], "theirs.toml": [project], "above.toml": [tmp_path]}


@pytest.mark.parametrize("folder", ["project", "elsewhere"])
def test_paths_of_a_dataset_begin_where_they_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder / "clips").mkdir(parents=True)
    (tmp_path / "project").mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    config = tmp_path / "project" / "data.toml"
    config.write_text('[[datasets]]\nvideo_directory = "clips"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")

    [dataset] = Datasets(Runs([tmp_path])).list_all()

    assert dataset.base_folder == tmp_path / folder


def test_no_way_leads_out_of_the_folders(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text(SECRET, encoding="utf-8")
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    data = tmp_path / "runs"
    save_set(data)
    if sys.platform != "win32":
        (data / "set/a.txt").unlink()
        for link, target in {
            "a.txt": "secret.txt",
            "leak.png": "secret.png",
            "leak.txt": "secret.txt",
        }.items():
            (data / "set" / link).symlink_to(tmp_path / target)
    with serve_runs(data) as served:
        page = Page(served)
        news = page.measured()
        assert SECRET not in json.dumps(news)
        assert [file["pictures"][0]["name"] for file in news["files"]] == NAMES
        if sys.platform != "win32":
            assert news["outside"] == 1
            assert page.write(page.file("a.png"), "save", "x", have="").status == 404
        start = news["files"][2]["pictures"][0]["address"].rpartition("/picture/")[0]
        for one in ways_out(tmp_path)[:120]:
            for way in (f"{start}/picture/{one}", f"{start}/{one}", f"/dataset/{one}/items"):
                answer = served.ask(way)
                assert answer.status in (400, 404), way
                assert SECRET not in answer.text
        for one in ways_out(tmp_path)[:30]:
            assert page.ask(f"caption/{one}", {"what": "save", "text": "x", "have": ""}).status in (404, 405)
    assert (tmp_path / "secret.txt").read_text(encoding="utf-8") == SECRET


@pytest.mark.slow
def test_a_dataset_that_lies_elsewhere_shows_the_command_that_would_show_it(tmp_path: Path) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    config = save_set(data)
    write_run(runs, "x", changed=[["dataset_config", str(config)]])
    with serve_runs(runs) as served:
        page = Page(served)
        news = page.measured()
        assert (news["state"], "files" in news) == ("outside", False)
        assert str(runs) in news["command"]
        assert str(data) in news["command"]
        assert page.ask("caption/x", {"what": "save", "text": "", "have": ""}).status == 404
    (runs / "data.toml").write_bytes(config.read_bytes())  # its clips are where they were
    with serve_runs(runs) as served:
        assert Page(served, "in runs").measured()["state"] == "outside"
    with serve_runs(runs, data) as served:
        assert Page(served, "in data").measured()["state"] == "ready"


def test_runs_lead_to_their_dataset_also_by_a_relative_path(tmp_path: Path) -> None:
    save_set(tmp_path)
    write_run(tmp_path / "output", "x", changed=[["dataset_config", "data.toml"]])
    with serve_runs(tmp_path) as served:
        listed = served.ask("/datasets").text
        assert listed.count("<li>") == 1
        assert ">x</a>" in listed


@pytest.mark.slow_cases("damaged", "gone", "without its clips")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("[[datasets]]\nvideo_directory = 3"), "video_directory"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: shutil.rmtree(path.parent / "set"), "set"),
    ],
    ids=["damaged", "gone", "without its clips"],
)
def test_damaged_and_vanished_datasets_say_so(
    page: Page, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    page.measured()
    damage(tmp_path / "data/data.toml")
    wait_for(lambda: page.ask("items").json()["state"] in ("failed", "gone"))
    news = page.ask("items").json()
    assert message in news["error"]
    assert "Traceback" not in news["error"]
    assert page.ask().status == 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_names_and_captions_that_are_no_text_are_told(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    save_set(tmp_path / "data")
    (tmp_path / "data/set/a.txt").write_bytes(b"caf\xe9")
    (folder / "data.toml").write_bytes(b"[[datasets]]")
    with serve_runs(tmp_path) as served:
        assert served.ask("/datasets").text.count("<li>") == 2
        assert Page(served, "caf").measured()["state"] == "failed"
        page = Page(served, "in data")
        caption = page.file("a.png")["caption"]
        assert (caption["can_edit"], "--repair_captions" in caption["where"]) == (False, True)
        assert page.write(page.file("a.png"), "save", "x").status in (400, 409)
    assert (tmp_path / "data/set/a.txt").read_bytes() == b"caf\xe9"


@pytest.mark.slow
def test_captions_of_a_list_are_shown_with_their_place(tmp_path: Path) -> None:
    save_set(tmp_path)
    line = json.dumps({"image_path": str(tmp_path / "set/a.png"), "caption": "from a list"})
    (tmp_path / "list.jsonl").write_text(line, encoding="utf-8")
    write_config(tmp_path, "image_jsonl_file = '{folder}/list.jsonl'")
    with serve_runs(tmp_path) as served:
        page = Page(served)
        caption = page.file("a.png")["caption"]
        assert (caption["text"], caption["can_edit"]) == ("from a list", False)
        assert str(tmp_path / "list.jsonl") in caption["where"]
        assert page.write(page.file("a.png"), "save", "x").status == 404


@pytest.mark.slow
def test_files_in_a_tar_have_pictures_and_captions_to_read(tmp_path: Path) -> None:
    save_set(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("c.mp4", "c.txt"):
            tar.add(tmp_path / "set" / name, name)
    write_config(tmp_path, "video_tars = '{folder}/x.tar'\ntarget_frames = [5]")
    with serve_runs(tmp_path) as served:
        page = Page(served)
        file = page.file("c.mp4")
        image = served.ask(file["pictures"][0]["address"])
        assert image.headers["content-type"] == "image/jpeg"
        assert (file["caption"]["text"], file["caption"]["can_edit"]) == ("a dog", False)
        (tmp_path / "x.tar").unlink()
        assert served.ask(file["pictures"][0]["address"]).status == 404


@pytest.mark.parametrize("content", [b"", b"\n", b"a", b" a \r\n", b"\xef\xbb\xbfa\rb\r", b"\xc3\xbc\n\n"])
def test_a_caption_keeps_all_but_its_text(content: bytes) -> None:
    caption = CaptionText.parse(content)

    assert caption.with_text(caption.text) == content
    assert CaptionText.parse(caption.with_text("x\ny")).text == "x\ny"


# --- in a real browser
# ------------------------------------------------------------------------------------------------------------

MANY = 10_000
STATES = "[...document.querySelectorAll('.told b')].map(line => line.textContent)"


@pytest.mark.slow
def test_an_edited_caption_makes_its_text_stale_and_the_next_caching_mends_it(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", 2, 1, CONCEPTS["blorp"].make)
    table = "video_directory = '{folder}/clips'\ntarget_frames = [17]"
    general = "[general]\nresolution = [64, 64]\ncaption_extension = '.txt'\n"
    dataset = ("--dataset_config", write_config(tmp_path, table, general=general))
    cache_texts = ("wan_cache_text_encoder_outputs.py", *dataset, "--t5", POCKET / "t5.safetensors")
    run_script("wan_cache_latents.py", *dataset, "--vae", POCKET / "vae.safetensors")
    run_script(*cache_texts)
    caption, valid = tmp_path / "clips/00000.txt", ["latents valid", "text valid"]
    first = caption.read_text(encoding="utf-8")
    with serve_runs(tmp_path) as served, open_page(served.url + Page(served).address) as page:
        wait_until(page, f"JSON.stringify({STATES}) === '{json.dumps(valid * 2, separators=(',', ':'))}'")
        page.fill("textarea >> nth=0", "a green blorp")
        page.press("textarea >> nth=0", "Control+Enter")
        page.wait_for_selector("text=saved")
        assert page.evaluate(STATES) == ["latents valid", "text stale", *valid]
        wait_until(page, "document.querySelector('#tiles').innerText.includes('1\\ncaches out of date')")
        assert caption.read_text(encoding="utf-8") == "a green blorp"

        run_script(*cache_texts)

        wait_until(page, f"!{STATES}.includes('text stale')")
        page.click("text=Undo >> nth=0")
        page.wait_for_selector("text=undone")
        wait_until(page, f"{STATES}[1] === 'text stale'")
        assert caption.read_text(encoding="utf-8") == first
        assert page.problems == []


@pytest.mark.slow
def test_a_conflict_shows_both_captions_and_a_filter_keeps_what_is_not_saved(
    page: Page, tmp_path: Path
) -> None:
    page.measured()
    path = tmp_path / "data/set/c.txt"
    with open_page(page.served.url + page.address) as shown:
        text = '[aria-label="Caption of c.mp4"]'
        shown.fill(text, "mine")
        shown.fill("#text", "no such words")
        wait_until(shown, "document.querySelectorAll('.file').length === 0")
        shown.fill("#text", "")
        shown.wait_for_selector(text)
        assert shown.input_value(text) == "mine"
        path.write_text("theirs", encoding="utf-8")
        shown.locator(".file", has=shown.locator(text)).locator("text=Save >> nth=0").click()
        shown.wait_for_selector(".conflict:visible >> text=theirs")
        assert shown.input_value(text) == "mine"
        shown.click("text=Save mine over it >> visible=true")
        shown.wait_for_selector("text=saved")
        assert path.read_text(encoding="utf-8") == "mine"
        assert [one for one in shown.problems if "409" not in one] == []


def test_who_presses_a_button_of_a_dataset_keeps_the_focus(page: Page) -> None:
    page.measured()
    focus = "document.activeElement.textContent"
    with open_page(page.served.url + page.address) as shown:
        shown.wait_for_selector("textarea")
        for text in ("one", "two"):
            shown.locator("textarea").first.fill(text)
            shown.get_by_role("button", name="Save", exact=True).first.click()
            shown.get_by_text("saved", exact=True).wait_for()
            assert shown.evaluate(focus) == "Save"
            assert shown.locator("[data-what=save]").first.get_attribute("aria-disabled") == "true"
        shown.get_by_role("button", name="Back to what it was").first.click()
        shown.get_by_text("as it was").wait_for()
        assert shown.evaluate("document.activeElement.matches('textarea')")
        shown.get_by_role("button", name="Measure again").click()
        wait_until(shown, "document.getElementById('measure').ariaDisabled === 'true'")
        assert shown.evaluate(focus) == "Measure again"
        page.measured(minimum=2)
        assert shown.evaluate(focus) == "Measure again"
        assert shown.problems == []


def test_the_page_fits_no_text_is_small_and_all_is_named(kept: Page) -> None:
    kept.measured()
    for address in ("/datasets", kept.address):
        with open_page(kept.served.url + address) as page:
            wait_until(page, "!window.$ || document.querySelectorAll('.file').length === 4")
            assert_fits(page)
            assert page.problems == []


@pytest.mark.slow
def test_ten_thousand_files_scroll_with_few_requests(tmp_path: Path) -> None:
    save_image(tmp_path / "one.png", 1, (64, 48), caption=None)
    content = (tmp_path / "one.png").read_bytes()
    (tmp_path / "set").mkdir()
    for index in range(MANY):
        (tmp_path / f"set/{index:05d}.png").write_bytes(content)
        (tmp_path / f"set/{index:05d}.txt").write_text(f"picture {index}", encoding="utf-8")
    asked: list[str] = []
    with serve_runs(write_config(tmp_path, "image_directory = '{folder}/set'")) as served:
        dataset = Page(served)
        dataset.measured()
        began = time.process_time()
        assert len(dataset.ask("items?count=24").json()["files"]) == 24
        assert time.process_time() - began < 1
        with open_page(f"{served.url}/datasets") as page:
            page.on("request", lambda request: asked.append(request.url))
            page.click("text=data.toml")
            page.wait_for_selector("text=00000.png")
            for share in (0.25, 0.5, 0.75, 1, 1):
                page.evaluate(f"scrollTo(0, {share} * document.body.scrollHeight)")
                page.wait_for_timeout(300)
            page.wait_for_selector("text=09999.png")
            assert page.locator(".file").count() < 200
            assert len(asked) < 400
            page.fill("#text", "picture 4321")
            page.wait_for_selector("text=04321.png")
            assert page.locator(".file").count() == 1
            assert page.problems == []
