"""Addresses: what may be shown of them, and that each is downloaded once, whole, and by one process."""

import io
import json
import logging
import os
import random
import re
import tarfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import requests

from dataset.forms.tars_index import FOLDER, MIN_SAMPLES, TarDamage, read_members
from dataset.forms.tars_listing import expand_braces
from dataset.listing import find_sources
from dataset.sources.decoding import decode_source
from dataset.sources.downloads import download, protocol_error
from dataset.sources.fetching import fetch
from dataset.sources.media_source import Fault, MediaSource, local_name
from modules.errors import DatasetError, MediaError
from modules.paths import address_identity, hide_secrets, is_address
from tests.dataset.making import make_table
from tests.dataset.serving import Site, site

__all__ = ["site"]
CONTENT = bytes(range(256)) * 800
SECRET = "https://user:pa55word@host.org/a/cat%201.png?X-Amz-Signature=s1gnature&id=7#part"


def nothing(seconds: float) -> None:
    """Instead of waiting."""


def test_passwords_and_queries_are_never_shown() -> None:
    shown = "https://host.org/a/cat%201.png?..."
    assert hide_secrets(f'see "{SECRET}", twice') == f'see "{shown}", twice'
    assert hide_secrets(str(Path(SECRET))) == shown.replace("//", "/")
    assert hide_secrets("C:\\data and a/b@c and 1:2") == "C:\\data and a/b@c and 1:2"
    assert address_identity(SECRET) == "https://host.org/a/cat%201.png?id=7"
    assert all(map(is_address, ("s3://b/k", "simplecache::s3://b")))
    assert not any(map(is_address, ("C:/data", "a/b://c")))


def test_a_downloaded_file_is_named_by_its_address_without_what_signs_it() -> None:
    name = local_name(SECRET)
    assert name.startswith("cat 1-")
    assert name.endswith(".png")
    assert local_name(SECRET.replace("s1gnature", "other").replace("pa55word", "new")) == name
    assert local_name(SECRET.replace("id=7", "id=8")) != name
    assert local_name("https://host.org") == local_name("https://HOST.org")
    long = local_name(f"https://host.org/{'ü' * 300}.mp4")
    assert len(long.encode()) < 200


def test_a_site_that_fails_twice_and_one_that_breaks_in_the_middle(tmp_path: Path, site: Site) -> None:
    (site.folder / "a.png").write_bytes(CONTENT)
    (site.folder / "b.png").write_bytes(CONTENT)
    site.fails["a.png"] = 2
    site.cuts["b.png"] = 2
    waited: list[float] = []

    for name in ("a.png", "b.png"):
        download(f"{site.url}/{name}", tmp_path / "kept" / name, waited.append)
        assert (tmp_path / "kept" / name).read_bytes() == CONTENT

    assert site.asked == ["a.png", "a.png", "a.png", "b.png", "b.png@100000", "b.png@200000"]
    assert waited == [0.5, 1.0, 0.5, 0.5]  # what brings data counts anew
    download(f"{site.url}/a.png", tmp_path / "kept" / "a.png")
    assert len(site.asked) == 6


@pytest.mark.parametrize(("change", "heeds"), [(b"x" * 300_000, False), (b"short", True), (b"short", False)])
def test_a_file_that_changes_between_two_tries_is_not_put_together_from_both(
    change: bytes, heeds: bool, tmp_path: Path, site: Site
) -> None:
    (site.folder / "a.png").write_bytes(CONTENT)
    site.cuts["a.png"], site.heeds_version = 1, heeds

    def write_another(seconds: float) -> None:
        (site.folder / "a.png").write_bytes(change)
        site.version = '"two"'

    download(f"{site.url}/a.png", tmp_path / "a.png", write_another)

    assert (tmp_path / "a.png").read_bytes() == change


