"""Datasets without captions, and options as they are typed."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from data_tools.captions.run import CaptioningOptions
from modules.script_options import parse_options
from tests.dataset.making import make_image
from tests.servers import run_handler

COLOURS = {"a": (200, 20, 20), "b b": (20, 200, 20), "ç": (20, 20, 200)}


def make_folder(folder: Path, captions: dict[str, str] | None = None, extension: str | None = ".txt") -> Path:
    """Three images, of which some have captions; returns the configuration."""
    images = folder / "im ages"
    images.mkdir()
    for name, color in COLOURS.items():
        make_image(images / f"{name}.png", colour=color)
    for name, text in (captions or {}).items():
        (images / f"{name}.txt").write_text(text, encoding="utf-8")
    config = folder / "data.toml"
    key = "" if extension is None else f"caption_extension = {extension!r}\n"
    config.write_text(f"[[datasets]]\nimage_directory = {str(images)!r}\n{key}", encoding="utf-8")
    return config


def make_list(folder: Path, lines: list[str] | None = None, keys: str = "") -> Path:
    """The same as a JSONL list. lines: `{}` becomes the path of an image."""
    for name, color in COLOURS.items():
        make_image(folder / f"{name}.png", colour=color)
    lines = ['{"image_path": {}}'] * 3 if lines is None else lines
    paths = [json.dumps(str(folder / f"{name}.png"), ensure_ascii=False) for name in COLOURS]
    text = "".join(f"{line.replace('{}', path)}\n" for line, path in zip(lines, paths, strict=True))
    (folder / "list.jsonl").write_text(text, encoding="utf-8", newline="")
    config = folder / "data.toml"
    where = (
        f"image_jsonl_file = {str(folder / 'list.jsonl')!r}\ncache_directory = {str(folder / 'cache')!r}\n"
    )
    config.write_text(f"[[datasets]]\n{where}{keys}\n", encoding="utf-8")
    return config


def read_captions(folder: Path) -> dict[str, str]:
    """The captions of `make_folder` by name."""
    return {
        path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / "im ages").glob("*.txt"))
    }


def read_lines(folder: Path) -> list[dict[str, object]]:
    """The lines of `make_list`."""
    return [
        json.loads(line) for line in (folder / "list.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]


def everything_in(folder: Path) -> dict[Path, bytes]:
    """All files of a folder and what is in them."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def options_of(config: Path, *words: object) -> CaptioningOptions:
    """Options as from the command line."""
    argv = ["--dataset_config", str(config), *map(str, words)]
    return parse_options("", argv, CaptioningOptions)[0]


# the number of the request, from 0, and what it asks -> status and JSON text, a caption, or the raw answer
Reply = Callable[[int, dict[str, Any]], tuple[int, str] | str | bytes]


@dataclass
class FakeServer:
    """Remembers what it was asked."""

    address: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def caption(text: Any, finish: str = "stop") -> tuple[int, str]:
    """The answer of a server with a caption."""
    message = {"role": "assistant", "content": text}
    return 200, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}]})


@contextmanager
def run_server(reply: Reply, retry_after: str | None = None) -> Iterator[FakeServer]:
    """Answer requests until the block ends. retry_after: a header of answers that are errors."""
    seen = FakeServer()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.bodies)
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.paths.append(self.path)
            answer = reply(number, body)
            with suppress(OSError):  # the program that asked may be gone
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                else:
                    self._send(*(caption(answer) if isinstance(answer, str) else answer))

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            if status != 200 and retry_after is not None:
                self.send_header("Retry-After", retry_after)
            if 300 <= status < 400:
                self.send_header("Location", "/elsewhere")
            content = text.encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with run_handler(Handler) as address:
        seen.address = f"{address}/v1"
        yield seen
