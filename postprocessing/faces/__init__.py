"""Find faces and restore them: detectors, GFPGAN, CodeFormer."""
