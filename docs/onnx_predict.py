"""Classify photographs with an ONNX file of tools/export.py: python onnx_predict.py alexnet.onnx photo.jpg ...

Needs no PyTorch: pip install onnxruntime numpy opencv-python
"""

import base64
import json
import sys

import cv2
import numpy as np
import onnxruntime

if len(sys.argv) < 3:
    sys.exit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
classes, inputs = json.loads(metadata["classes"]), json.loads(metadata["preprocess"])
size, window = inputs["size"], slice(inputs["crop_offset"], inputs["crop_offset"] + inputs["crop"])
mean = np.full((size, size, 3), inputs["channel_mean"], np.float32)
if "mean_pixels" in inputs:
    mean = np.frombuffer(base64.b64decode(inputs["mean_pixels"]), "<f4").reshape(size, size, 3)
for path in sys.argv[2:]:
    image = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[:, :, ::-1]  # BGR to RGB
    height, width, side = *image.shape[:2], min(image.shape[:2])
    image = image[(height - side) // 2 :, (width - side) // 2 :][:side, :side]  # the central square
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)
    pixels = (image - mean)[window, window].transpose(2, 0, 1)  # HWC to CHW
    logits = session.run(None, {"images": pixels[None]})[0][0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for label in np.argsort(-logits)[:5]:
        print(f"{path}: {probabilities[label]:.4f} {classes[label]['name'] or classes[label]['wnid']}")
