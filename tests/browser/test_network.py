"""The network goes away while the model of a training is loaded, and comes back: Continue is pressed."""

import re
from pathlib import Path
from urllib.parse import quote

import pytest

from browser.jobs.model_files import find_task
from tests.browser.serving import serve_runs
from tests.browser.test_new_page import describe, post, text_of, write_images
from tests.chromium import open_page, wait_until
from tests.commands import QUIET
from tests.downloads import fake_hub
from tests.downloads.fake_hub import FakeHub
from tests.tiny.z_image import write_tiny_z_image

ROLES = {"--dit": "dit.safetensors", "--vae": "vae.safetensors"}
ROLES |= {"--text_encoder": "text_encoder/model.safetensors", None: "text_encoder/tokenizer.json"}
PROMPT = "a square --s 1 --w 64 --h 64 --d 1\n"
CUT = 3000  # bytes that arrive before the network goes away
SECONDS = 1000  # milliseconds


def add_model(hub: FakeHub, folder: Path) -> None:
    """Offer the files of a tiny Z-Image under the addresses of the released one."""
    write_tiny_z_image(folder)
    files = find_task(folder, "z_image", "base")
    assert files is not None
    for part in files.parts:
        (file,) = part.component.files
        hub.add(file.repository, file.file, (folder / ROLES[part.component.option]).read_bytes())


@pytest.mark.slow
def test_a_training_whose_model_could_not_be_loaded_goes_on_with_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "roots"
    write_images(root / "set", 2, captions=True)
    models = tmp_path / "models"
    with fake_hub.serve() as hub:
        add_model(hub, tmp_path / "released")
        hub.cuts = [CUT] * 6
        variables = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        for name, value in (QUIET | variables).items():
            monkeypatch.setenv(name, value)
        with serve_runs(root, models=models) as served:
            fields = {"family": "z_image", "task": "base", "steps": "2", "name": "own"}
            describe(served, root / "set", **fields, file_dit="", file_vae="", file_t5="")
            (root / "set/prompts.txt").write_text(PROMPT, encoding="utf-8")
            refused = post(served, "start", folder=str(root / "set"))
            assert "read the licenses next to Start, and accept them" in text_of(refused, "refused")
            assert post(served, "start", folder=str(root / "set"), accept="yes").status == 200
            with open_page(f"{served.url}/new?folder={quote(str(root / 'set'))}") as page:
                page.get_by_role("link", name="its page").click()
                page.get_by_text("the connection broke").first.wait_for(timeout=150 * SECONDS)
                message = page.locator("body").inner_text()
                assert "are kept: run the same command again to continue" in message
                page.get_by_role("button", name="Continue").click()
                wait_until(page, "!document.body.innerText.includes('connection broke')")
                ended = page.locator(".status", has_text=re.compile("^(finished|died)"))
                ended.last.wait_for(timeout=240 * SECONDS)
                assert ended.last.inner_text().startswith("finished"), page.locator("body").inner_text()
    assert hub.cuts == []
    assert (root / "set/output/own.safetensors").stat().st_size > 1000
