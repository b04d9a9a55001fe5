"""A file gets its name when all of it has arrived and is right; what has arrived before is not sent again."""

import hashlib
import io
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from downloads.catalogue import Licence, ModelSet, ReleasedFile, model_sets
from downloads.fetching import download_file, partial_path, run_download
from downloads.hubs import ON_MODELSCOPE, RemoteFile, find_on_github, find_on_hub, find_on_modelscope
from downloads.naming import DownloadOptions
from modules.errors import DownloadError, OutputError
from tests.commands import run_script
from tests.downloads.fake_hub import COMMIT, FakeHub, serve

DATA = bytes(range(256)) * 1000
LICENSE = Licence("none", "other", "", "")
FILE = ReleasedFile("owner/name", "folder/weights.bin", "weights.bin", LICENSE, None, None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    # the library reads these once, at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve() as served:
        served.add("owner/name", "folder/weights.bin", DATA)
        yield served


def _fetch(hub: FakeHub, target: Path, waited: list[float] | None = None) -> RemoteFile:
    remote = find_on_hub(FILE, hub.address)
    download_file(remote, target, wait=(waited if waited is not None else []).append)
    return remote


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_with_the_token_and_nothing_else_stays(hub: FakeHub, tmp_path: Path) -> None:
    remote = _fetch(hub, tmp_path / "models" / "weights.bin")

    assert (tmp_path / "models" / "weights.bin").read_bytes() == DATA
    assert remote.sha256 == hashlib.sha256(DATA).hexdigest()
    assert f"/resolve/{COMMIT}/" in remote.url
    assert hub.requests[-1][2]["authorization"] == "Bearer hf_secret"
    assert _left(tmp_path / "models") == ["weights.bin"]


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_broken_connection_is_continued_where_it_broke_if_the_site_can(
    hub: FakeHub, tmp_path: Path, ignores_ranges: bool
) -> None:
    hub.cuts, hub.ignores_ranges = [131_072, 65_536], ignores_ranges
    waited: list[float] = []

    _fetch(hub, tmp_path / "weights.bin", waited)

    assert (tmp_path / "weights.bin").read_bytes() == DATA
    assert hub.sent_ranges() == [None, "bytes=131072-", "bytes=65536-" if ignores_ranges else "bytes=196608-"]
    assert waited == [1.0, 1.0]


@pytest.mark.parametrize(
    ("find", "sha256", "cuts"),
    [
        (find_on_modelscope, hashlib.sha256(DATA).hexdigest(), [131_072]),
        (find_on_github, None, [len(DATA), 131_072]),  # the first is of the look-up
    ],
    ids=["ModelScope", "GitHub"],
)
def test_other_sites_are_continued_too_and_get_no_token(
    hub: FakeHub,
    tmp_path: Path,
    find: Callable[..., RemoteFile | None],
    sha256: str | None,
    cuts: list[int],
) -> None:
    hub.add("owner/name", "weights.bin", DATA)
    hub.cuts = [*cuts]
    remote = find(replace(FILE, file="weights.bin", release="v0.1"), hub.address)
    assert remote is not None

    download_file(remote, tmp_path / "weights.bin", wait=lambda _: None)

    assert (remote.size_bytes, remote.sha256) == (len(DATA), sha256)
    assert (tmp_path / "weights.bin").read_bytes() == DATA
    assert hub.sent_ranges()[-2:] == [None, "bytes=131072-"]
    assert all("authorization" not in headers for _, _, headers in hub.requests)


def test_a_connection_that_stays_broken_keeps_what_arrived_for_the_next_run(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.cuts = [131_072] + [0] * 6
    remote, path = find_on_hub(FILE, hub.address), tmp_path / "weights.bin"

    with pytest.raises(DownloadError, match=r"broke 6 times.*\n.*run the same command again"):
        download_file(remote, path, wait=lambda _: None)

    assert not path.exists()
    hub.requests.clear()
    download_file(remote, path)
    assert hub.sent_ranges() == ["bytes=131072-"]
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("declared", ["bytes 131073-255999/256000", "\x1b[31m"])
def test_a_site_that_misstates_the_part_that_it_sends_is_refused_at_once(
    hub: FakeHub, tmp_path: Path, declared: str
) -> None:
    remote = find_on_hub(FILE, hub.address)
    partial_path(remote, tmp_path / "weights.bin").write_bytes(DATA[:131_072])
    hub.states_range = declared

    with pytest.raises(
        DownloadError, match=r"from byte 131072 on, the site sends '.*another mirror"
    ) as error:
        download_file(remote, tmp_path / "weights.bin", wait=pytest.fail)

    assert "\x1b" not in str(error.value)
    assert partial_path(remote, tmp_path / "weights.bin").read_bytes() == DATA[:131_072]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", b"not a model at all"),
        ("model.safetensors", (100).to_bytes(8, "little") + b'{"a": 1}'),
        ("model.safetensors", (10).to_bytes(8, "little") + b"{}        "),
        ("model.pth", b"\x80\x02not a pickle at all"),
        ("model.pt", (2).to_bytes(8, "little") + b"{}"),
        ("tokenizer.json", b"Not found, sorry!!"),
        ("spiece.model", b"version https://git-lfs.github.com/spec/v1"),
        ("face.onnx", b"PK\3\4..."),
    ],
)
def test_what_is_not_the_kind_of_file_that_its_name_says_never_gets_the_name(
    hub: FakeHub, tmp_path: Path, name: str, data: bytes
) -> None:
    hub.add("owner/name", name, data)
    remote = find_on_hub(replace(FILE, file=name, name=name), hub.address)

    with pytest.raises(DownloadError, match=rf"sends as {name} are something else: \S") as error:
        download_file(remote, tmp_path / name)

    assert str(tmp_path) not in str(error.value)
    assert "\n" not in str(error.value)
    assert not _left(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "checksum"),
    [(DATA[:-1] + b"x", "SHA-256"), (DATA[:-1] + b"x", "SHA-1"), (DATA + b"more", "SHA-256")],
    ids=["another last byte", "of a small file, which git stores", "too many bytes"],
)
def test_damaged_data_are_loaded_once_more_and_never_get_the_name(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: bytes, checksum: str
) -> None:
    if checksum == "SHA-1":
        hub.small.add("owner/name/folder/weights.bin")
    hub.sends_instead["owner/name/folder/weights.bin"] = wrong

    with caplog.at_level(logging.WARNING), pytest.raises(DownloadError, match="arrived damaged twice"):
        _fetch(hub, tmp_path / "weights.bin")

    assert "It is downloaded again" in caplog.text
    assert len(hub.sent_ranges()) == 2
    assert not _left(tmp_path)


