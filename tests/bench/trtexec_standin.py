"""A stand-in for NVIDIA's trtexec: its words on stdout and stderr, its flags by version, its --exportTimes; no TensorRT.

Messages follow samples/trtexec and samples/common of github.com/NVIDIA/TensorRT, tag 8.2.1. Settings: trtexec.json beside this
file. `version`: as trtexec writes it. `mode`: ok (a latency of a millisecond for each 1000 bytes), onnxruntime (runs the model
for real), or a fault to act out, in the build or in the run: crash-build, hang-run, oom-build, garbage-run, ..."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trtexec_flags import FLAGS

SETTINGS = json.loads(Path(__file__).with_name("trtexec.json").read_text())
VERSION, MODE = SETTINGS.get("version", 8201), SETTINGS.get("mode", "ok")


def say(level: str, text: str) -> None:
    out = sys.stdout if level == "I" else sys.stderr
    out.write(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [{level}] {text}\n")
    out.flush()


def end(passed: bool) -> None:
    print(f"&&&& {'PASSED' if passed else 'FAILED'} TensorRT.trtexec [TensorRT v{VERSION}] # {' '.join(sys.argv)}", flush=True)
    sys.exit(0 if passed else 1)


def act_out(phase: str) -> None:
    """The fault `mode` names, if it belongs to this phase."""
    fault, _, when = MODE.partition("-")
    if when != phase:
        return
    if fault == "crash":
        say("E", "Error[10]: [optimizer.cpp::computeCosts::2011] Error Code 10: Internal Error (Could not find any implementation)")
        end(False)
    if fault == "hang":  # deaf to polite signals, and with a child that is too
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    if fault == "oom":  # what the kernel does
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "garbage":
        sys.stdout.buffer.write(bytes(range(256)) * 64)
        sys.stdout.flush()
        sys.exit(0)


def build(flags: dict) -> None:
    say("I", "Start parsing network model")
    act_out("build")
    time.sleep(SETTINGS.get("build_s", 0.0))
    try:
        Path(flags["saveEngine"]).write_bytes(b"ptrt" + Path(flags["onnx"]).read_bytes())
    except OSError as error:
        say("E", f"Could not open engine file {flags['saveEngine']}: {error.strerror}")
        end(False)
    Path(flags["timingCacheFile"]).write_bytes(b"cache")
    say("I", f"Engine built in {SETTINGS.get('build_s', 0.0)} sec.")


def latencies_ms(model: bytes):
    """Endless latencies of the model, each taking its time."""
    if MODE == "onnxruntime":
        import numpy
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {node.name: numpy.random.default_rng(0).standard_normal(node.shape).astype("f4") for node in session.get_inputs()}
        while True:
            begin = time.monotonic()
            session.run(None, feed)
            yield (time.monotonic() - begin) * 1e3
    each = len(model) / SETTINGS.get("bytes_per_ms", 1000.0)
    while True:
        time.sleep(each / 1e3)
        yield each


def infer(flags: dict) -> None:
    model = Path(flags["loadEngine"]).read_bytes()[4:]
    stream = latencies_ms(model)
    next(stream)  # loads what must be loaded
    time.sleep(SETTINGS.get("load_s", 0.0))
    if "batch" in SETTINGS:
        shape = f"input with dimensions {SETTINGS['batch']}x3x32x32"
        say("I", f"Input binding for {shape} is created." if VERSION >= 8600 else f"Created input binding for {shape}")
    say("I", "Starting inference")
    act_out("run")
    zero, warm_ms, rows = time.monotonic(), float(flags["warmUp"]), []
    end_ms = warm_ms + float(flags["duration"]) * 1e3
    while not rows or rows[-1][1] < end_ms or len(rows) < int(flags["iterations"]):
        begin = (time.monotonic() - zero) * 1e3
        latency = next(stream)
        rows.append((begin, (time.monotonic() - zero) * 1e3, latency))
    measured = [row for row in rows if row[0] >= warm_ms]
    phases = [f"{edge}{phase}Ms" for phase in ("Enq", "H2d", "Compute", "D2h") for edge in ("start", "end")]
    keys = [*phases, "h2dMs", "computeMs", "d2hMs", "latencyMs"]
    with open(flags["exportTimes"], "w") as f:  # six significant digits, as a C++ stream writes floats
        f.write("[\n")
        for i, (a, b, ms) in enumerate(rows if VERSION < 8600 else measured):
            values = dict(zip(keys, (a, a, a, a, a, b, b, b, 0.0, ms, 0.0, ms), strict=True))
            if VERSION < 8500:
                values["endToEndMs"] = b - a
            f.write(("  " if i == 0 else ", ") + "{ " + ", ".join(f'"{k}" : {v:.6g}' for k, v in values.items()) + " }\n")
        f.write("]\n")
    seconds = (measured[-1][1] - measured[0][0]) / 1e3
    summary = f"min = {min(r[2] for r in measured):.6g} ms, max = {max(r[2] for r in measured):.6g} ms"
    for text in (
        "",
        "=== Performance summary ===",
        f"Throughput: {len(measured) / seconds:.6g} qps",
        f"Latency: {summary}",
        f"GPU Compute Time: {summary}",
    ):
        say("I", text)


def main() -> None:
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{VERSION}] # {' '.join(sys.argv)}", flush=True)
    flags = {word[2:].partition("=")[0]: word.partition("=")[2] for word in sys.argv[1:]}
    unknown = sorted(set(flags) - FLAGS[VERSION])
    if unknown:
        say("E", f"Unknown option: --{unknown[0]} {flags[unknown[0]]}")
        end(False)
    if "help" in flags:
        print("=== Model Options ===\n" * 60)
        sys.exit(0)
    say("I", f"TensorRT version: {VERSION}")
    build(flags) if "onnx" in flags else infer(flags)
    end(True)


main()
