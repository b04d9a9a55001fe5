"""Addresses: what may be shown of them, and that each is downloaded once, whole, and by one process."""

import logging
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
import requests

from dataset.sources.fetching import download, protocol_problem
from dataset.sources.listing import find_sources
from dataset.sources.media_source import local_name
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
    assert [is_address(text) for text in ("s3://b/k", "C:/data", "a/b://c", "simplecache::s3://b")] == [
        *(True, False, False, True)
    ]


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

    assert site.asked == ["a.png", "a.png", "a.png", "b.png", "b.png@65536", "b.png@131072"]
    assert waited == [0.5, 1.0, 0.5, 0.5]  # what brings data counts anew
    download(f"{site.url}/a.png", tmp_path / "kept" / "a.png")
    assert len(site.asked) == 6


@pytest.mark.parametrize("heeds", [True, False])
@pytest.mark.parametrize("change", [b"x" * 300_000, b"short"])
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


def test_a_site_cannot_pass_on_to_an_address_without_encryption(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        ("gone.png?sig=s1gnature", "the site answers 404: nothing is there"),
    ):
        with pytest.raises(MediaError, match=why) as caught:
            download(f"{user}/{name}", tmp_path / "kept" / "x.png", nothing)
        assert "s1gnature" not in str(caught.value)
        assert "pa55word" not in str(caught.value)
    assert len(site.asked) == 4  # what is missing stays so
    assert all(site.auth)
    assert [path.name for path in (tmp_path / "kept").iterdir() if path.suffix != ".lock"] == []


def test_a_site_cannot_pass_on_to_a_file_of_this_machine(tmp_path: Path, site: Site) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    site.passes["a.png"] = (tmp_path / "secret.txt").as_uri()
    with pytest.raises(MediaError, match="no address that can be asked for"):
        download(f"{site.url}/a.png", tmp_path / "a.png", nothing)


def test_fsspec_reads_all_other_addresses(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/a.png", CONTENT)
    download("memory://bucket/a.png", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == CONTENT
    with pytest.raises(MediaError, match=r"memory://bucket/b.png cannot be downloaded: nothing is there"):
        download("memory://bucket/b.png", tmp_path / "b.png", nothing)
    with pytest.raises(MediaError, match="memory://bucket cannot be downloaded: it is a folder"):
        download("memory://bucket", tmp_path / "c.png", nothing)
    assert protocol_problem("reference") == "reference:// addresses are not read"
    assert protocol_problem("nonsense") == "nonsense:// addresses are not read"
    assert "s3fs" in str(protocol_problem("s3")) or protocol_problem("s3") is None


def test_threads_that_want_the_same_file_download_it_once(tmp_path: Path, site: Site) -> None:
    (site.folder / "a.png").write_bytes(CONTENT)
    folder = tmp_path / "kept"
    threads = [
        threading.Thread(target=download, args=(f"{site.url}/a.png", folder / "a.png")) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.asked == ["a.png"]
    assert (folder / "a.png").read_bytes() == CONTENT


def test_a_table_from_elsewhere_asks_for_no_address_unless_it_is_told_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "list.jsonl").write_text(
        f'{{"image_path": "{SECRET}", "caption": "x"}}\n{{"image_path": "s3://b/k.png", "caption": "y"}}\n',
        encoding="utf-8",
    )
    for source in ("image_jsonl_file", "image_table_file"):
        table = make_table(tmp_path, source)
        with pytest.raises(DatasetError, match=r"2 (lines|rows) of .* cannot .*allow_urls = true") as caught:
            find_sources(table)
        assert "host.org/a/cat%201.png?..." in str(caught.value)
        assert "pa55word" not in str(caught.value) + caplog.text
        assert "s1gnature" not in str(caught.value) + caplog.text


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("simplecache::https://host.org/a.png", "chains of addresses"),
        ("zip://a.png::https://host.org/a.zip", "not read"),
        ("nonsense://host/a.png", "nonsense:// addresses are not read"),
    ],
)
def test_addresses_that_lead_elsewhere_are_refused(tmp_path: Path, address: str, why: str) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"image_path": "{address}", "caption": ""}}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=why):
        find_sources(make_table(tmp_path, "image_jsonl_file", allow_urls=True))


def test_sources_at_addresses_show_no_secret_anywhere(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"image_path": "{SECRET}", "caption": ""}}\n', encoding="utf-8")
    (one,) = find_sources(make_table(tmp_path, "image_jsonl_file", allow_urls=True))
    assert (one.stem, one.path.parent.name) == ("cat 1", "downloads")
    assert "pa55word" not in repr(one)
    assert "s1gnature" not in repr(one)
    (tmp_path / "list.jsonl").write_text(
        f'{{"image_path": {str((tmp_path / "a b.png").as_uri())!r}}}\n'.replace("'", '"'), encoding="utf-8"
    )
    (one,) = find_sources(make_table(tmp_path, "image_jsonl_file", allow_urls=True))
    assert (one.path, one.origins) == (tmp_path / "a b.png", ())
