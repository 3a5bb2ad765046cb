"""Classifies one image with an exported file: numpy, pillow and onnxruntime, nothing of prunectl.

python classify_onnx.py model.onnx photo.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
meta, entry = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0]
channels, height, width = json.loads(meta["shape"])
image = Image.open(sys.argv[2]).convert("RGB" if channels == 3 else "L").resize((width, height), Image.Resampling.BILINEAR)
pixels = np.asarray(image, np.uint8).reshape(1, height, width, channels).transpose(0, 3, 1, 2)
mean, std = (np.float32(json.loads(meta[key])).reshape(-1, 1, 1) for key in ("mean", "std"))
fed = pixels if entry.type == "tensor(uint8)" else (pixels / np.float32(255) - mean) / std
logits = session.run(None, {entry.name: np.repeat(fed, entry.shape[0] if isinstance(entry.shape[0], int) else 1, axis=0)})[0][0]
for i in np.argsort(-logits)[:5]:
    print(f"{100 * np.exp(logits[i]) / np.exp(logits).sum():5.1f} %  {json.loads(meta['classes'])[i]}")
