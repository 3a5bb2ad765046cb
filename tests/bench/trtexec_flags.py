"""Flags that trtexec knows, by version: samples/common/sampleOptions.cpp of github.com/NVIDIA/TensorRT, tags 8.2.1, 8.5.1, v8.6.1,
v10.3.0, v11.1. Only those a bench could want; everything else is an unknown option, as for the real one."""

COMMON = {
    "onnx", "saveEngine", "loadEngine", "warmUp", "duration", "iterations", "percentile", "exportTimes", "timingCacheFile", "avgRuns",
    "noDataTransfers", "useSpinWait", "useCudaGraph", "sparsity", "int8", "shapes", "minShapes", "optShapes", "maxShapes", "help",
}  # fmt: skip
FLAGS = {
    8201: COMMON | {"workspace", "buildOnly", "fp16", "best"},
    8501: COMMON | {"workspace", "memPoolSize", "buildOnly", "fp16", "best"},
    8601: COMMON | {"workspace", "memPoolSize", "buildOnly", "skipInference", "fp16", "best"},
    100300: COMMON | {"memPoolSize", "skipInference", "fp16", "best"},
    110100: COMMON | {"memPoolSize", "skipInference", "noSpinWait", "noCudaGraph", "includeDataTransfers"},
}
