"""The server stays light: no page loads torch, and a page that nobody sees asks for nothing."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from modules.installation import ROOT
from tests.browser.serving import serve_runs, write_run
from tests.browser.test_safe_clicks import describe, save_image
from tests.chromium import open_page

# each GET route once, in a process of its own; prints the heavy modules that are loaded then
VISIT = """
import sys
from pathlib import Path
from tests.browser.serving import serve_runs
from tests.browser.test_safe_clicks import list_addresses
with serve_runs(Path(sys.argv[1])) as served:
    for address in list_addresses(served, "GET"):
        run = served.of("x").split("/")[2]
        for query in ("", "?folder=described", "?source=model+wan+t2v-1.3B", f"?run={run}"):
            answer = served.ask(address + query)
            assert answer.status < 500, address
print(sorted({"torch", "transformers", "accelerate", "diffusers", "tensorboard"} & sys.modules.keys()))
"""


def test_serving_every_page_loads_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "x", 10)
    save_image(tmp_path / "described" / "0.png")
    describe(tmp_path / "described")

    done = subprocess.run(
        [sys.executable, "-c", VISIT, str(tmp_path)], cwd=ROOT, capture_output=True, encoding="utf-8"
    )

    assert done.stdout == "[]\n", done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["", "generate", "queue", "models", "new", "folder", "datasets", "dataset", "run"]
)
def test_a_hidden_page_asks_for_nothing(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, "x", 4, None)
    save_image(tmp_path / "described" / "0.png")
    describe(tmp_path / "described")
    with serve_runs(tmp_path) as served, open_page(served.url) as page:
        places = {"folder": f"new?folder={quote(str(tmp_path / 'described'))}", "run": served.of("x")[1:]}
        if name == "dataset":
            [places[name]] = set(re.findall(r'href="/(datasets?/[^"]+)"', served.ask("/datasets").text))
        assert page.goto(f"{served.url}/{places.get(name, name)}").status == 200
        page.wait_for_timeout(1000)
        page.evaluate("Object.defineProperty(document, 'hidden', {get: () => true})")
        page.wait_for_timeout(1500)  # what was asked for before has come
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.wait_for_timeout(6500)
        assert requests == []
