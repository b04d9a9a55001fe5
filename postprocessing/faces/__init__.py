"""Find faces and restore them: detectors, GFPGAN, CodeFormer.

boxes: overlap of boxes, and square crops of faces
codeformer: CodeFormer: decode a face from a learned codebook
detectors: open the file of a detector, whichever kind it is
gfpgan: GFPGAN v1.2 to v1.4: a U-Net steers a StyleGAN2
restorers: ParseNet; find and load networks that restore faces
retinaface: RetinaFace: faces and their landmarks, at three scales
retinaface_bodies: RetinaFace's feature extractors: ResNet-50 and a small MobileNet
stage: find, align, restore and paste the faces
yolo: YOLO and YuNet from ONNX files
"""
