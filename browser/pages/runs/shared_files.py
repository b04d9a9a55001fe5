"""Send a file of a run to a friend without its metadata: settings, captions, prompts and folders.

The file on disk is not changed. The bytes of the metadata are blanked in place while they are sent, so that
the file keeps its length, its tensors and the hash of its weights, and players can request parts of it.
"""

import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import BinaryIO, NamedTuple

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from browser.core.responses import SHOWN, answer_file
from modules.pages.page import mark_folders
from modules.text_files import read_tensor_header

PIECE_BYTES = 1 << 20
MAX_CHUNKS = 100_000  # maximum number of chunks of a media file
RANGE = re.compile(r"bytes=(?:(\d{1,15})-(\d{0,15})|-(\d{1,15}))")  # or how many of the last bytes
# metadata of a safetensors file that programs need to load it, or that the page shows
SENT_METADATA = re.compile(
    r"format|ss_network_(module|dim|alpha|args)|ss_base_model_version|ss_v2|reference_.*|lllite\..*|"
    r"ss_cond_emb_dim|ss_token_string|ss_num_vectors_per_token|sshs_.*|"
    r"modelspec\.(sai_model_spec|architecture|implementation|prediction_type|encoder_layer|title|license|"
    r"trigger_phrase)"
)
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME"}
PNG_BLANK = b"rsMd"  # chunk type that programs ignore
MP4_OUTER = {b"moov", b"trak", b"mdia", b"minf", b"moof", b"traf"}  # boxes with boxes in them
MP4_TEXTS = {b"udta", b"meta", b"uuid"}
WAV_TEXTS = {b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"axml"}


class Replacement(NamedTuple):
    """Bytes sent in place of `size` bytes of the file, to hide metadata; zeros if `data` is b""."""

    start: int
    size: int
    data: bytes = b""

    def cut(self, begin: int, end: int) -> bytes:
        """Return the replacement for the file's bytes from offset `begin` to `end`."""
        if self.data:
            return self.data[begin - self.start : end - self.start]
        return bytes(end - begin)


def answer_shared_file(path: Path, request: Request) -> Response:
    """Return a response with a file, or the requested byte range of it, without its metadata.

    The metadata is overwritten while the file is sent, so that its size does not change. A training may
    replace the file between two requests, and a file joined from two versions would have the right size. So
    ranges are sent only of samples, which players request, and only of the version that the client has
    (If-Range, RFC 9110 section 13.1.5); other files are always sent whole. Raises OSError if the file cannot
    be read.
    """
    file = path.open("rb")  # this version, even if the file is replaced while it is sent
    try:
        status = os.fstat(file.fileno())
        find = _FINDERS.get(path.suffix.lower())  # None for a file without metadata
        replacements = [] if find is None else list(find(file, status.st_size))
    except BaseException:
        file.close()
        raise
    version = f"{status.st_mtime_ns} {status.st_size} {replacements}"
    headers = {name: value for name, value in answer_file(path).headers.items() if name != "content-length"}
    headers |= {
        "etag": f'"{hashlib.sha256(version.encode()).hexdigest()[:32]}"',
        "last-modified": formatdate(status.st_mtime, usegmt=True),
        "accept-ranges": "bytes" if path.suffix in SHOWN else "none",
    }
    code = 200
    sent_range = range(status.st_size)
    has_version = request.headers.get("if-range", headers["etag"]) in (
        headers["etag"],
        headers["last-modified"],
    )
    if has_version and path.suffix in SHOWN:
        requested_range = _read_range(request.headers.get("range", ""), status.st_size)
        if requested_range is not None and not requested_range:
            file.close()
            return Response(status_code=416, headers={"content-range": f"bytes */{status.st_size}"})
        if requested_range is not None:
            code = 206  # partial content
            sent_range = requested_range
            headers["content-range"] = f"bytes {sent_range.start}-{sent_range.stop - 1}/{status.st_size}"
    headers["content-length"] = str(len(sent_range))
    pieces = _read_pieces(file, replacements, sent_range.start, sent_range.stop)
    return StreamingResponse(pieces, code, headers)


def _read_range(header: str, size: int) -> range | None:
    """Return the bytes that a Range header requests: none behind the end; None if it requests no range."""
    match = RANGE.fullmatch(header)
    if match is None:
        return None
    first, last, num_last = match.groups()
    if num_last is not None:  # the end of the file
        return range(max(0, size - int(num_last)), size)
    if last and int(last) < int(first):  # invalid, and so ignored
        return None
    return range(int(first), min(size, int(last) + 1) if last else size)


def _read_pieces(file: BinaryIO, replacements: list[Replacement], begin: int, end: int) -> Iterator[bytes]:
    """Yield bytes `begin` to `end` of an open file, with its metadata replaced, and close it."""
    with file:
        file.seek(begin)
        while begin < end and (piece := file.read(min(PIECE_BYTES, end - begin))):
            content = bytearray(piece)
            for replacement in replacements:
                first = max(begin, replacement.start)
                last = min(begin + len(piece), replacement.start + replacement.size)
                if first < last:
                    content[first - begin : last - begin] = replacement.cut(first, last)
            yield bytes(content)
            begin += len(piece)


