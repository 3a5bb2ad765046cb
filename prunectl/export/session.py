"""An exported file as a callable: pixels in, logits out, prepared the way its metadata says.

Needs numpy, pillow and onnxruntime only; torch is not imported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from PIL import Image

from prunectl.errors import CorruptFile, UsageError, VerificationFailed
from prunectl.export.artifact import InputSpec, record_path
from prunectl.files import sha256

Floats = NDArray[np.float32]
MARGIN = 256 / 224  # the share of a photo's shorter side around the crop, as in training (Krizhevsky et al. 2012, and since)
REFUSALS = (ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.NotImplemented, ort_errors.RuntimeException)
PIECE = 32  # images that a graph with a free batch is given at once


def open_session(model: Path | bytes, *, threads: int | None = None) -> ort.InferenceSession:
    """ONNX Runtime on the CPU for a file or a serialised model. threads: None leaves the choice to ONNX Runtime.

    Raises UsageError if there is no such file, CorruptFile if it is no whole ONNX model, VerificationFailed if ONNX
    Runtime refuses it."""
    name = str(model) if isinstance(model, Path) else "the exported graph"
    if isinstance(model, Path) and not model.is_file():
        raise UsageError(f"{model} is not a file; expected an ONNX model")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # waiting threads sleep: spinning ones slow down everything else, and themselves where cores are shared
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"])
    except (ort_errors.InvalidProtobuf, UnicodeDecodeError) as problem:
        raise CorruptFile(f"{name} is not a readable ONNX file; export it again") from problem
    except REFUSALS as problem:
        reason = str(problem).strip().splitlines()[0]
        raise VerificationFailed(f"ONNX Runtime {ort.__version__} refuses {name}: {reason}") from problem


@dataclass(frozen=True)
class OnnxSession:
    """A loaded classifier. `run` takes images as they are, `run_normalised` what a data set's batches hold."""

    session: ort.InferenceSession
    spec: InputSpec

    def run(self, images: NDArray[Any]) -> Floats:
        """Logits (N, classes) of images: uint8 0..255, or float 0..1; NCHW, NHWC, or one image without N.

        Height and width must be the network's; `prepare` brings a picture there. Raises UsageError."""
        pixels = _as_nchw(np.asarray(images), self.spec.shape)
        if pixels.dtype == np.uint8:
            return self._call(pixels if self._takes_pixels else _normalised(pixels, self.spec))
        if not np.issubdtype(pixels.dtype, np.floating) or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 1:
            raise UsageError("images must be uint8, or float from 0 to 1; for normalised values call run_normalised")
        return self._call(_pixels(pixels) if self._takes_pixels else _normalised(pixels * 255, self.spec))

    def run_normalised(self, images: NDArray[Any]) -> Floats:
        """Logits (N, classes) of (N, C, H, W) with mean and std taken out, as a data set's batches are.

        A file that takes pixels gets them back, rounded to whole grey levels."""
        values = np.asarray(images, dtype=np.float32)
        return self._call(pixels_of(values, self.spec) if self._takes_pixels else values)

    def classify(self, image: Image.Image, *, top: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes of one picture of any size, with their probabilities."""
        logits = self.run(prepare(image, self.spec))[0].astype(np.float64)
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        return [(self.spec.classes[i], float(chances[i])) for i in np.argsort(-chances)[:top]]

    @property
    def _takes_pixels(self) -> bool:
        return bool(self.session.get_inputs()[0].type == "tensor(uint8)")

    def _call(self, images: NDArray[Any]) -> Floats:
        """In pieces of the graph's batch size, the last one filled up and cut again; in small ones where the batch is free."""
        entry = self.session.get_inputs()[0]
        if entry.type == "tensor(float16)":
            images = images.astype(np.float16)
        fixed = isinstance(entry.shape[0], int)
        size = entry.shape[0] if fixed else PIECE
        answers = []
        for start in range(0, len(images), size):
            piece = images[start : start + size]
            missing = size - len(piece) if fixed else 0
            full = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
            answers.append(self.session.run(None, {entry.name: np.ascontiguousarray(full)})[0][: len(piece)])
        classes = self.session.get_outputs()[0].shape[-1]
        return np.concatenate(answers).astype(np.float32) if answers else np.zeros((0, classes), np.float32)


def load_onnx_session(path: str | Path, *, threads: int | None = None) -> OnnxSession:
    """The classifier in an ONNX file that prunectl exported, with its preprocessing attached.

    If `model.json` lies beside it, the file's sha256 is compared with it. Raises UsageError if there is no such file
    or it carries no preprocessing, CorruptFile if it is not whole."""
    path = Path(path)
    session = open_session(path, threads=threads)
    _check_digest(path)
    return OnnxSession(session, InputSpec.from_metadata(session.get_modelmeta().custom_metadata_map))


def prepare(image: Image.Image, spec: InputSpec) -> NDArray[np.uint8]:
    """One picture as uint8 (1, C, H, W), fitted the way the training data was: the device's part of preprocessing.

    A picture that is not square is cut to its central square first, unless the data set was of photos (`resize-crop`)."""
    channels, height, _ = spec.shape
    image = image.convert("RGB" if channels == 3 else "L")
    if spec.fit == "resize-crop":
        short = round(height * MARGIN)
        image = _centre(image.resize(_scaled(image.size, short), Image.Resampling.BILINEAR), height)
    elif image.width != image.height:
        image = _centre(image, min(image.size))
    if spec.fit == "pad" and spec.native:
        image = image.resize((spec.native, spec.native), Image.Resampling.BILINEAR)
    if spec.fit == "pad" and image.width <= height:
        canvas = Image.new(image.mode, (height, height))
        canvas.paste(image, ((height - image.width) // 2,) * 2)
        image = canvas
    elif image.width != height:
        image = image.resize((height, height), Image.Resampling.BILINEAR)
    return _as_nchw(np.asarray(image, dtype=np.uint8), spec.shape)


def pixels_of(values: Floats, spec: InputSpec) -> NDArray[np.uint8]:
    """The nearest grey levels to normalised values (N, C, H, W): exact for what once were 8-bit images."""
    mean, std = _columns(spec)
    return _pixels(values * std + mean)


def _check_digest(path: Path) -> None:
    try:
        expected = json.loads(record_path(path).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the JSON is a companion, not a condition: the file alone carries all that is needed
    if expected != sha256(path):
        raise CorruptFile(f"{path} is not the file that {record_path(path).name} describes (sha256 differs); export again")


def _as_nchw(images: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    channels, height, width = shape
    if images.ndim == 2:
        images = images[None]
    if images.ndim == 3:
        images = images[:, None] if images.shape[1:] == (height, width) and channels == 1 else images[None]
    if images.ndim == 4 and images.shape[1:] == (height, width, channels) != (channels, height, width):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1:] != tuple(shape):
        raise UsageError(
            f"images of shape {images.shape}; expected (N, {channels}, {height}, {width}) or (N, {height}, {width}, {channels})"
        )
    return images


def _normalised(pixels: NDArray[Any], spec: InputSpec) -> Floats:
    mean, std = _columns(spec)
    return pixels.astype(np.float32) * (1 / (255 * std)).astype(np.float32) - (mean / std).astype(np.float32)


def _pixels(unit: NDArray[Any]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(np.rint(unit * 255), 0, 255), dtype=np.uint8)


def _columns(spec: InputSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array(spec.mean).reshape(-1, 1, 1), np.array(spec.std).reshape(-1, 1, 1)


def _scaled(size: tuple[int, int], short: int) -> tuple[int, int]:
    w, h = size
    return (short, int(short * h / w)) if w <= h else (int(short * w / h), short)


def _centre(image: Image.Image, size: int) -> Image.Image:
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
