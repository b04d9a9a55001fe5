"""Train a packed folder on a card of Modal.

In the folder of Reelsmith:

    modal volume put reelsmith clips-pack.zip
    modal run --detach docs/clusters/modal_train.py --pack clips-pack.zip
    modal volume get reelsmith clips/output
"""

import os
import subprocess

import modal

disk = modal.Volume.from_name("reelsmith", create_if_missing=True)  # of the packed folder, models and results
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("gcc", "libc6-dev")  # torch.compile needs them
    .pip_install("torch==2.13.0", index_url="https://download.pytorch.org/whl/cu130")
    .pip_install_from_requirements("requirements.txt")
    .add_local_dir(".", "/reelsmith", ignore=[".git", ".venv", "models", "output", "*-pack.zip"])
)
app = modal.App("reelsmith", image=image)


# a function that is taken away, or at its end after a day, starts again, and the run continues
@app.function(gpu="L40S", timeout=24 * 3600, retries=3, volumes={"/disk": disk})
def train(pack: str) -> None:
    """Train the folder in a file of the volume. It costs until it is over, and ends by itself."""
    words = ["bash", "docs/clusters/rented.sh", f"/disk/{pack}"]
    subprocess.run(words, cwd="/reelsmith", env={**os.environ, "PYTHON": "python"}, check=True)