def test_two_runs_at_once_load_the_file_once(hub: FakeHub, tmp_path: Path) -> None:
    remote = find_on_hub(FILE, hub.address)
    hub.requests.clear()
    runs = [threading.Thread(target=download_file, args=(remote, tmp_path / "weights.bin")) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()

    assert (tmp_path / "weights.bin").read_bytes() == DATA
    assert hub.sent_ranges() == [None]
    assert _left(tmp_path) == ["weights.bin"]


def test_the_token_goes_to_the_hub_and_not_to_the_host_that_sends_the_data(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.redirects_to = hub.address.replace("127.0.0.1", "localhost")
    hub.cuts = [131_072]

    _fetch(hub, tmp_path / "weights.bin")

    assert (tmp_path / "weights.bin").read_bytes() == DATA
    told = [
        (headers["host"][:9] == "localhost", "authorization" in headers) for _, _, headers in hub.requests
    ]
    assert sorted(told) == [(False, True)] * 3 + [(True, False)] * 2


SMALL = next(one for one in model_sets() if one.task == "t2v-1.3B")


@pytest.fixture
def hub_of_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the files of a set, each with a few bytes of its own."""
    with serve() as served:
        _add_files(served, SMALL)
        # the library reads these once, at import
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", served.address)
        monkeypatch.setenv("GITHUB_ENDPOINT", served.address)
        yield served


def content_of(name: str, text: str) -> bytes:
    """Return a file of the kind that its name says, with a text of its own."""
    if name.endswith(".safetensors"):
        return safetensors.torch.save({text: torch.zeros(500)})
    if name.endswith((".pt", ".pth")):
        file = io.BytesIO()
        torch.save({text: torch.zeros(500)}, file)
        return file.getvalue()
    return json.dumps({text: text * 50}).encode()


def _add_files(hub_of_set: FakeHub, model_set: ModelSet) -> None:
    for file in (file for component in model_set.components for file in component.files):
        for repository in (file.repository, ON_MODELSCOPE.get(file.repository, file.repository)):
            hub_of_set.add(repository, file.file, content_of(file.file, f"{file.repository}/{file.file}"))


def _options(folder: Path, **changed: Any) -> DownloadOptions:
    # the files here are not those that the list knows
    given = {"family": "wan", "task": "t2v-1.3B", "to": folder, "accept_changed": True}
    return DownloadOptions(**{**given, **changed})


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("task", ["raw", "turbo", "edit"])
def test_a_licence_is_told_before_the_first_byte(
    task: str, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub has none of the files."""
    with pytest.raises(DownloadError, match="krea/Krea-2"):
        run_download(_options(tmp_path, family="krea2", task=task))
    assert "Krea 2 Community License: commercial use below" in capsys.readouterr().out
    assert _names(tmp_path) == []


def test_the_script_downloads_what_a_task_needs_and_names_the_commands(tmp_path: Path) -> None:
    with serve() as hub_of_set:
        _add_files(hub_of_set, SMALL)
        environment = {"HF_ENDPOINT": hub_of_set.address, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        words = ["--family", "wan", "--task", "t2v-1.3B", "--to", "my models", "--accept_changed"]
        done = run_script("tools/download.py", *words, folder=tmp_path, environment=environment)

    names = [file.name for component in SMALL.components for file in component.files]
    assert _names(tmp_path / "my models") == sorted(names)
    said = done.stdout.replace('"', "'").replace("\\", "/")
    assert "wan_train_network.py --dit 'my models/wan2.1_t2v_1.3B_bf16.safetensors'" in said
    assert "Apache-2.0: any use" in said


def test_another_file_than_the_known_one_is_refused(hub_of_set: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"another Wan2\.1_VAE\.pth than the one.*\n.*--accept_changed"):
        run_download(_options(tmp_path, accept_changed=False))

    assert _names(tmp_path) == []


def test_files_that_are_there_are_not_sent_again(
    hub_of_set: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_download(_options(tmp_path))
    hub_of_set.requests.clear()

    with caplog.at_level(logging.INFO):
        run_download(_options(tmp_path))

    assert [method for method, _, _ in hub_of_set.requests] == ["HEAD"] * 4
    assert caplog.text.count("exists and is complete") == 4


def test_verify_reads_the_files_and_finds_a_changed_byte(hub_of_set: FakeHub, tmp_path: Path) -> None:
    run_download(_options(tmp_path))
    vae = tmp_path / "Wan2.1_VAE.pth"
    vae.write_bytes(vae.read_bytes()[:-1] + b"?")
    run_download(_options(tmp_path))

    with pytest.raises(OutputError, match=r"Wan2\.1_VAE\.pth exists, but is a different file.*SHA-256"):
        run_download(_options(tmp_path, verify=True))


def test_a_users_file_of_the_same_name_is_not_overwritten(hub_of_set: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"my own")

    with pytest.raises(OutputError, match="Move it away"):
        run_download(_options(tmp_path))

    assert (tmp_path / "Wan2.1_VAE.pth").read_bytes() == b"my own"
    assert _names(tmp_path) == ["Wan2.1_VAE.pth"]  # found before anything was downloaded


def test_a_full_disk_is_found_before_anything_is_downloaded(
    hub_of_set: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(OutputError, match=r"1 MB are to be downloaded and 1 MB are free"):
        run_download(_options(tmp_path))

    assert _names(tmp_path) == []


def test_a_run_without_a_network_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        run_download(_options(tmp_path))
