"""Options of previews of what is being made. Standard library only."""

import argparse

from modules.options import add_unsupported


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --preview_latent_every and --preview_vae."""
    group = parser.add_argument_group("previews")
    reason = "watch the progress bar instead"
    add_unsupported(
        group, "--preview_latent_every", type=int, default=None, reason=reason, help="preview every n steps"
    )
    add_unsupported(
        group, "--preview_vae", type=str, default=None, reason=reason, help="small VAE for previews"
    )
