"""Enlarge pictures: SwinIR and the ESRGAN family."""
