"""Runs an ONNX file on an NVIDIA GPU: by TensorRT where it is installed, else by ONNX Runtime's CUDA provider.

Inputs stay on the GPU, as with trtexec --noDataTransfers, and a call returns when the GPU has finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from prunectl.bench.latency import batch_of, onnx_session, synthetic_input
from prunectl.bench.records import OnnxModel, Settings
from prunectl.errors import DeviceUnavailable, UsageError, VerificationFailed
from prunectl.export import trt_build

Call = Callable[[], object]


def precision_of(model: OnnxModel, settings: Settings) -> str:
    """What the model computes in: what its graph says, or, of a plain graph, what the engine build is asked for."""
    return settings.precision if model.precision in ("as exported", "fp32") else model.precision


def cuda_device(index: int) -> torch.device:
    """The GPU. Raises DeviceUnavailable."""
    if not torch.cuda.is_available():
        raise DeviceUnavailable("--device cuda: torch sees no CUDA GPU here; use --device cpu, or --device jetson with --host.")
    if index >= torch.cuda.device_count():
        raise DeviceUnavailable(f"--device cuda:{index}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0.")
    return torch.device("cuda", index)


def runner(model: OnnxModel, settings: Settings, device: torch.device) -> tuple[Call, int, dict[str, Any]]:
    """(one inference, its batch, what runs it). Raises DeviceUnavailable where neither TensorRT nor ORT CUDA is installed."""
    try:
        import tensorrt
    except ImportError:
        return _onnxruntime_runner(model, settings, device)
    return _tensorrt_runner(tensorrt, model, settings, device)


def _onnxruntime_runner(model: OnnxModel, settings: Settings, device: torch.device) -> tuple[Call, int, dict[str, Any]]:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise DeviceUnavailable("--device cuda needs TensorRT (pip install 'prunectl[trt]') or onnxruntime-gpu; neither is installed.")
    if precision_of(model, settings) not in ("fp32", model.precision):
        raise UsageError(f"--precision {settings.precision} needs TensorRT; ONNX Runtime runs a file in its own precision (fp32).")
    session = onnx_session(model, [("CUDAExecutionProvider", {"device_id": device.index})], threads=1)
    binding = session.io_binding()
    for name, array in synthetic_input(session, model.batch).items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", device.index))
    for node in session.get_outputs():
        binding.bind_output(node.name, "cuda", device.index)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call, batch_of(session, model.batch), {"runtime": "onnxruntime", "version": ort.__version__}


def build_job(model: OnnxModel, settings: Settings) -> dict[str, Any]:
    """What the engine build is asked for, as `export --trt` would ask (trt_build.configure)."""
    about = {"workspace_mb": settings.workspace_mb, "sparse": settings.sparsity == "enable", "capabilities": ()}
    return about | {"precision": precision_of(model, settings), "in_graph": model.typed, "batch": model.batch}


def _tensorrt_runner(trt: Any, model: OnnxModel, settings: Settings, device: torch.device) -> tuple[Call, int, dict[str, Any]]:
    torch.cuda.set_device(device)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(trt_build.network_flags(trt, in_graph=model.typed))
    parser = trt.OnnxParser(network, logger)  # network must outlive it
    if not parser.parse_from_file(str(model.path)):
        raise VerificationFailed(f"{model.path}: TensorRT {trt.__version__} refuses it: {parser.get_error(0)}")
    config = builder.create_builder_config()
    try:
        trt_build.configure(trt, builder, network, config, build_job(model, settings))
    except trt_build.Refused as problem:
        raise UsageError(f"TensorRT {trt.__version__}: {problem}: export with --profile gpu, or bench with fp32.") from None
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    shapes = {n.name: tuple(model.batch if size < 0 and d == 0 else size for d, size in enumerate(n.shape)) for n in inputs}
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise VerificationFailed(f"{model.path}: TensorRT {trt.__version__} built no engine of it; its log says why.")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    tensors = []
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if name in shapes:
            context.set_input_shape(name, shapes[name])
        dtype = torch.from_numpy(np.empty(0, trt.nptype(engine.get_tensor_dtype(name)))).dtype
        tensors.append(torch.randn(tuple(context.get_tensor_shape(name)), device=device).to(dtype))
        context.set_tensor_address(name, tensors[-1].data_ptr())
    stream = torch.cuda.Stream(device)

    def call(engine: Any = engine, tensors: Any = tensors) -> None:  # both must live as long as the context
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()

    return call, next(iter(shapes.values()))[0], {"runtime": "tensorrt", "version": trt.__version__}