def _find_in_tensors(file: BinaryIO, size: int) -> Iterator[Replacement]:
    """Yield the replacement of a safetensors header by one without metadata that must not be sent."""
    try:
        header = read_tensor_header(file.read, size)
    except ValueError:  # another kind of file has this name
        return
    public_texts = {
        name: text
        for name, text in header.metadata.items()
        if (SENT_METADATA.fullmatch(name) is not None and mark_folders(text) == text)
    }
    if public_texts == header.metadata:
        return
    header_length = header.start - 8  # the first 8 bytes of the file are this length
    # The new header must fit into the old one, because the tensors cannot move. If it does not fit with the
    # metadata that may be sent, all metadata is removed.
    for sent_texts in (public_texts, {}):
        metadata: Mapping[str, object] = {"__metadata__": sent_texts} if sent_texts else {}
        content = json.dumps({**metadata, **header.entries}, separators=(",", ":"), ensure_ascii=False)
        new_header = content.encode("utf-8", "replace")
        if len(new_header) <= header_length:
            yield Replacement(8, header_length, new_header.ljust(header_length))
            return
    raise OSError("its header cannot be written again")


def _find_in_png(file: BinaryIO, size: int) -> Iterator[Replacement]:
    """Yield the changes that turn text chunks of a PNG file into chunks of zeros that no program reads."""
    # A chunk consists of length (4 bytes), type (4 bytes), content and checksum (4 bytes).
    if file.read(8) != PNG_START:
        return
    start = len(PNG_START)
    for _ in range(MAX_CHUNKS):
        file.seek(start)
        header_bytes = file.read(8)
        if len(header_bytes) < 8:
            return
        length = int.from_bytes(header_bytes[:4], "big")
        kind = header_bytes[4:]
        next_chunk = start + 8 + length + 4  # 4: the checksum
        if next_chunk > size:
            return
        if kind in PNG_TEXTS:
            content = PNG_BLANK + bytes(length)
            checksum = struct.pack(">I", zlib.crc32(content))
            yield Replacement(start + 4, 8 + length, content + checksum)
        start = next_chunk


def _find_in_mp4(file: BinaryIO, size: int) -> Iterator[Replacement]:
    """Yield the changes that turn text boxes of an MP4 file into `free` boxes of zeros."""
    # Boxes may contain boxes (ISO 14496-12).
    unread = [(0, size)]  # start and end of sequences of boxes
    for _ in range(MAX_CHUNKS):
        if not unread:
            return
        start, end = unread.pop()
        box = _read_box(file, start, end)
        if box is None:
            continue
        unread.append((box.end, end))
        if box.kind in MP4_TEXTS:
            yield Replacement(start + 4, 4, b"free")  # the kind follows four bytes of length
            yield Replacement(box.content_start, box.end - box.content_start)
        elif box.kind in MP4_OUTER:
            unread.append((box.content_start, box.end))


class _Box(NamedTuple):
    """A box of an MP4 file: its type, and where its content begins and ends in the file."""

    kind: bytes
    content_start: int
    end: int


def _read_box(file: BinaryIO, start: int, end: int) -> _Box | None:
    """Read the header of a box: length (4 bytes), type (4 bytes), and maybe a longer length (8 bytes)."""
    # Returns None if no whole box is left before `end`.
    file.seek(start)
    header_bytes = file.read(16)
    if len(header_bytes) < 8 or start + 8 > end:
        return None
    length = int.from_bytes(header_bytes[:4], "big")
    header_length = 8
    if length == 1 and len(header_bytes) == 16:  # a large box: its length follows in 64 bits
        length = int.from_bytes(header_bytes[8:], "big")
        header_length = 16
    elif length == 0:  # up to the end of the file
        length = end - start
    if length < header_length or start + length > end:
        return None
    return _Box(header_bytes[4:8], content_start=start + header_length, end=start + length)


def _find_in_wav(file: BinaryIO, size: int) -> Iterator[Replacement]:
    """Yield the changes that turn text chunks of a WAV file into `JUNK` chunks of zeros."""
    # A chunk consists of type (4 bytes), length (4 bytes) and content.
    if file.read(4) not in (b"RIFF", b"RF64"):
        return
    start = 12  # after RIFF, the length and WAVE
    for _ in range(MAX_CHUNKS):
        file.seek(start)
        header_bytes = file.read(8)
        if len(header_bytes) < 8:
            return
        # a wrong length must not lead beyond the end of the file
        length = min(int.from_bytes(header_bytes[4:], "little"), size - start - 8)
        if header_bytes[:4] in WAV_TEXTS:
            yield Replacement(start, 4, b"JUNK")
            yield Replacement(start + 8, length)
        start += 8 + length + length % 2  # chunks begin at even positions


_FINDERS = {
    ".safetensors": _find_in_tensors,
    ".png": _find_in_png,
    ".mp4": _find_in_mp4,
    ".wav": _find_in_wav,
}
