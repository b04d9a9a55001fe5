"""A job that lasts until somebody ends it: a download from a site that never answers."""

import socket
from collections.abc import Iterator

import pytest

LASTING = ["python", "tools/download.py", "--family", "wan", "--task", "t2v-1.3B", "--to"]


@pytest.fixture
def lasting(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The words of the command. What it would write lies in a folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "600")  # seconds
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield [*LASTING, str(tmp_path_factory.mktemp("loaded"))]
