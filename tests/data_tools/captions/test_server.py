"""Captions from a server: what it is asked, when it is asked again, and that the key shows nowhere."""

import base64
import gc
import io
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.captions.asking import NoCaptionError
from data_tools.captions.places import find_caption_locations
from data_tools.captions.run import run_captioning
from data_tools.captions.server import ApiServer
from dataset.config import load_dataset_config
from modules.errors import UserError
from tests.data_tools.captions.making import make_folder, options_of, read_captions, run_server
from tests.waiting import PATIENCE

SECRET = "sk-test-0123456789"


def run(config: Path, address: str, *words: object) -> None:
    given = ("--api_base", address, "--api_model", "mine", *words)
    run_captioning(load_dataset_config(config), options_of(config, *given))


def test_a_request_holds_prompt_frames_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
    config = make_folder(tmp_path)
    words = ("--prompt", "what is it?", "--system_prompt", "be short", "--max_new_tokens", "17")
    with run_server(lambda number, body: " a\ncat ") as server:
        run(config, f"{server.address}/", *words, "--temperature", "0.5", "--seed", "3", "--api_workers", "1")

    assert read_captions(tmp_path) == dict.fromkeys(["a", "b b", "ç"], "a cat")
    assert server.paths == ["/v1/chat/completions"] * 3
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    body = server.bodies[0]
    system, user = body.pop("messages")
    assert body == {"model": "mine", "max_tokens": 17, "temperature": 0.5, "seed": 3}
    assert system == {"role": "system", "content": "be short"}
    image, text = user["content"]
    assert text == {"type": "text", "text": "what is it?"}
    start, data = image["image_url"]["url"].split(",")
    assert start == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (32, 32)
    assert max(abs(a - b) for a, b in zip(picture.getpixel((9, 9)), (200, 20, 20), strict=True)) < 8  # type: ignore[arg-type]


def test_requests_wait_together_and_need_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a server on this machine is asked directly
    gate = threading.Barrier(3, timeout=PATIENCE)

    def reply(number: int, body: dict[str, Any]) -> str:
        gate.wait()
        return "a cat"

    config = make_folder(tmp_path)
    with run_server(reply) as server:
        run(config, server.address, "--api_workers", "3")

    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status: int, tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    with run_server(lambda number, _: (status, "busy") if number < 2 else "a cat", "0.01") as server:
        run(config, server.address, "--api_workers", "1")

    assert len(server.bodies) == 5
    assert len(read_captions(tmp_path)) == 3


def test_the_end_of_a_run_waits_for_no_answer_and_refusals_are_not_kept(tmp_path: Path) -> None:
    gate = threading.Event()

    def reply(number: int, body: dict[str, Any]) -> tuple[int, str]:
        assert not number or gate.wait(PATIENCE)
        return 422, "this image is refused"

    config = make_folder(tmp_path)
    places = find_caption_locations(load_dataset_config(config), False)
    with run_server(reply) as server:
        options = options_of(config, "--api_base", server.address, "--api_model", "m")
        answers = ApiServer(options.api, options.ask, {}).caption(places, lambda _: ())
        _, error = next(answers)
        assert isinstance(error, NoCaptionError)
        kept = weakref.ref(error)
        del error
        waiting = [one for one in threading.enumerate() if one.name.startswith("request")]
        assert waiting
        assert all(one.daemon for one in waiting)  # the end of the program leaves them to themselves
        gate.set()
        next(answers)
        gc.collect()
        assert kept() is None
        answers.close()


def test_another_address_is_neither_read_nor_followed(tmp_path: Path) -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://[::::\r\nContent-Length: 2\r\n\r\nno"
    with (
        run_server(lambda *_: answer) as server,
        pytest.raises(UserError, match="302 and redirects"),
    ):
        _ask(server.address, make_folder(tmp_path))


BROKEN = {
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "too short": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
    "a negative chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}\r\n",
    "packed twice": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: 2\r\n\r\n{}",
    "an odd wait": b"HTTP/1.1 503 Busy\r\nRetry-After: nan\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_costs_its_caption_only(answer: bytes, tmp_path: Path) -> None:
    with run_server(lambda *_: answer) as server, pytest.raises(NoCaptionError):
        _ask(server.address, make_folder(tmp_path))


def _ask(address: str, config: Path) -> str:
    options = options_of(config, "--api_base", address, "--api_model", "m")
    server = ApiServer(options.api, options.ask, {})
    server.first_retry_seconds = 0.001
    return server.request_caption(find_caption_locations(load_dataset_config(config), False)[0], ())


def test_where_no_server_is_the_message_says_so_at_once(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    with pytest.raises(UserError, match="nothing answers at http://127.0.0.1:9/v1/chat/completions"):
        run(config, "http://127.0.0.1:9/v1")


@pytest.mark.parametrize("status", [200, 302, 401])
def test_the_key_is_in_no_message(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    config = make_folder(tmp_path)
    told: list[str] = []

    def reply(number: int, body: dict[str, Any]) -> tuple[int, str]:
        told.append(server.headers[number]["Authorization"])
        return status, f"you sent {told[-1]}"

    with run_server(reply, "0") as server, pytest.raises(UserError) as error:
        run(config, server.address, "--api_workers", "1")

    assert SECRET in told[0]
    assert "you sent Bearer (the key)" in str(error.value) or status == 302
    for text in (str(error.value), caplog.text, repr(error.value.__context__)):
        assert SECRET not in text
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in kept)


def test_the_key_does_not_travel_unencrypted_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = options_of(make_folder(tmp_path), "--api_base", "http://host/v1", "--api_model", "m")

    ApiServer(options.api, options.ask, {})
    assert not caplog.text
    ApiServer(options.api, options.ask, {"OPENAI_API_KEY": SECRET})
    assert "without encryption" in caplog.text