def test_a_site_cannot_pass_on_to_a_file_of_this_machine_or_to_an_address_without_encryption(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    site.passes["b.png"] = (tmp_path / "secret.txt").as_uri()
    with pytest.raises(MediaError, match="not a valid address"):
        download(f"{site.url}/b.png", tmp_path / "b.png", nothing)

    (site.folder / "a.png").write_bytes(CONTENT)
    get = requests.Session.get

    def passed_on(self: Any, address: str, **settings: Any) -> Any:  # as a site that answers 302
        return get(self, address.replace("https", "http"), **settings)

    monkeypatch.setattr(requests.Session, "get", passed_on)
    with pytest.raises(MediaError, match="without encryption"):
        download(f"{site.url.replace('http', 'https')}/a.png", tmp_path / "a.png", nothing)


def test_what_cannot_be_had_is_told_without_secrets_and_leaves_no_file(tmp_path: Path, site: Site) -> None:
    (site.folder / "a.png").write_bytes(CONTENT)
    site.fails["a.png"] = 3
    user = site.url.replace("//", "//user:pa55word@")
    for name, why in (
        ("a.png?sig=s1gnature", r"a.png\?... cannot be downloaded: the site answers 503 \(3 tries\)"),
        ("gone.png?sig=s1gnature", "the site answers 404: not found"),
    ):
        with pytest.raises(MediaError, match=why) as caught:
            download(f"{user}/{name}", tmp_path / "kept" / "x.png", nothing)
        assert not re.search("pa55word|s1gnature", str(caught.value))
    assert len(site.asked) == 4  # what is missing stays so
    assert all(site.auth)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == []


def test_fsspec_reads_all_other_addresses(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/a.png", CONTENT)
    download("memory://bucket/a.png", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == CONTENT
    with pytest.raises(MediaError, match=r"memory://bucket/b.png cannot be downloaded: nothing is there"):
        download("memory://bucket/b.png", tmp_path / "b.png", nothing)
    with pytest.raises(MediaError, match="memory://bucket cannot be downloaded: it is a folder"):
        download("memory://bucket", tmp_path / "c.png", nothing)
    assert protocol_error("reference") == "reference:// addresses are not supported"
    assert protocol_error("nonsense") == "nonsense:// addresses are not supported"
    assert "s3fs" in str(protocol_error("s3")) or protocol_error("s3") is None


def test_threads_that_want_the_same_file_download_it_once(tmp_path: Path, site: Site) -> None:
    (site.folder / "a.png").write_bytes(CONTENT)
    path = tmp_path / "kept" / "a.png"
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: download(f"{site.url}/a.png", path), range(6)))
    assert site.asked == ["a.png"]
    assert path.read_bytes() == CONTENT


def test_a_table_from_elsewhere_asks_for_no_address_unless_it_is_told_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "list.jsonl").write_text(
        f'{{"image_path": "{SECRET}", "caption": "x"}}\n{{"image_path": "http://h/k.png", "caption": "y"}}\n',
        encoding="utf-8",
    )
    for source in ("image_jsonl_file", "image_table_file"):
        table = make_table(tmp_path, source)
        with pytest.raises(DatasetError, match=r"2 (lines|rows) of .* cannot .*allow_urls = true") as caught:
            find_sources(table)
        assert "host.org/a/cat%201.png?..." in str(caught.value)
        assert not re.search("pa55word|s1gnature", str(caught.value) + caplog.text)
    one = find_sources(make_table(tmp_path, "image_jsonl_file", allow_urls=True))[0]
    assert (one.stem, one.path.parent.name) == ("cat 1", "downloads")
    assert not re.search("pa55word|s1gnature", repr(one))


def test_an_address_of_a_file_is_its_path(tmp_path: Path) -> None:
    row = {"image_path": (tmp_path / "a b.png").as_uri()}
    (tmp_path / "list.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (one,) = find_sources(make_table(tmp_path, "image_jsonl_file", allow_urls=True))
    assert (one.path, one.remote_or_packed) == (tmp_path / "a b.png", ())


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("simplecache::https://host.org/a.png", "chains of addresses"),
        ("zip://a.png::https://host.org/a.zip", "not supported"),
        ("nonsense://host/a.png", "nonsense:// addresses are not supported"),
    ],
)
def test_addresses_that_lead_elsewhere_are_refused(tmp_path: Path, address: str, why: str) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"image_path": "{address}", "caption": ""}}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=why):
        find_sources(make_table(tmp_path, "image_jsonl_file", allow_urls=True))


Files = Mapping[str, bytes | str]
SAMPLE = 2 * 3 * 512  # bytes of two members, each a header and two blocks
PADDING = 1024 - 700
LONG = "folder/" * 20 + "ü" * 60


