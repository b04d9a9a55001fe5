"""What is downloaded is looked at first, gets an ending of media or none, and stays in the cache folder."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.config import load_dataset_config
from dataset.forms.tars_listing import check_tar
from dataset.sources.downloads import check_media, download
from dataset.sources.media_source import DOWNLOADED_SUFFIXES, local_name
from modules.errors import DatasetError, MediaError
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes
from tests.dataset.serving import Site, site
from tests.faults.messages import run_here

__all__ = ["site"]
CODE = b"import os\nopen(os.environ['HOME'] + '/ran', 'w')\n"


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        *(
            ("cat.png", ".png"),
            ("cat.JPG", ".JPG"),
            ("cat.mp4", ".mp4"),
            ("cat.wav", ".wav"),
            ("a.tar", ".tar"),
        ),
        *(
            (f"evil.{end}", "")
            for end in ("pth", "py", "sh", "desktop", "exe", "so", "bat", "lnk", "html", "svg")
        ),
        *((".bashrc", ""), ("evil", "")),
    ],
)
def test_only_endings_of_media_come_from_an_address(name: str, ending: str) -> None:
    assert Path(local_name(f"https://host.org/{name}")).suffix == ending


@pytest.mark.parametrize("name", ["evil.png.py", "evil.py%00.pth", "a.png%2Fx.pth", "a.pth."])
def test_a_name_with_several_dots_ends_in_letters_of_the_hash(name: str) -> None:
    assert re.search("-[0-9a-f]{16}$", local_name(f"https://host.org/{name}"))


def test_all_media_that_are_read_keep_their_ending() -> None:
    assert image_suffixes() | VIDEO_SUFFIXES | AUDIO_SUFFIXES <= DOWNLOADED_SUFFIXES


@pytest.mark.parametrize(
    "content", [CODE, b"<html>no</html>", b"MZ" + bytes(99), b"\x7fELF" + bytes(99), b"x"]
)
def test_what_is_no_media_is_not_kept(content: bytes, tmp_path: Path, site: Site) -> None:
    (site.folder / "cat.png").write_bytes(content)
    with pytest.raises(
        MediaError, match=r"/cat.png: it is not an image, video or audio file .* Nothing of it is kept"
    ):
        download(f"{site.url}/cat.png", tmp_path / "kept" / "cat.png", check=check_media)
    with pytest.raises(MediaError, match="it is not a tar"):
        download(f"{site.url}/cat.png", tmp_path / "kept" / "a.tar", check=check_tar)
    assert not [*(tmp_path / "kept").iterdir()]


def test_pictures_and_tars_are_kept(tmp_path: Path, site: Site) -> None:
    (site.folder / "cat").write_bytes(picture("WEBP"))
    with tarfile.open(site.folder / "a.tar", "w") as tar:
        tar.add(site.folder / "cat", "cat.webp")
    download(f"{site.url}/cat", tmp_path / "cat", check=check_media)
    download(f"{site.url}/a.tar", tmp_path / "a.tar", check=check_tar)
    assert (tmp_path / "cat").read_bytes() == picture("WEBP")


@pytest.mark.parametrize("content", [CODE, picture()], ids=["code", "picture"])
def test_a_program_at_an_address_is_never_written(content: bytes, tmp_path: Path, site: Site) -> None:
    (site.folder / "evil.pth").write_bytes(content)
    row = {"image_path": f"{site.url}/evil.pth", "caption": "c"}
    (tmp_path / "l.jsonl").write_text(json.dumps(row), encoding="utf-8")
    text = '[[datasets]]\nimage_jsonl_file = "l.jsonl"\ncache_directory = "cache"\nresolution = [32, 32]\n'
    (tmp_path / "d.toml").write_text(f"{text}allow_urls = true\n", encoding="utf-8")
    words = ["--dataset_config", "d.toml", "--check"]
    code, _ = run_here("wan_cache_latents.py", *words, folder=tmp_path)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    if content == CODE:
        assert (code, kept) == (1, [])
    else:
        assert code == 0
        assert [path.suffix for path in kept] == [""]


@pytest.mark.parametrize("downloads", ["/elsewhere", "..", "cache2", "cache/../x", "~/.config/autostart"])
def test_a_file_puts_downloads_below_its_cache_folder(downloads: str, tmp_path: Path) -> None:
    text = f'[[datasets]]\nimage_jsonl_file = "l.jsonl"\ncache_directory = "{tmp_path / "cache"}"\n'
    path = tmp_path / "d.toml"
    path.write_text(f'{text}allow_urls = true\ndownload_directory = "{downloads}"\n', encoding="utf-8")
    with pytest.raises(
        DatasetError,
        match="outside cache_directory .*Remove it .*pass it .* --download_directory",
    ):
        load_dataset_config(path)

    inside = tmp_path / "cache" / "mine"
    path.write_text(f'{text}allow_urls = true\ndownload_directory = "{inside}"\n', encoding="utf-8")
    assert load_dataset_config(path).datasets[0].source.download_directory == inside


def test_a_typed_folder_may_lie_anywhere(tmp_path: Path, site: Site) -> None:
    (site.folder / "cat.png").write_bytes(picture())
    row = {"image_path": f"{site.url}/cat.png", "caption": "c"}
    (tmp_path / "l.jsonl").write_text(json.dumps(row), encoding="utf-8")
    text = '[[datasets]]\nimage_jsonl_file = "l.jsonl"\ncache_directory = "cache"\nresolution = [32, 32]\n'
    (tmp_path / "d.toml").write_text(f"{text}allow_urls = true\n", encoding="utf-8")
    words = ["--dataset_config", "d.toml", "--check", "--download_directory", "kept"]
    code, said = run_here("wan_cache_latents.py", *words, folder=tmp_path)
    assert code == 0
    assert "--download_directory" not in said
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".png"]

    (tmp_path / "d.toml").write_text(
        f'[[datasets]]\nimage_directory = "{(tmp_path / "kept").as_posix()}"\nresolution = [32, 32]\n',
        encoding="utf-8",
    )
    _, said = run_here("wan_cache_latents.py", *words, folder=tmp_path)
    assert "--download_directory kept is ignored because no table" in said
