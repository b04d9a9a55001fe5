"""Find faces and restore them: detectors, GFPGAN, CodeFormer.

alignment: where faces lie, and square pictures of them
boxes: overlap of boxes, and which ones to keep
codeformer: CodeFormer: a face from entries of a codebook
detectors: open the file of a detector, whichever kind it is
gfpgan: GFPGAN v1.2 to v1.4: a U-Net steers a StyleGAN2
model_folder: find the model, the detector and ParseNet
onnx_header: inputs and outputs of an ONNX file
options: options of restoring faces
parsenet: ParseNet: the part of a face at each pixel
restorers: load the networks that restore and segment faces
retinaface: RetinaFace: faces and their landmarks, at three scales
retinaface_bodies: RetinaFace's feature extractors: ResNet-50 and a small MobileNet
stage: find, align, restore and paste the faces
yolo: YOLO detectors from ONNX, run by OpenCV
yunet: YuNet: a small detector of faces in OpenCV
"""
