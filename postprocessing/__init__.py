"""Tools for finished videos: read, one stage or several, write, all as one stream.

blurring/: blur what a detector finds, and keep it blurred
chain_options: the tools by name, options of chains, places of models
contract: clips, stages of tools, pixels as network inputs
faces/: find faces and restore them: detectors, GFPGAN, CodeFormer
interpolation/: insert frames between frames: GIMM-VFI with RAFT or FlowFormer
naming: input files of a run, and names of results
options: options of the run, of networks and of each tool
run: run tools on images and videos as one stream
scripts: the scripts of tools
stages: create the stages of tools, run images through them
streaming: read ahead and write behind in threads
tiling: images of any size in blended tiles, in half precision
upscaling/: upscale images: SwinIR and the ESRGAN family
"""
