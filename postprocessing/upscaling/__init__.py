"""Upscale images: SwinIR and the ESRGAN family.

files: read upscalers from files, under all known names
rrdb: RRDBNet of ESRGAN, BSRGAN and Real-ESRGAN
stage: upscale the images of a stream
swinir: SwinIR: attention inside small, shifting windows
"""
