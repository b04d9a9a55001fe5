"""Upscale images: SwinIR and the ESRGAN family."""
