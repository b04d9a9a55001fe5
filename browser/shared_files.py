"""Send a file of a run to a friend without its metadata: settings, captions, prompts and folders.

The file on disk is not changed. The bytes of the metadata are blanked in place while they are sent, so that
the file keeps its length, its tensors and the hash of its weights, and players can request parts of it.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from browser.responses import answer_file
from modules.pages.page import mark_folders
from modules.text_files import read_tensor_header

PIECE_BYTES = 1 << 20
MAX_CHUNKS = 100_000  # maximum number of chunks of a media file
RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")
# entries of a safetensors file that programs need to load it, or that stand on the page
KEPT = re.compile(
    r"format|ss_network_(module|dim|alpha|args)|ss_base_model_version|ss_v2|reference_.*|lllite\..*|"
    r"ss_cond_emb_dim|ss_token_string|ss_num_vectors_per_token|sshs_.*|"
    r"modelspec\.(sai_model_spec|architecture|implementation|prediction_type|encoder_layer|title|license|"
    r"trigger_phrase)"
)
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME"}
PNG_BLANK = b"rsMd"  # a chunk that programs skip
MP4_OUTER = {b"moov", b"trak", b"mdia", b"minf", b"moof", b"traf"}  # boxes with boxes in them
MP4_TEXTS = {b"udta", b"meta", b"uuid"}
WAV_TEXTS = {b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"axml"}


class Blank(NamedTuple):
    """Bytes sent in place of those of a file; `data` is b"" for `size` zeros."""

    start: int
    size: int
    data: bytes = b""

    def cut(self, begin: int, end: int) -> bytes:
        """Return the replaced bytes between two offsets of the file."""
        if self.data:
            return self.data[begin - self.start : end - self.start]
        return bytes(end - begin)


def answer_shared_file(path: Path, request: Request) -> Response:
    """Return a file without its metadata, or the range that the request asks for.

    Raises OSError if it cannot be read.
    """
    size = path.stat().st_size
    blanks = find_blanks(path)
    headers = {name: value for name, value in answer_file(path).headers.items() if name != "content-length"}
    begin, end, status = 0, size, 200
    asked = RANGE.fullmatch(request.headers.get("range", ""))
    if asked is not None and int(asked[1]) < size:
        begin = int(asked[1])
        end = min(size, int(asked[2]) + 1) if asked[2] else size
        status = 206
        if end <= begin:
            begin, end, status = 0, size, 200
        else:
            headers["content-range"] = f"bytes {begin}-{end - 1}/{size}"
    headers |= {"content-length": str(end - begin), "accept-ranges": "bytes"}
    return StreamingResponse(_read_pieces(path, blanks, begin, end), status, headers)


def _read_pieces(path: Path, blanks: list[Blank], begin: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end and (piece := file.read(min(PIECE_BYTES, end - begin))):
            content = bytearray(piece)
            for blank in blanks:
                first = max(begin, blank.start)
                last = min(begin + len(piece), blank.start + blank.size)
                if first < last:
                    content[first - begin : last - begin] = blank.cut(first, last)
            yield bytes(content)
            begin += len(piece)


def find_blanks(path: Path) -> list[Blank]:
    """Return what is sent in place of a file's metadata; [] for a file without.

    Raises OSError if it cannot be read.
    """
    find = _FINDERS.get(path.suffix.lower())
    if find is None:
        return []
    with path.open("rb") as file:
        return list(find(file, path.stat().st_size))


def _find_in_tensors(file: BinaryIO, size: int) -> Iterator[Blank]:
    try:
        header = read_tensor_header(file.read, size)
    except ValueError:  # another kind of file has this name
        return
    texts = {name: text for name, text in header.metadata.items() if _may_be_sent(name, text)}
    if texts == header.metadata:
        return
    length = header.start - 8
    # The new header must fit into the old one, because tensors stay where they are. If it does not fit with
    # the texts that may be sent, all texts are removed.
    for kept in (texts, {}):
        metadata: Mapping[str, object] = {"__metadata__": kept} if kept else {}
        content = json.dumps({**metadata, **header.entries}, separators=(",", ":"), ensure_ascii=False)
        data = content.encode("utf-8", "replace")
        if len(data) <= length:
            yield Blank(8, length, data.ljust(length))
            return
    raise OSError("its header cannot be written again")


def _may_be_sent(name: str, text: str) -> bool:
    return KEPT.fullmatch(name) is not None and mark_folders(text) == text


def _find_in_png(file: BinaryIO, size: int) -> Iterator[Blank]:
    if file.read(8) != PNG_START:
        return
    at = 8
    for _ in range(MAX_CHUNKS):
        file.seek(at)
        start = file.read(8)
        if len(start) < 8:
            return
        length, kind = int.from_bytes(start[:4], "big"), start[4:]
        if at + 12 + length > size:
            return
        if kind in PNG_TEXTS:
            content = PNG_BLANK + bytes(length)
            yield Blank(at + 4, 8 + length, content + struct.pack(">I", zlib.crc32(content)))
        at += 12 + length


def _find_in_mp4(file: BinaryIO, size: int) -> Iterator[Blank]:
    waiting = [(0, size)]
    for _ in range(MAX_CHUNKS):
        if not waiting:
            return
        at, end = waiting.pop()
        file.seek(at)
        start = file.read(16)
        if len(start) < 8 or at + 8 > end:
            continue
        length, kind, head = int.from_bytes(start[:4], "big"), start[4:8], 8
        if length == 1 and len(start) == 16:
            length, head = int.from_bytes(start[8:], "big"), 16
        elif length == 0:
            length = end - at
        if length < head or at + length > end:
            continue
        waiting.append((at + length, end))
        if kind in MP4_TEXTS:
            yield Blank(at + 4, 4, b"free")
            yield Blank(at + head, length - head)
        elif kind in MP4_OUTER:
            waiting.append((at + head, at + length))


def _find_in_wav(file: BinaryIO, size: int) -> Iterator[Blank]:
    if file.read(4) not in (b"RIFF", b"RF64"):
        return
    at = 12
    for _ in range(MAX_CHUNKS):
        file.seek(at)
        start = file.read(8)
        if len(start) < 8:
            return
        length = min(int.from_bytes(start[4:], "little"), size - at - 8)
        if start[:4] in WAV_TEXTS:
            yield Blank(at, 4, b"JUNK")
            yield Blank(at + 8, length)
        at += 8 + length + length % 2


_FINDERS = {
    ".safetensors": _find_in_tensors,
    ".png": _find_in_png,
    ".mp4": _find_in_mp4,
    ".wav": _find_in_wav,
}
