"""Tools and options around generation: guidance, previews, prompts, step caches, metadata.

GIMMVFI: command: add images between a video's images
facefix: command: restore faces with GFPGAN or CodeFormer
guidance: steps, passes and checks of guidance
guidance_formulas: formulas of guidance, each made a `GuidanceStage`
latent_preview: show a clip in a file while it is denoised
metadata: `bt_*` texts in latent files, images and videos
metaview: command: show how files say they were made
model_utility: command: inspect model files, and rewrite them
model_work: the work of model_utility.py: inspect, rewrite
options: options of guidance, prompts, previews, long videos, step caches
prompt_rewrite: a chat model turns requests into full descriptions
prompt_syntax: draws and weights in prompts: `(red:1.4)`, `{a|b}`, `__name__`
step_cache: from options of a request to a step cache
taehv: TAEHV: a tiny decoder of latents for previews
upscaler: command: enlarge with SwinIR or an ESRGAN network
video_to_png: command: write the frames of a video as PNG
video_to_video: start denoising from noisy latents of a video
video_to_video_options: options of starts: another video, image or latents
yolo_blur: command: blur faces or other detected things
"""
