"""Uploads never end a run; what is fetched from the hub is found where it was put."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest

from modules.errors import OptionError
from tests.training.toy import toy_options
from training.saving.hub import download_state, make_uploads


class Api:
    """Notes what it is asked."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def __call__(self, token: str | None) -> "Api":
        self.token = token
        return self

    def __getattr__(self, name: str) -> Any:
        def call(**arguments: Any) -> None:
            if self.fails:
                raise ConnectionError("no network")
            self.calls.append((name, arguments))

        return call


@pytest.mark.parametrize("background", [[], ["--async_upload"]])
def test_files_and_states_go_to_their_place_in_order(tmp_path: Path, background: list[str]) -> None:
    api = Api()
    arguments = [
        *("--huggingface_repo_id", "me/loras", "--huggingface_path_in_repo", "wan"),
        "--save_state_to_huggingface",
    ]
    arguments += ["--huggingface_repo_visibility", "public", "--huggingface_token", "secret", *background]
    uploads = make_uploads(toy_options(tmp_path, *arguments).hub, api)
    (tmp_path / "x-state").mkdir()

    uploads.publish(tmp_path / "x.safetensors")
    uploads.publish_state(tmp_path / "x-state")
    uploads.close()

    assert api.token == "secret"
    assert [name for name, _ in api.calls] == ["create_repo", "upload_file", "create_repo", "upload_folder"]
    assert api.calls[0][1] == {
        "repo_id": "me/loras",
        "repo_type": "model",
        "private": False,
        "exist_ok": True,
    }
    assert api.calls[1][1]["path_in_repo"] == "wan/x.safetensors"
    assert api.calls[3][1]["path_in_repo"] == "wan/x-state"


def test_a_run_that_fails_still_sends_what_it_saved(tmp_path: Path) -> None:
    api = Api()
    uploads = make_uploads(
        toy_options(tmp_path, "--huggingface_repo_id", "me/loras", "--async_upload").hub, api
    )

    def run() -> None:
        with contextlib.closing(uploads):
            uploads.publish(tmp_path / "x.safetensors")
            raise OptionError("something else")

    with pytest.raises(OptionError):
        run()

    assert [name for name, _ in api.calls] == ["create_repo", "upload_file"]


def test_a_failed_upload_is_reported_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uploads = make_uploads(toy_options(tmp_path, "--huggingface_repo_id", "me/loras").hub, Api(fails=True))

    with caplog.at_level(logging.ERROR):
        uploads.publish(tmp_path / "x.safetensors")

    assert "was saved but not uploaded to me/loras: no network" in caplog.text


def test_a_state_is_fetched_by_repository_path_revision_and_kind(tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(**arguments: Any) -> str:
        asked.update(arguments)
        (tmp_path / "runs" / "x-state").mkdir(parents=True)
        return str(tmp_path)

    folder = download_state("me/loras/runs/x-state:v2:dataset", "secret", tmp_path, download)

    assert folder == tmp_path / "runs" / "x-state"
    assert {key: asked[key] for key in ("repo_id", "revision", "repo_type", "allow_patterns", "token")} == {
        **{"repo_id": "me/loras", "revision": "v2", "repo_type": "dataset"},
        **{"allow_patterns": "runs/x-state/*", "token": "secret"},
    }


@pytest.mark.parametrize("place", ["x-state", "me/loras", "me/loras:main"])
def test_a_place_without_a_path_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(OptionError, match=r"owner/repo/path"):
        download_state(place, None, tmp_path, lambda **_: "")
