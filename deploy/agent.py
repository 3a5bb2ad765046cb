#!/usr/bin/env python3
"""Measures latency and power on a board and returns what it saw, raw: no statistics are made here.

One file, Python 3.6, standard library only. Three ways to run it:

    python3 agent.py bench dense.onnx pruned.onnx -o raw.json     by hand; without a file: what this board has, and its idle power
    python3 agent.py build dense.onnx                             their engines only
    python3 agent.py sample                                       power until stdin ends
    its text streamed over ssh, then `serve`                      PROTOCOL.md

Invariant: however it ends (done, Ctrl-C, hang-up, cut connection, kill -9), the guard process it started first kills every
process of the bench and removes its folder. One bench at a time: the lock is a socket name that dies with its owners."""

import argparse
import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import struct
import sys
import time
from subprocess import DEVNULL, PIPE, STDOUT, Popen, SubprocessError, TimeoutExpired

PROTOCOL = 1
MARK = "prunectl-agent:"  # opens every line of `serve`; a login banner has none
DEFAULTS = {
    "protocol": PROTOCOL, "models": [], "train": [], "trainer": None, "build_only": False, "precision": "fp16", "sparsity": "disable",
    "spin_wait": False, "workspace_mb": 1024, "warmup_s": 5.0, "duration_s": 60.0, "iterations": 200, "repeats": 5, "idle_s": 30.0,
    "period_ms": 50.0, "refresh_probe_s": 5.0, "build_timeout_s": 1800.0, "slack_s": 60.0, "root": None, "trtexec": None,
    "train_python": None,
}  # fmt: skip
WHOLE_MODULE = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "package-0")  # read first, so its stamp is the truest
RAIL = ("name", "unit", "wrap", "step_mw")
TEGRASTATS_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(mW)?/\d+(?:mW)?(?= |$)")  # NAME current/average, mW


class Refused(Exception):
    """Why there is no measurement: a kind for programs, a sentence for people."""

    def __init__(self, kind, message):
        Exception.__init__(self, message)
        self.kind = kind


def now_ns():
    return int(time.monotonic() * 1e9)  # CLOCK_MONOTONIC: a stepped wall clock moves nothing


def read_text(path):
    """What the file says, stripped; "" where it is missing or refuses."""
    try:
        with open(path, "rb") as f:
            return f.read().replace(b"\0", b"").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def read_number(path):
    text = read_text(path)
    return int(text) if re.match(r"-?\d+$", text) else None


def find(root, *patterns):
    return sorted(path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(root), pattern)))


