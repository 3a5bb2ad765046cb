"""Classifies one image with an exported file: numpy, pillow and onnxruntime, nothing of prunectl.

python classify_onnx.py model.onnx photo.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def square(image, side):
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
meta, entry = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0]
channels, size, _ = json.loads(meta["shape"])
image = Image.open(sys.argv[2]).convert("RGB" if channels == 3 else "L")
if meta["fit"] == "resize-crop":  # as photos are: the centre of a picture whose shorter side is a little longer
    short = round(size * 256 / 224)
    image = square(image.resize([short * side // min(image.size) for side in image.size], Image.Resampling.BILINEAR), size)
else:
    image = square(image, min(image.size))
    if meta["fit"] == "pad" and (native := json.loads(meta.get("native", "0"))):
        image = image.resize((native, native), Image.Resampling.BILINEAR)
    if meta["fit"] == "pad" and image.width <= size:
        border = (size - image.width) // 2
        image = image.crop((-border, -border, size - border, size - border))  # black outside
    image = image.resize((size, size), Image.Resampling.BILINEAR)
pixels = np.asarray(image, np.uint8).reshape(1, size, size, channels).transpose(0, 3, 1, 2)
mean, std = (np.float32(json.loads(meta[key])).reshape(-1, 1, 1) for key in ("mean", "std"))
fed = pixels if entry.type == "tensor(uint8)" else (pixels / np.float32(255) - mean) / std
logits = session.run(None, {entry.name: np.repeat(fed, entry.shape[0] if isinstance(entry.shape[0], int) else 1, axis=0)})[0][0]
chances = np.exp(logits - logits.max())
for i in np.argsort(-logits)[:5]:
    print(f"{100 * chances[i] / chances.sum():5.1f} %  {json.loads(meta['classes'])[i]}")
