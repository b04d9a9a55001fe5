"""Sound without pictures: learned from files as with diffusers. `test_family` compares what is made."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.ltx_2.release import dit_config, write_release
from tests.ltx_2.test_model import in_diffusers
from tests.ltx_2.test_training import ATTENTION, RATE, Project, run, told
from tests.ltx_2.tiny_dit import dit_in_diffusers
from tests.parity.training import (
    SEED,
    Factors,
    assert_steps_of_descent,
    descent,
    learning,
    shuffled,
    stream,
)
from tests.sound_media import Track, write_media


def test_sound_alone_is_learned_from_files_as_with_diffusers(tmp_path: Path) -> None:
    """Tables are those of the known fork. Pictures, their noise level and their texts take no part."""
    folder, release = tmp_path, write_release(tmp_path / "größe")
    project, there = Project(folder, release), release.networks
    (folder / "bells").mkdir()
    for number, name in enumerate("ab"):
        track = Track((0.2 + 0.3 * number,), loud=0.5, codec="pcm_s16le")
        write_media(folder / "bells" / f"{name}.wav", track, frames=0)
        (folder / "bells" / f"{name}.txt").write_text(f"a bell {name}", encoding="utf-8")
    table = '[[datasets]]\naudio_directory = "bells"\ncache_directory = "cache of bells"\n'
    table += 'audio_bucket_strategy = "pad"\nmax_frames = 33\ncaption_extension = ".txt"\nbatch_size = 2\n'
    (folder / "bells.toml").write_text(f"[general]\nresolution = [512, 512]\n{table}", encoding="utf-8")
    words = [*release.words, "--ltx2_mode", "audio", "--dataset_config", "bells.toml"]
    said = succeed_here("ltx2_cache_latents.py", *words, folder=folder)
    assert "audio_bucket_strategy: not needed" in said
    assert " VAE: " not in said.replace("Audio VAE: ", "")  # that of pictures
    succeed_here("ltx2_cache_latents.py", *words, "--check", "--html", "x.html", folder=folder)
    page = (folder / "x.html").read_text(encoding="utf-8")
    assert "2 sounds; " in page
    assert "sound: 2 of 2 can be heard: 2 with" in page
    assert "cut off</dt>" not in page
    texts = ["ltx2_cache_text_encoder_outputs.py", *words, *release.texts]
    succeed_here(*texts, "--text_encoder_dtype", "float32", folder=folder)
    audios, captions = (
        [load_file(path) for path in sorted((folder / "cache of bells").glob(f"*_ltx2_{end}.safetensors"))]
        for end in ("audio", "te")
    )
    assert [len(one) for one in captions] == [2, 2]  # no text for pictures

    out = folder / "bells" / "out"
    project.train(*descent(RATE), *words[-4:], "--output_dir", "bells/out")

    def tensors(files: list[dict[str, Tensor]], start: str) -> list[Tensor]:
        return [next(one.float() for name, one in file.items() if name.startswith(start)) for file in files]

    items = list(zip(tensors(audios, "audio_latents"), tensors(captions, "audio_prompt_embeds"), strict=True))
    shape = items[0][0].shape
    assert shape[1] == 33  # 25 a second, as frames
    paths = [name.removesuffix(".weight") for name in there["state"] if ATTENTION.search(name)]
    parts = {path.replace(".", "_"): [path] for path in paths if ".audio_attn" in path}

    def gradients(factors: Factors, step: int) -> Factors:
        dit = dit_in_diffusers(there["version"], there["state"], config=dit_config(there["version"]))
        batch = shuffled(items, step)
        sigmas = torch.rand(2, generator=stream(SEED, "sound timesteps", step), dtype=torch.float64).float()
        noise = torch.randn(2, *shape, generator=stream(SEED, "sound", step))
        with learning(dit, parts, factors) as found:
            for (audio, text), sigma, drawn in zip(batch, sigmas, noise, strict=True):
                time = 1000 * sigma.view(1)
                inputs = {
                    **{"noisy": torch.zeros(1, 16, 1, 1, 1), "text": torch.zeros(1, 1, 24), "fps": 25},
                    **{"timesteps": time, "audio_timesteps": time, "audio_text": text[None]},
                    "audio": ((1 - sigma) * audio + sigma * drawn)[None],
                }
                _, made = in_diffusers(dit, inputs, isolate_modalities=True)
                ((made[0] - (drawn - audio)).square().mean() / 2).backward()
        return found()

    assert_steps_of_descent(out, parts, RATE, gradients, "sound alone")
    assert all(row["video"] == 0 < row["audio"] for row in told(Project(folder / "bells", release)))
    refused = ["ltx2_cache_latents.py", *release.words, "--dataset_config", "bells.toml"]
    for mode in ("av", "v"):
        code, said = run_here(*refused, "--ltx2_mode", mode, folder=folder)
        assert_one_message(
            code,
            said,
            "it has audio files, but this run trains on images",
            "the mode audio, which trains audio only",
        )
    next((folder / "cache of bells").glob("*_audio.safetensors")).unlink()
    said = project.train(*run("quiet", 1), *words[-4:], code=1)
    assert_one_message(1, said, "but 1 clip has no sound", "Take silent ones out")
