"""Tools for finished videos: read, one stage or several, write, all as one stream.

blurring/: blur what a detector finds, and keep it blurred
chain_options: the tools by name, and options of chains
contract: what flows through tools, and stages of a stream
decoded: decoded frames of a generation through the tools
faces/: find faces and restore them: detectors, GFPGAN, CodeFormer
interpolation/: make pictures between pictures: GIMM-VFI with RAFT or FlowFormer
model_places: find the models of tools without --model
naming: input files of a run, and names of results
pixels: pixels of pictures <-> what networks compute with
precision: networks in half precision, float32 where needed
run: run tools on files as one stream
run_options: options of all tools: run and network
stages: make the stages of tools, lead pictures through
streaming: read ahead and write behind in threads
tiling: pictures of any size in blended tiles
upscaling/: enlarge pictures: SwinIR and the ESRGAN family
videos: decode, process and encode a video at once
"""
