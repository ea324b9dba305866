"""Classify photographs with a file of tools/export.py --onnx, without this program or PyTorch:

python onnx_predict.py alexnet.onnx photo.jpg ...       (pip install onnxruntime numpy opencv-python)
"""

import base64
import json
import sys

import cv2
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
classes, how = json.loads(about["classes"]), json.loads(about["preprocess"])
size, window = how["size"], slice(how["crop_offset"], how["crop_offset"] + how["crop"])
mean = np.full((size, size, 3), how["channel_mean"], np.float32)
if how["mean_mode"] == "pixel":
    mean = np.frombuffer(base64.b64decode(how["mean_pixels"]), "<f4").reshape(size, size, 3)
for path in sys.argv[2:]:
    image = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[:, :, ::-1]  # BGR -> RGB
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    resize = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    image = cv2.resize(image[top : top + side, left : left + side], (size, size), interpolation=resize)
    pixels = (image.astype(np.float32) - mean)[window, window].transpose(2, 0, 1)[None]
    logits = session.run(None, {"images": pixels})[0][0]
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for label in np.argsort(-chances)[:5]:
        print(f"{path}: {chances[label]:.4f} {classes[label]['name'] or classes[label]['wnid']}")