def write(path, record):
    """The record as JSON: a whole file or none; to stdout without a path."""
    if path is None:
        return print(json.dumps(record))
    try:
        with open(path + ".part", "w") as f:
            f.write(json.dumps(record))
        os.replace(path + ".part", path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(path + ".part")


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


class Guard(object):
    """A process that outlives the agent by a moment and leaves nothing of it: no process, no folder, no lock."""

    def __init__(self, folder):
        self.folder, agent = folder, os.getpid()
        read_end, self.pipe = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.pipe)
                self._watch(read_end, agent)
            finally:
                os._exit(0)
        os.close(read_end)

    def tell(self, number):
        """+ a group to end, - one that has ended, 0: from now on the end of stdin ends us."""
        os.write(self.pipe, struct.pack("i", number))

    def enter(self):
        """In a new child: its own process group, known to the guard before it does anything."""
        os.setpgid(0, 0)
        self.tell(os.getpid())

    def end_group(self, pid):
        self._kill(pid)
        self.tell(-pid)

    def dismiss(self):
        """Everything is cleaned up when this returns: the normal way out."""
        os.close(self.pipe)
        os.waitpid(self.pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)  # were the guard itself killed

    def _kill(self, pid, kill=os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it is gone already
            kill(pid, signal.SIGKILL)

    def _watch(self, read_end, agent):
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        poll, groups = select.poll(), set()
        poll.register(read_end, select.POLLIN)
        poll.register(1, 0)  # POLLERR or POLLHUP: nobody reads our stdout any more
        while True:
            events = dict(poll.poll())
            if 1 in events or (0 in events and not os.read(0, 65536)):
                self._kill(agent, os.kill)
                poll = select.poll()  # from now on only what it told before it died, to the end
                poll.register(read_end, select.POLLIN)
            elif events.get(read_end, 0) & select.POLLIN:
                number = struct.unpack("i", os.read(read_end, 4))[0]
                if number == 0:
                    poll.register(0, select.POLLIN)
                groups = groups | {number} if number > 0 else groups - {-number}
            elif read_end in events:  # the agent is dead and all is read
                break
        for group in groups:
            self._kill(group)
        shutil.rmtree(self.folder, ignore_errors=True)


def run(guard, argv, timeout_s, on_line=None):
    """(exit code, or None when it was stopped after timeout_s; its last 40 lines). on_line gets (ns, line) as they come."""
    deadline, text, tail = time.monotonic() + timeout_s, b"", []
    try:
        process = Popen(argv, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, preexec_fn=guard.enter, cwd=guard.folder)
    except (OSError, SubprocessError) as error:
        raise Refused("tool", "%s could not be started: %s" % (argv[0], error))
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None, tail
            data, stamp = os.read(process.stdout.fileno(), 65536), now_ns()
            lines = (text + data).split(b"\n")
            text = lines.pop() if data else b""
            for line in (raw.decode("utf-8", "replace").rstrip() for raw in lines):
                tail = (tail + [line])[-40:]
                if on_line:
                    on_line(stamp, line)
            if not data:
                return process.wait(timeout=max(0.1, deadline - time.monotonic())), tail
    except TimeoutExpired:
        return None, tail
    finally:
        guard.end_group(process.pid)
        process.wait()
        process.stdout.close()


def iio_rails(root):
    """INA3221 under L4T r32 (TX1, TX2, Nano, Xavier): one file a rail, in mW. The iio index differs from boot to boot."""
    for label in find(root, "sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[0-9]"):
        yield read_text(label), [label.replace("rail_name_", "in_power") + "_input"], "mW"


def hwmon_rails(root):
    """INA3221 under JetPack 5 and 6: mV and mA apart. "sum of shunt voltages" is no rail."""
    for label in find(root, "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[0-9]_label"):
        volts = label.replace("_label", "_input")
        if "shunt" not in read_text(label):
            yield read_text(label), [volts, os.path.join(os.path.dirname(volts), os.path.basename(volts).replace("in", "curr", 1))], "mW"


def rapl_rails(root):
    """Intel and AMD packages and their parts: a counter in uJ that wraps at max_energy_range_uj."""
    for zone in find(root, "sys/class/powercap/intel-rapl:[0-9]*"):
        name, index = read_text(os.path.join(zone, "name")), os.path.basename(zone).split(":")
        yield name if len(index) == 2 else "%s-%s" % (name, index[1]), [os.path.join(zone, "energy_uj")], "uJ"


def read_rail(fds):
    """The rail's number now, from files held open; None when one does not answer."""
    try:
        numbers = [int(os.pread(fd, 32, 0)) for fd in fds]
    except (OSError, ValueError):
        return None
    return numbers[0] if len(numbers) == 1 else round(numbers[0] * numbers[1] / 1000.0, 1)  # mV * mA = uW


def step_mw(files):
    """What one bit of a hwmon rail is worth: 40 uV over its shunt (INA3221 data sheet), at the volts of now. None elsewhere."""
    shunt_uohm = read_number(re.sub(r"/in(\d)_input$", r"/shunt\1_resistor", files[0])) if len(files) == 2 else None
    return round(40.0 / shunt_uohm * read_number(files[0]), 1) if shunt_uohm else None


def discover(root, guard=None):
    """(source, rails, skipped, reason): the first family of sensors that gives a number; a rail is RAIL and its files."""
    skipped = []
    for source, family in (("ina3221-iio", iio_rails), ("ina3221-hwmon", hwmon_rails), ("rapl", rapl_rails)):
        rails = []
        for name, files, unit in family(root):
            if not name or name == "NC" or name in [rail["name"] for rail in rails]:
                continue
            if None in [read_number(path) for path in files]:
                reason = "gives no number" if os.access(files[0], os.R_OK) else "may not be read by this user"
                skipped.append({"name": name, "reason": "%s %s" % (files[0], reason)})
                continue
            wrap, rail = read_number(os.path.join(os.path.dirname(files[0]), "max_energy_range_uj")), {"name": name, "unit": unit}
            rails.append(dict(rail, files=files, wrap=wrap, step_mw=step_mw(files)))
        command = tegrastats(root, 100) if guard and source == "ina3221-hwmon" and not rails else None  # to be run: under a guard
        if command:
            said, source = run(guard, command, 1.5)[1], "tegrastats"  # it never ends by itself
            found = TEGRASTATS_RAIL.findall((said or [""])[-1])
            rails = [dict(name=name, unit="mW", files=[], wrap=None, step_mw=None) for name, _, _ in found]
        if rails:
            rails.sort(key=lambda rail: WHOLE_MODULE.index(rail["name"]) if rail["name"] in WHOLE_MODULE else len(WHOLE_MODULE))
            return source, rails, skipped, None
    looked = "no power sensor answers: looked for INA3221 (iio, hwmon), tegrastats and RAPL under %s" % os.path.join(root, "sys")
    return None, [], skipped, looked + "".join("; %(name)s: %(reason)s" % rail for rail in skipped)


def program(root, name, *folders):
    """The program's path on this board; None if it has none."""
    found = [path for path in find(root, *[os.path.join(folder, name) for folder in folders]) if os.access(path, os.X_OK)]
    return found[0] if found else shutil.which(name) if root == "/" else None


def tegrastats(root, period_ms):
    path = program(root, "tegrastats", "usr/bin", "home/nvidia")
    return [path, "--interval", str(int(period_ms))] if path else None


def telemetry_files(root):
    """name -> file of a number worth watching: clocks in Hz (CPU: kHz), temperatures in thousandths of a degree, GPU load in per mille."""
    clocks = ["sys/%s/*/cur_freq" % folder for folder in ("class/devfreq", "devices/*/devfreq", "devices/platform/*/devfreq")]
    files = {"gpu_hz": path for path in find(root, *clocks) if re.search(r"(gp10b|gv11b|ga10b|gm20b|\.gpu)$", os.path.dirname(path))}
    files.update(("gpu_load_permille", path) for path in find(root, "sys/devices/gpu.0/load", "sys/devices/platform/gpu.0/load"))
    files.update((path.split("/")[-3] + "_khz", path) for path in find(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    files.update(("temp_%s_mc" % read_text(path[:-4] + "type"), path) for path in find(root, "sys/class/thermal/thermal_zone*/temp"))
    return {name: path for name, path in files.items() if read_number(path) is not None and "PMIC" not in name}  # PMIC: a constant 100 C


def sample(rails, telemetry, period_ms, fast_s, stop, command=None):
    """{t_ns, values, telemetry, sampler}: every rail each period, the rest each second, until the descriptor `stop` is readable."""
    fds = [[os.open(path, os.O_RDONLY) for path in rail["files"]] for rail in rails]
    watched = [(name, [os.open(path, os.O_RDONLY)]) for name, path in sorted(telemetry.items())]
    t_ns, rows, slow_t, slow, text, cpu = [], [], [], [], b"", time.process_time()
    begin = due = next_slow = time.monotonic()
    process = Popen(command, stdin=DEVNULL, stdout=PIPE) if command else None
    sources = [stop, process.stdout] if process else [stop]
    while True:
        ready = select.select(sources, [], [], max(0.0, due - time.monotonic()))[0]
        stamp = now_ns()
        if stop in ready:
            break
        if ready:  # a line of tegrastats, stamped as it arrives
            data = os.read(process.stdout.fileno(), 65536)
            sources = sources if data else [stop]  # it died: no more samples, and the host sees the gap
            *lines, text = (text + data).split(b"\n")
            found = {name: int(mw) for name, mw, _ in TEGRASTATS_RAIL.findall(lines[-1].decode("utf-8", "replace"))} if lines else {}
            if found:
                t_ns.append(stamp)
                rows.append([found.get(rail["name"]) for rail in rails])
            continue
        if rails and not process:
            t_ns.append(stamp)
            rows.append([read_rail(f) for f in fds])
        if stamp >= next_slow * 1e9:
            slow_t.append(stamp)
            slow.append([read_rail(f) for _, f in watched])
            next_slow += 1.0
        period = 0.01 if stamp < (begin + fast_s) * 1e9 else period_ms / 1e3  # 10 ms show how often the sensor has a new number
        due = max(due + period, time.monotonic())  # after a stall, no burst to catch up
    return {
        "t_ns": t_ns, "values": {rail["name"]: [row[i] for row in rows] for i, rail in enumerate(rails)},
        "telemetry": {"t_ns": slow_t, "values": {name: [row[i] for row in slow] for i, (name, _) in enumerate(watched)}},
        "sampler": {"cpu_s": round(time.process_time() - cpu, 6), "wall_s": round(time.monotonic() - begin, 6)},
    }  # fmt: skip


class Sampler(object):
    """`sample` in a process of its own, from now until stop()."""

    def __init__(self, guard, held, rails, telemetry, period_ms, fast_s, command):
        self.guard, self.path = guard, os.path.join(guard.folder, "samples.json")
        stop, self.pipe = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                guard.enter()
                null = os.open(os.devnull, os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
                for fd in (guard.pipe, self.pipe, held.detach()):  # the lock belongs to the agent and its guard
                    os.close(fd)
                seen = sample(rails, telemetry, period_ms, fast_s, stop, command)
                if os.read(stop, 1):  # else the agent is dead and nobody wants this
                    write(self.path, seen)
                    os._exit(0)
            finally:
                os._exit(1)
        os.close(stop)

    def stop(self):
        """What was sampled; {} if the sampler did not live to tell."""
        deadline, ended, status = time.monotonic() + 10, 0, 0
        with contextlib.suppress(BrokenPipeError):
            os.write(self.pipe, b".")
        while not ended and time.monotonic() < deadline:  # a sensor bus can hang
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            time.sleep(0.01)
        self.guard.end_group(self.pid)
        return json.loads(read_text(self.path)) if ended and not status else {}


def environment(root, guard=None):
    """What else decides a number: board, software, power mode, clocks, fan, temperatures, memory, load."""

    def first(*patterns):
        return next((text for text in map(read_text, find(root, *patterns)) if text), "")

    release = re.search(r"R(\d+).*?REVISION: ([\d.]+)", first("etc/nv_tegra_release"))
    cuda = re.findall(r"\d+\.\d+[.\d]*", first("usr/local/cuda/version.json", "usr/local/cuda/version.txt"))
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text("/proc/meminfo"), re.M))
    modes = program(root, "nvpmodel", "usr/sbin", "usr/bin") if guard else None
    mode = re.search(r"NV Power Mode: (\S+)\s+(\d+)", "\n".join(run(guard, [modes, "-q"], 5)[1])) if modes else None
    watched = telemetry_files(root)
    gpu = os.path.dirname(watched.get("gpu_hz", "/none/"))
    return {
        "board": first("proc/device-tree/model", "sys/firmware/devicetree/base/model") or None,
        "hostname": os.uname().nodename, "machine": os.uname().machine, "kernel": os.uname().release, "python": sys.version.split()[0],
        "cpu": (re.findall(r"model name\s*: (.*)", read_text("/proc/cpuinfo")) or [None])[0], "cpus": os.cpu_count(),
        "l4t": ".".join(release.groups()) if release else None, "cuda": cuda[0] if cuda else None,
        "nvpmodel": {"name": mode.group(1), "id": int(mode.group(2))} if mode else None,
        "gpu_min_hz": read_number(os.path.join(gpu, "min_freq")), "gpu_max_hz": read_number(os.path.join(gpu, "max_freq")),
        "fan_pwm": first("sys/devices/pwm-fan/target_pwm", "sys/devices/platform/pwm-fan/hwmon/hwmon*/pwm1") or None,
        "telemetry": {name: read_number(path) for name, path in sorted(watched.items())}, "load_1min": os.getloadavg()[0],
        "memory_available_mb": int(memory.get("MemAvailable", 0)) // 1024, "swap_free_mb": int(memory.get("SwapFree", 0)) // 1024,
    }  # fmt: skip


def last_words(tail):
    said = [line for line in tail if "[E]" in line] or [line for line in tail if line.strip()]
    return "it said: " + said[-1].strip()[:300] if said else "it said nothing"


def must_run(guard, argv, timeout_s, what, remedy, on_line=None):
    """The last lines of a tool that ended well. Raises the Refused that tells why it did not."""
    code, tail = run(guard, argv, timeout_s, on_line)
    text, free_mb = "\n".join(tail), shutil.disk_usage(guard.folder).free >> 20
    if code == 0:
        return tail
    if code is None:
        raise Refused("timeout", "%s gave no result within %d s and was stopped; %s" % (what, timeout_s, last_words(tail)))
    if "No space left" in text or free_mb < 1:
        raise Refused("disk-full", "the board's disk is full (%d MB left) and %s failed: free space in %s" % (free_mb, what, guard.folder))
    if code in (-9, 137) or re.search(r"out of memory|bad_alloc|OutOfMemory", text, re.I):
        raise Refused("out-of-memory", "%s was Killed, the board ran out of memory: lower %s or add swap" % (what, remedy))
    hint = " (deploy/README.md: the container has it)" if "No module named 'torch'" in text else ""
    raise Refused("failed", "%s failed with exit code %s; %s%s" % (what, code, last_words(tail), hint))


def trtexec_version(guard, trtexec):
    """(8, 2, 1) from `[TensorRT v8201]` in what any call says; from 10 on the parts have two digits (v100300)."""
    lines = []
    run(guard, [trtexec, "--help"], 60, lambda _, line: lines.append(line))
    found = re.search(r"\[TensorRT v(\d+)\]", "\n".join(lines))
    if not found:
        raise Refused("trtexec", "%s --help does not name its version: is it NVIDIA's? %s" % (trtexec, last_words(lines[:1])))
    n = int(found.group(1))
    return (n // 1000, n // 100 % 10, n % 100) if n < 10000 else (n // 10000, n // 100 % 100, n % 100)


def build_command(version, trtexec, onnx, plan, cache, request, workspace_mb, sizes):
    """The trtexec call that builds an engine and runs nothing, in the dialect of its version (NVIDIA/TensorRT, sampleOptions.cpp)."""
    memory = "--workspace=%d" if version < (8, 4) else "--memPoolSize=workspace:%d"
    command = [trtexec, "--onnx=" + onnx, "--saveEngine=" + plan, "--timingCacheFile=" + cache, memory % workspace_mb]
    flags = {"fp16": ["--fp16"], "int8": ["--int8", "--fp16"]} if version < (11,) else {}  # from 11 on, precision is written in the graph
    command += ["--buildOnly" if version < (8, 6) else "--skipInference"] + flags.get(request["precision"], [])
    command += ["--sparsity=" + request["sparsity"]] if request["sparsity"] != "disable" else []
    return command + (["--minShapes=" + re.sub(r":\d+x", ":1x", sizes), "--optShapes=" + sizes, "--maxShapes=" + sizes] if sizes else [])


def run_command(version, trtexec, plan, times, request, shapes):
    """The trtexec call that times an engine: no copies, and the waiting that draws the least power unless asked otherwise."""
    command = [trtexec, "--loadEngine=" + plan, "--warmUp=%d" % math.ceil(request["warmup_s"] * 1e3)]
    seconds = math.ceil(request["duration_s"]) if version < (8, 4) else request["duration_s"]  # whole ones only, until then
    command += ["--duration=%g" % seconds, "--iterations=%d" % request["iterations"], "--percentile=99", "--exportTimes=" + times]
    if version < (11,):
        command += ["--noDataTransfers"] + (["--useSpinWait"] if request["spin_wait"] else [])
    else:  # there, no copies is the default, and so are spinning and CUDA graphs
        command += ["--noCudaGraph"] + ([] if request["spin_wait"] else ["--noSpinWait"])
    return command + (["--shapes=" + shapes] if shapes else [])


class Board(object):
    """The root file system, its sensors and its TensorRT, and the cache of engines that were built here."""

    def __init__(self, request, root, cache, guard):
        self.request, self.root, self.cache, self.guard, self.version = request, root, cache, guard, None
        self.trtexec = request["trtexec"] or program(root, "trtexec", "usr/src/tensorrt/bin", "usr/bin", "usr/local/bin")
        self.source, self.rails, self.skipped, self.reason = discover(root, guard)
        self.environment = dict(environment(root, guard), tensorrt=None, trtexec=self.trtexec)
        self.simulated_by = ["sensors under %s" % root] if root != "/" else []
        if not request["models"]:
            return
        if not self.trtexec or not os.access(self.trtexec, os.X_OK):
            where = self.trtexec or os.path.join(self.root, "usr/src/tensorrt/bin/trtexec")
            raise Refused("no-trtexec", "no trtexec at %s: install JetPack's TensorRT, or name it (--trtexec, bench.trtexec)" % where)
        self.version = trtexec_version(self.guard, self.trtexec)
        if self.version < (8, 0):
            raise Refused("version", "TensorRT %d.%d is too old: 8.0 or later is needed (JetPack 4.6)" % self.version[:2])
        self.environment["tensorrt"] = ".".join(map(str, self.version))
        self.simulated_by += ["trtexec is a script"] if read_text(self.trtexec)[:4] != "\x7fELF" else []

    def engine_path(self, model):
        facts = [self.environment["board"], os.uname().nodename, self.version, model["sha256"], model.get("shapes")]
        facts += [self.request[name] for name in ("precision", "sparsity", "workspace_mb")]
        return os.path.join(self.cache, "engines", hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20] + ".plan")

    def cached(self, model):
        """The engine for this file, TensorRT, board and settings, {path, bytes, sha256, command, build_s}: if it is there and whole."""
        path = self.engine_path(model)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is built again
            about = json.loads(read_text(path + ".json"))
            return dict(about, path=path, bytes=os.path.getsize(path)) if about["sha256"] == file_sha256(path) else None

    def build(self, model, onnx, say):
        """The model's engine as `cached` describes it, built now unless it is there."""
        plan, limit_s, folder, there = self.engine_path(model), self.request["build_timeout_s"], self.guard.folder, self.cached(model)
        if there:
            return dict(there, cached=True)
        workspace_mb = min(self.request["workspace_mb"], self.environment["memory_available_mb"] // 2 or 1 << 20)
        made, timing = os.path.join(folder, "engine.plan"), os.path.join(folder, "timing.cache")
        command = build_command(self.version, self.trtexec, onnx, made, timing, self.request, workspace_mb, model.get("shapes"))
        begin, what = time.monotonic(), "trtexec, building the engine of %s," % model["name"]
        say("building the engine of %s" % model["name"], limit_s)
        tail = must_run(self.guard, command, limit_s, what, "the workspace cap (now %d MB)" % workspace_mb)
        if not os.path.exists(made) or not os.path.getsize(made):
            raise Refused("trtexec", "%s ended well but wrote no engine; %s" % (what, last_words(tail)))
        os.makedirs(os.path.dirname(plan), exist_ok=True)
        write(plan + ".json", {"command": command, "build_s": round(time.monotonic() - begin, 3), "sha256": file_sha256(made)})
        os.replace(made, plan)
        return dict(self.cached(model), cached=False)

    def load_window(self, plan, model, limit_s):
        """{start_ns, end_ns, latency_ns, command} of the inferences after the warm-up, on our own clock."""
        request, times, started, takes = self.request, os.path.join(self.guard.folder, "times.json"), [], []
        command = run_command(self.version, self.trtexec, plan, times, request, model.get("shapes"))

        def note(ns, line):
            started.extend([ns] if "Starting inference" in line else [])
            takes.extend(int(n) for n in re.findall(r"[Ii]nput binding for .* with dimensions (\d+)x", line)[:1])

        what = "trtexec, timing %s," % model["name"]
        write(times, None)  # not the last window's, should trtexec not get to write its own
        tail = must_run(self.guard, command, limit_s, what, "the batch or bench.iterations", note)
        model["batch"] = model["batch"] or (takes or [1])[0]  # by hand: as the file was exported
        if takes and takes[0] != model["batch"]:
            raise Refused("batch", "the engine of %s takes %d images a call, not %d" % (model["name"], takes[0], model["batch"]))
        try:  # 8.2 lists the warm-up too
            rows = [row for row in json.loads(read_text(times)) if row["startComputeMs"] >= request["warmup_s"] * 1e3]
            start, end = rows[0]["startComputeMs"], max(row["endComputeMs"] for row in rows)
            window = {"start_ns": started[0] + int(start * 1e6), "end_ns": started[0] + int(end * 1e6)}
            return dict(window, latency_ns=[int(row["latencyMs"] * 1e6) for row in rows], command=command)
        except (ValueError, KeyError, IndexError, TypeError):
            reason = "but wrote no inference times" if started else "without a line 'Starting inference'"
            raise Refused("trtexec", "%s ended well %s; %s" % (what, reason, last_words(tail)))


def train_window(guard, path, job, request, limit_s):
    """{start_ns, end_ns, latency_ns: one a step, trainer}: what request["trainer"] says of the traced module, in a process of its own."""
    command = [request["train_python"] or sys.executable, "-c", request["trainer"], path, json.dumps(job)]
    tail = must_run(guard, command, limit_s, "training %s" % job["name"], "bench.train_batch (now %d)" % job["input_shape"][0])
    trainer = next((json.loads(line[7:]) for line in tail if line.startswith("RESULT ")), None)
    if trainer is None:
        raise Refused("failed", "training %s ended without a result; %s" % (job["name"], last_words(tail)))
    stamps = [int(s * 1e9) for s in trainer.pop("stamps")]
    return {"start_ns": stamps[0], "end_ns": stamps[-1], "latency_ns": [b - a for a, b in zip(stamps, stamps[1:])], "trainer": trainer}


def carry_out(request, board, held, files, say):
    """The record of a request: of a bench, or, with build_only, of the engines: where they are and how they came to be."""
    engines = [board.build(model, files.get(model["sha256"]), say) for model in request["models"]]
    if not request["build_only"]:
        return bench(request, board, held, files, engines, say)
    built = [dict(engine, name=model["name"], onnx_sha256=model["sha256"]) for model, engine in zip(request["models"], engines)]
    return {"schema": 1, "simulated_by": board.simulated_by, "environment": board.environment, "engines": built}


def bench(request, board, held, files, engines, say):
    """The raw record: idle, then every model in turn, `repeats` times over; training after it."""
    models, jobs, windows, train_reason = request["models"], request["train"], [], None

    def keep(kind, artifact, repeat, window):
        offset = round(time.time() - time.monotonic(), 3)  # a change tells that the wall clock was stepped
        windows.append(dict(window, kind=kind, artifact=artifact, repeat=repeat, wall_offset_s=offset))

    def wait(kind, text, seconds):
        begin = now_ns()
        say(text, seconds)
        time.sleep(seconds)
        keep(kind, None, 0, {"start_ns": begin, "end_ns": now_ns(), "latency_ns": []})

    period_ms, fast_s = request["period_ms"], request["refresh_probe_s"]
    command = tegrastats(board.root, period_ms) if board.source == "tegrastats" else None
    sampler = Sampler(board.guard, held, board.rails, telemetry_files(board.root), period_ms, fast_s, command)
    if board.rails:
        wait("refresh", "watching the sensor's refresh", fast_s)
        wait("idle", "idle baseline", request["idle_s"])
    limit_s = request["warmup_s"] + max(request["duration_s"], 0.5 * request["iterations"]) + request["slack_s"]  # trtexec does both
    for repeat in range(request["repeats"]):
        for i, model in enumerate(models):
            say("%s, repeat %d of %d" % (model["name"], repeat + 1, request["repeats"]), limit_s)
            keep("load", i, repeat, board.load_window(engines[i]["path"], model, limit_s))
    repeat = 0
    try:
        for repeat in range(request["repeats"]):
            for i, job in enumerate(jobs, len(models)):
                limit_s = request["slack_s"] + 10.0 * (job["steps"] + job["warmup_steps"])
                say("training %s, repeat %d of %d" % (job["name"], repeat + 1, request["repeats"]), limit_s)
                keep("train", i, repeat, train_window(board.guard, files[job["sha256"]], job, request, limit_s))
    except Refused as error:  # whole repeats stay
        train_reason, windows = str(error), [w for w in windows if w["kind"] != "train" or w["repeat"] < repeat]
    say("collecting the samples", 15)
    time.sleep(max(0.2, 4 * period_ms / 1e3))  # samples on both sides of the last window
    seen, after = sampler.stop(), environment(board.root, board.guard)
    reason = board.reason if seen else "the sampler process died"
    precision = request["precision"] if (board.version or (0,)) < (11,) else "as exported"
    about = [{"kind": "engine", "precision": precision, "batch": m["batch"], "engine": e} for m, e in zip(models, engines)]
    about += [{"kind": "traced", "precision": "fp32", "batch": job["input_shape"][0], "job": job} for job in jobs]
    return {
        "schema": 1, "device": "jetson", "simulated": bool(board.simulated_by), "simulated_by": board.simulated_by,
        "settings": {name: value for name, value in request.items() if name not in ("models", "train", "trainer", "protocol")},
        "environment": dict(board.environment, telemetry_after=after["telemetry"], load_1min_after=after["load_1min"]),
        "artifacts": [dict(a, name=m["name"], sha256=m["sha256"]) for a, m in zip(about, models + jobs)],
        "windows": windows, "train_reason": train_reason, "telemetry": seen.get("telemetry", {"t_ns": [], "values": {}}),
        "power": {
            "source": None if reason else board.source, "reason": reason, "period_ms": period_ms,
            "rails": [] if reason else [{name: rail[name] for name in RAIL} for rail in board.rails],
            "skipped": board.skipped, "sampler": seen.get("sampler"), "t_ns": seen.get("t_ns", []), "values": seen.get("values", {}),
        },
    }  # fmt: skip


def session(request, work):
    """work(request, board, held) with the lock held and a guard posted; nothing of it is left afterwards."""
    unknown = sorted(set(request) - set(DEFAULTS))
    if request.get("protocol", PROTOCOL) != PROTOCOL or unknown:
        said = "protocol %s%s" % (request.get("protocol"), " with unknown " + ", ".join(unknown) if unknown else "")
        raise Refused("version", "this agent speaks protocol %d and was asked %s: use host and agent of one release" % (PROTOCOL, said))
    request = dict(DEFAULTS, **request)
    root = os.path.realpath(request["root"] or os.environ.get("PRUNECTL_AGENT_ROOT") or "/")
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "prunectl", "agent")
    mine, guard = os.path.join(cache, "session-%s-" % os.uname().nodename), None  # a home may be shared with other boards
    with socket.socket(socket.AF_UNIX) as held:
        try:
            held.bind("\0prunectl-agent:" + root)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise Refused("busy", "another bench is running on this board: wait for it or end it")
        try:
            os.makedirs(cache, exist_ok=True)
            for stale in glob.glob(glob.escape(mine) + "*"):  # of a bench whose guard died too, at a power cut say
                if stale[len(mine) :].isdigit():
                    shutil.rmtree(stale, ignore_errors=True)
            os.mkdir(mine + str(os.getpid()))
            guard = Guard(mine + str(os.getpid()))
            return work(request, Board(request, root, cache, guard), held)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise Refused("disk-full", "the board's disk is full: free space in %s" % cache)
            if not os.access(cache, os.W_OK):
                raise Refused("cache", "%s cannot be written by this user: give it to you by chown, or set XDG_CACHE_HOME" % cache)
            raise
        finally:
            if guard:
                guard.dismiss()


def emit(event, **fields):
    print(MARK + json.dumps(dict(fields, event=event)), flush=True)


def receive(count, timeout_s=60.0):
    """The next `count` bytes of stdin in pieces. Raises Refused when they stop coming."""
    while count:
        data = os.read(0, min(count, 1 << 20)) if select.select([0], [], [], timeout_s)[0] else b""
        if not data:
            raise Refused("cut", "the connection ended in the middle of a transfer")
        count -= len(data)
        yield data


def serve(args):
    """One request over stdin, its files after it, the raw record back: PROTOCOL.md."""
    emit("hello", protocol=PROTOCOL, python=sys.version.split()[0])

    def work(request, board, held):
        wanted, files = {job["sha256"]: job for job in request["train"]}, {}
        wanted.update((model["sha256"], model) for model in request["models"] if not board.cached(model))
        emit("need", sha256=sorted(wanted))
        for sha256, model in sorted(wanted.items()):
            files[sha256] = os.path.join(board.guard.folder, "file-%d" % len(files))
            with open(files[sha256], "wb") as f:
                f.writelines(receive(model["bytes"]))
            if file_sha256(files[sha256]) != sha256:
                raise Refused("cut", "%s arrived damaged: its checksum differs" % model["name"])
        board.guard.tell(0)  # the host sends no more: if stdin ends now, it is gone
        return carry_out(request, board, held, files, lambda text, at_most_s: emit("phase", text=text, at_most_s=at_most_s))

    request = json.loads(b"".join(receive(int(b"".join(receive(12))))).decode("utf-8"))  # behind its length
    emit("result", raw=session(request, work))


def by_hand(args):
    """A bench of files on this board, or their engines; the record goes to args.out, or to stdout."""
    request = dict({name: value for name, value in vars(args).items() if name in DEFAULTS}, build_only=args.verb == "build")
    paths = {path: file_sha256(path) for path in args.onnx}  # equal files are two models: what differs between them is noise
    names = [os.path.basename(path) for path in paths]
    names = [os.fsencode(n).decode("utf-8", "replace") for n in (names if len(set(names)) == len(names) else paths)]
    request["models"] = [{"name": n, "sha256": s, "batch": args.batch, "shapes": args.shapes} for n, s in zip(names, paths.values())]
    out = args.out and os.path.realpath(args.out)  # of a link what it leads to; no pipe and no device, which a rename would end
    if out and (not os.access(os.path.dirname(out), os.W_OK) or (os.path.exists(out) and not os.path.isfile(out))):
        raise Refused("output", "-o %s: its folder is not there, or cannot be written to, or it is no file" % args.out)

    def work(request, board, held):
        files = {s: os.path.join(board.guard.folder, s[:20]) for s in paths.values()}  # plain names, whatever the user's are
        for sha256, path in {s: path for path, s in paths.items()}.items():
            os.symlink(os.path.abspath(path), files[sha256])
        return carry_out(request, board, held, files, lambda text, at_most_s: sys.stderr.write(text + "\n"))

    write(out, session(request, work))


def sample_until_eof(args):
    """One line of JSON saying what can be read, then samples until stdin ends, then one line of them."""
    root = os.path.realpath(args.root or "/")
    source, rails, skipped, reason = discover(root)
    kept = [{name: rail[name] for name in RAIL} for rail in rails]
    print(json.dumps({"source": source, "reason": reason, "rails": kept, "skipped": skipped, "environment": environment(root)}), flush=True)
    print(json.dumps(sample(rails, telemetry_files(root), args.period_ms, 0.0, 0)), flush=True)


def main(argv):
    usage = "agent.py bench|build|sample|serve [options] [FILE.onnx ...]; without a file: what this board has, and its idle power"
    parser = argparse.ArgumentParser(prog="agent.py", usage=usage, description="Latency and power of ONNX models on this board, raw.")
    parser.add_argument("verb", choices=["bench", "build", "sample", "serve"])
    parser.add_argument("-o", "--out", help="file for the JSON; default: stdout")
    parser.add_argument("--root", help="look for sensors and tools under this folder; default: /")
    parser.add_argument("--trtexec", type=os.path.abspath, help="path of trtexec, if it is not where JetPack puts it")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default=DEFAULTS["precision"])
    parser.add_argument("--sparsity", choices=["disable", "enable"], default=DEFAULTS["sparsity"], help="enable: kernels for 2:4 zeros")
    parser.add_argument("--batch", type=int, help="images in one inference; default: as the file was exported")
    parser.add_argument("--shapes", help="of an input whose batch is free, as trtexec takes them: input:8x3x224x224")
    parser.add_argument("--spin-wait", action="store_true", help="lower latency, more power")
    for option in ("workspace_mb", "repeats", "warmup_s", "duration_s", "idle_s", "period_ms", "refresh_probe_s"):
        parser.add_argument("--" + option.replace("_", "-"), type=type(DEFAULTS[option]), default=DEFAULTS[option])
    args, args.onnx = parser.parse_known_args(argv)  # Python 3.6 cannot mix options and files otherwise
    try:
        {"bench": by_hand, "build": by_hand, "sample": sample_until_eof, "serve": serve}[args.verb](args)
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("agent.py: interrupted, nothing was left behind\n")
        return 130
    except (Refused, OSError, ValueError) as error:
        if args.verb == "serve":
            emit("error", kind=getattr(error, "kind", "internal"), message=str(error))
        sys.stderr.write("agent.py: %s\n" % error)
        return 5 if isinstance(error, Refused) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
