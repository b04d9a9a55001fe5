"""Options of previews during generation. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option


class PreviewOptions(Options, title="previews"):
    """When to show a preview, and how to decode it."""

    preview_latent_every: int | None = option(
        "every so many steps show the clip as it is expected to become, in latent_preview.mp4 or .png in "
        "--save_path; counts sections if a clip is made in several (FramePack)",
        least=1,
        hint="leave it out for no previews",
    )
    preview_vae: Path | None = option(  # None: a linear map from latents to colours
        "small VAE (TAEHV: taew2_1 for Wan, taehv for HunyuanVideo and FramePack) for previews that are "
        "sharp and have all frames; default: blurred colours, at no cost",
        needs="preview_latent_every",
    )

    def __post_init__(self) -> None:
        if self.preview_vae is not None and not self.preview_vae.exists():
            raise OptionError(
                f"--preview_vae {self.preview_vae}: no such file. Give a TAEHV file, or leave it out for "
                "previews without one"
            )


NO_PREVIEW = PreviewOptions()