def write_tar(path: Path, files: Files, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def table_of(folder: Path, *tars: str | Path, **changes: Any) -> Any:
    return make_table(folder, "image_directory", directory=None, tars=tuple(map(str, tars)), **changes)


def listed(folder: Path, *tars: str | Path, **changes: Any) -> tuple[list[MediaSource], list[Fault]]:
    errors: list[Fault] = []
    return find_sources(table_of(folder, *tars, **changes), faults=errors), errors


def content_of(source: MediaSource) -> bytes:
    with fetch(source) as here:
        return here.path.read_bytes()


def test_ranges_of_names_are_spelled_out() -> None:
    assert expand_braces("c-{008..011}.tar", "") == ["c-008.tar", "c-009.tar", "c-010.tar", "c-011.tar"]
    assert expand_braces("{a,b}{2..1}", "") == ["a2", "a1", "b2", "b1"]
    for many in ("{0..999999999999}", "{0..999}{0..999}"):
        with pytest.raises(DatasetError, match="expands to more than 100,000 names"):
            expand_braces(many, "data.toml")


def test_samples_are_the_files_of_one_name_up_to_the_first_dot(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a-0.tar",
        {
            "x/1.jpg": b"one",
            "x/1.txt": " first \r\n",
            "x/1.json": json.dumps({"caption": "other"}),
            "x/2.512.png": b"two",
            "x/2.json": json.dumps({"prompt": "second"}),
            "x/._2.png": b"of a Mac",
            "3.seg.png": b"three",
            "4.json": "{}",
        },
    )
    write_tar(tmp_path / "a-1.tar", {"x/1.jpg": b"again", "x/1.mask.png": b"m"})

    sources, errors = listed(tmp_path, tmp_path / "a-*.tar")

    assert errors == []
    by_caption = {source.caption: source for source in sources}
    assert [by_caption[one].stem.split("-")[0] for one in ("first", "second")] == ["x_1", "x_2"]
    assert len({source.stem for source in sources}) == 4  # x/1 is in both tars
    assert sorted(map(content_of, sources)) == [b"again", b"one", b"three", b"two"]
    assert by_caption["second"].path == tmp_path / "a-0.tar" / "x" / "2.512.png"
    assert [one.mask for one in sources if one.mask] == [tmp_path / "a-1.tar" / "x" / "1.mask.png"]

    both = write_tar(tmp_path / "j.tar", {"1.png": b"", "1.txt": "t", "1.json": '{"k": "j"}'})
    (one,), _ = listed(tmp_path, both, caption_column="k")
    assert one.caption == "j"
    many = write_tar(tmp_path / "m.tar", {"1.png": b"", "1.txt": "a\n\nb\n"})
    (one,), _ = listed(tmp_path, many, multi_caption=True, trigger_word="ohwx")
    assert (one.caption, one.more_captions) == ("ohwx, a", ("ohwx, b",))


def test_a_cut_tar_gives_what_is_before_the_cut_wherever_it_is(tmp_path: Path) -> None:
    files = {f"{index}.{end}": bytes([index]) * 700 for index in range(4) for end in ("png", "jpgx")}
    full = write_tar(tmp_path / "w.tar", files).read_bytes()
    for size in range(0, 4 * SAMPLE + 1, 256):
        (tmp_path / "t.tar").write_bytes(full[:size])
        sources, errors = listed(tmp_path, tmp_path / "t.tar")
        assert [error.is_fatal for error in errors] == [False], size
        assert all(content_of(one) == bytes([int(one.stem)]) * 700 for one in sources)
        # whether the first one is whole is not known before the second begins
        expected = 0 if size < SAMPLE + 512 + 700 else (size + PADDING) // SAMPLE
        assert len(sources) == expected, size
    assert len(listed(tmp_path, tmp_path / "w.tar")[0]) == 4


def test_a_damaged_picture_is_called_by_its_place_in_the_tar(tmp_path: Path) -> None:
    (one,), _ = listed(tmp_path, write_tar(tmp_path / "t.tar", {"x/1.png": b"no picture"}))
    with pytest.raises(MediaError, match=r"t.tar.x.1.png is not an image"):
        decode_source(one, 16.0)


def test_the_times_of_an_incremental_backup_are_no_part_of_its_names(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("./1.png").tobuf(tarfile.GNU_FORMAT))
    header[345:369] = b"15300655051\x0015300655051\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "t.tar"
    path.write_bytes(bytes(header) + bytes(1024))

    sources, errors = listed(tmp_path, path)

    assert errors == []
    assert [one.path.name for one in sources] == ["1.png"]


def hostile(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 3) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return header + (b"abc".ljust(512, b"\0") if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else b"")


def test_hostile_names_lead_nowhere(tmp_path: Path) -> None:
    names = ["/etc/passwd.png", "../../up.png", "a/../../b.png", "C:\\x.png", "c\n\x1b[31m.png"]
    names += ["d\u202e.png", "\udcff.png", "..png", "CON.png", " .png", "e" * 300 + ".png"]
    # some programs state the size of what a link leads to, and no data follow
    content = hostile("first.png", tarfile.LNKTYPE, "/etc/passwd", 700)
    content += b"".join(hostile(name) for name in names)
    content += hostile("link.png", tarfile.SYMTYPE, "/etc/passwd", 0)
    content += hostile("hard.png", tarfile.LNKTYPE, "/etc/passwd", 0)
    content += hostile("device.png", tarfile.CHRTYPE, size=0) + hostile("pipe.png", tarfile.FIFOTYPE, size=0)
    content += hostile("folder.png", tarfile.DIRTYPE, size=0)
    path = tmp_path / "t.tar"
    path.write_bytes(content + bytes(1024))
    before = sorted(tmp_path.rglob("*"))

    sources, errors = listed(tmp_path, path)

    assert errors == []
    assert len(sources) == len(names) - 1  # "..png" has no name before the dot
    for one in sources:
        assert one.path.is_relative_to(path)
        assert ".." not in one.path.parts
        assert one.stem.isprintable()
        assert not set(one.stem) & set('/\\:*?"<>|')
        assert len(one.stem.encode()) <= 140
        assert content_of(one) == b"abc"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "data.toml"])


