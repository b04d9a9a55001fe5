"""tools/download.py as a user types it, with a local server in place of the hub."""

import dataclasses
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from downloads.catalogue import ModelSet, model_sets
from downloads.hubs import ON_MODELSCOPE
from downloads.options import DownloadOptions
from downloads.run import run_download
from modules.errors import DownloadError, OutputError
from tests.commands import run_script
from tests.downloads.fake_hub import FakeHub, serve

SMALL = next(one for one in model_sets() if one.task == "t2v-1.3B")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
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


def _add_files(hub: FakeHub, model_set: ModelSet) -> None:
    for file in (file for component in model_set.components for file in component.files):
        for repository in (file.repository, ON_MODELSCOPE.get(file.repository, file.repository)):
            hub.add(repository, file.file, content_of(file.file, f"{file.repository}/{file.file}"))


def _options(folder: Path, **changed: object) -> DownloadOptions:
    # the files here are not those that the list knows
    options = DownloadOptions(family="wan", task="t2v-1.3B", to=folder, accept_changed=True)
    return dataclasses.replace(options, **changed)  # type: ignore[arg-type]


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_script_downloads_what_a_task_needs_and_names_the_commands(tmp_path: Path) -> None:
    with serve() as hub:
        _add_files(hub, SMALL)
        environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        words = ["--family", "wan", "--task", "t2v-1.3B", "--to", "my models", "--accept_changed"]
        done = run_script("tools/download.py", *words, folder=tmp_path, environment=environment)

    assert _names(tmp_path / "my models") == sorted(
        file.name for component in SMALL.components for file in component.files
    )
    assert "wan_train_network.py --dit 'my models/wan2.1_t2v_1.3B_bf16.safetensors'" in done.stdout.replace(
        '"', "'"
    ).replace("\\", "/")
    assert "Apache-2.0: any use" in done.stdout


def test_another_file_than_the_known_one_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"another Wan2\.1_VAE\.pth than the one known.*\n.*--accept_changed"
    ):
        run_download(_options(tmp_path, accept_changed=False))

    assert _names(tmp_path) == []


def test_files_that_are_there_are_not_sent_again(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_download(_options(tmp_path))
    hub.requests.clear()

    with caplog.at_level(logging.INFO):
        run_download(_options(tmp_path))

    assert [method for method, _, _ in hub.requests] == ["HEAD"] * 4
    assert caplog.text.count("is there and complete") == 4


def test_verify_reads_the_files_and_finds_a_changed_byte(hub: FakeHub, tmp_path: Path) -> None:
    run_download(_options(tmp_path))
    vae = tmp_path / "Wan2.1_VAE.pth"
    vae.write_bytes(vae.read_bytes()[:-1] + b"?")
    run_download(_options(tmp_path))

    with pytest.raises(
        OutputError, match=r"Wan2\.1_VAE\.pth exists and is another file, or damaged.*SHA-256"
    ):
        run_download(_options(tmp_path, verify=True))


def test_a_users_file_of_the_same_name_is_not_overwritten(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"my own")

    with pytest.raises(OutputError, match="Move it away"):
        run_download(_options(tmp_path))

    assert (tmp_path / "Wan2.1_VAE.pth").read_bytes() == b"my own"
    assert _names(tmp_path) == ["Wan2.1_VAE.pth"]  # found before anything was downloaded


def test_a_full_disk_is_found_before_anything_is_downloaded(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(OutputError, match=r"1 MB are to be downloaded and 1 MB are free"):
        run_download(_options(tmp_path))

    assert _names(tmp_path) == []


def test_a_run_that_may_not_use_the_network_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        run_download(_options(tmp_path))
