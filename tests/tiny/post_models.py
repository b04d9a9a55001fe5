"""Tiny networks of tools for finished videos where tools/download.py puts the released ones; a video."""

from pathlib import Path

import numpy as np

from modules.media.writing import write_video
from tests.tiny.onnx_files import write_yolo, write_yunet
from tests.tiny.post_faces import write_red_detector
from tests.tiny.post_flowformer import write_flowformer
from tests.tiny.post_interpolation import write_gimm_f, write_gimm_r
from tests.tiny.post_restorers import codeformer_weights, gfpgan_weights, parsenet_weights, write_model
from tests.tiny.post_upscaling import write_rrdb, write_swinir

SIDE, FRAMES = 128, 3  # of the video: interpolation takes no smaller one


def lay_out_tools(folder: Path) -> None:
    """Models of all tools in `folder`/models, yolo_face.onnx and video.mp4, in which a red dot is a face."""
    models = folder / "models"
    for name in ("upscalers", "gimmvfi", "facefix"):
        (models / name).mkdir(parents=True, exist_ok=True)
    write_swinir(models / "upscalers" / "003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN.pth")
    write_rrdb(models / "upscalers" / "RealESRGAN_x4plus.pth")
    write_rrdb(models / "upscalers" / "RealESRGAN_x2plus.pth", unshuffle=2)
    write_flowformer(write_gimm_f(write_gimm_r(models / "gimmvfi")) / "flowformer_sintel_fp32.safetensors")
    faces = models / "facefix"
    write_model(faces / "GFPGANv1.4.pth", gfpgan_weights(), "params_ema")
    write_model(faces / "codeformer.pth", codeformer_weights(), "params_ema")
    write_model(faces / "parsing_parsenet.pth", parsenet_weights())
    write_red_detector(faces / "detection_Resnet50_Final.pth", face=48)
    write_yunet(faces / "face_detection_yunet_2023mar.onnx")
    write_yolo(folder / "yolo_face.onnx")
    write_video(folder / "video.mp4", [_with_dot(index) for index in range(FRAMES)], 12)


def _with_dot(index: int) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    grey = (90 + 50 * np.sin((x - 3 * index) / 9) * np.cos(y / 14)).astype(np.uint8)
    pixels = grey[..., None].repeat(3, axis=2)
    pixels[56:72, 56:72] = (255, 0, 0)
    return pixels