def test_a_damaged_tar_never_gives_another_error(tmp_path: Path) -> None:
    rng, files = random.Random(0), {f"{LONG}{index}.png": b"x" * 99 for index in range(5)}
    full = write_tar(tmp_path / "w.tar", files).read_bytes()
    for _ in range(180):
        content = bytearray(full)
        for _ in range(rng.randint(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        with io.BytesIO(bytes(content)) as file:
            try:
                found = list(read_members(file, len(content)))
            except TarDamage:
                continue
        assert all(one.offset + one.size_bytes <= len(content) for one in found)


def test_the_index_of_a_large_tar_is_kept_until_the_tar_changes(tmp_path: Path) -> None:
    count = MIN_SAMPLES
    files = {f"{index:05d}.{end}": f"{end} {index}" for index in range(count) for end in ("png", "txt")}
    path = write_tar(tmp_path / "t.tar", files | {"00000.mask.png": "m"}, tarfile.USTAR_FORMAT)
    cache = tmp_path / "cache"

    first, _ = listed(tmp_path, path, cache_directory=cache)
    (kept,) = (cache / FOLDER).iterdir()
    made = kept.stat().st_mtime_ns
    again, _ = listed(tmp_path, path, cache_directory=cache)

    assert kept.stat().st_mtime_ns == made
    assert len(first) == count
    assert [replace(one, table=first[0].table) for one in again] == first
    for change in (lambda: os.utime(path, ns=(1, 1)), lambda: kept.write_bytes(kept.read_bytes()[:-9])):
        made = kept.stat().st_mtime_ns
        change()
        assert len(listed(tmp_path, path, cache_directory=cache)[0]) == count
        assert kept.stat().st_mtime_ns != made
    # what is a caption depends on the table
    assert listed(tmp_path, path, cache_directory=cache, caption_extension=".cap")[0][0].caption is None
    assert listed(tmp_path, path, cache_directory=cache, caption_extension=".txt")[0][0].caption == "txt 0"


@pytest.mark.parametrize("piece", ["x", "x1", "a.", "aa:", "aa:/", "1", "+-"])
def test_secrets_of_a_long_text_are_hidden_at_once(piece: str) -> None:
    text = piece * 200_000
    began = time.process_time()

    assert "pa55word" not in hide_secrets(f"{text} {SECRET}")

    assert time.process_time() - began < 5  # seconds; it was hours
