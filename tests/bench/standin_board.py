"""A Jetson in a folder: its sysfs as files, its power moved by a small process, its trtexec a script. No part of prunectl is replaced.

The power is a known function of CLOCK_MONOTONIC with a closed integral, so what a bench says can be compared with the truth."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the sensor process imports this file, and has no need of prunectl
    from prunectl.bench.records import RawBench, Window

HERE = Path(__file__).parent
AGENT = HERE.parents[1] / "deploy" / "agent.py"
RAILS_41 = ("VDD_IN", "VDD_SYS_CPU", "VDD_SYS_DDR")
RAILS_40 = ("VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_4V0_WIFI")


def board_python() -> str:
    """A Python 3.6, as the board has: $PRUNECTL_PYTHON36, on the PATH, or pyenv's. Where there is none: this Python."""
    places = [
        os.environ.get("PRUNECTL_PYTHON36"),
        shutil.which("python3.6"),
        *map(str, Path.home().glob(".pyenv/versions/3.6*/bin/python3.6")),
    ]
    for place in filter(None, places):
        real = subprocess.run([place, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
        if real.returncode == 0:
            return place
    return sys.executable


@dataclasses.dataclass(frozen=True)
class Waveform:
    """Power in mW at monotonic time t: a base, sines (amplitude, Hz, phase) and one square wave (amplitude, period, duty)."""

    base: float
    sines: tuple[tuple[float, float, float], ...] = ()
    square: tuple[float, float, float] = (0.0, 1.0, 0.5)

    @classmethod
    def random(cls, seed: int) -> Waveform:
        rng = random.Random(seed)
        base = rng.uniform(4000, 9000)
        sines = tuple(
            (rng.uniform(0.02, 0.12) * base, math.exp(rng.uniform(math.log(0.05), math.log(6.0))), rng.uniform(0, 6.28)) for _ in range(3)
        )
        return cls(base, sines, (rng.uniform(0.0, 0.3) * base, rng.uniform(0.4, 7.0), rng.uniform(0.2, 0.8)))

    def integral(self, a: float, b: float) -> float:
        """Energy in mJ between two times in s, exact."""
        return self._primitive(b) - self._primitive(a)

    def _primitive(self, t: float) -> float:
        amplitude, period, duty = self.square
        whole, rest = divmod(t, period)
        total = self.base * t + amplitude * (whole * duty * period + min(rest, duty * period))
        return total - sum(a * math.cos(2 * math.pi * f * t + phase) / (2 * math.pi * f) for a, f, phase in self.sines)

    def at(self, t: float) -> float:
        amplitude, period, duty = self.square
        sines = sum(a * math.sin(2 * math.pi * f * t + phase) for a, f, phase in self.sines)
        return self.base + sines + (amplitude if t % period < duty * period else 0.0)


# The sensor process: every refresh it writes the exact mean power since the last one, as an INA3221 with averaging does.
SENSOR = """
import json, os, sys, time
sys.path.insert(0, {here!r})
from standin_board import Waveform
job = json.loads(sys.argv[1])
log = open(job["log"], "w", buffering=1)
waves = dict((path, Waveform(w["base"], tuple(map(tuple, w["sines"])), tuple(w["square"]))) for path, w in job["waves"].items())
fds = dict((path, os.open(path, os.O_WRONLY)) for path in waves)
step, begin, k = job["refresh_s"], time.monotonic(), 0
end = begin + job["life_s"]
last = begin - step
while time.monotonic() < end and os.getppid() == job["parent"]:
    k += 1
    time.sleep(max(0.0, begin + k * step - time.monotonic()))
    now = time.monotonic()
    for path, wave in waves.items():
        mw = wave.integral(last, now) / (now - last)
        os.pwrite(fds[path], b"%10d\\n" % int(round(mw / job["quantum_mw"]) * job["quantum_mw"] * job["scale"]), 0)
    log.write("%r\\n" % now)
    last = now
"""


class Board:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "home" / ".cache" / "prunectl" / "agent"
        self.trtexec = root / "usr/src/tensorrt/bin/trtexec"
        self.sensor_log = root / "sensor.log"  # when the sensor process wrote, in s

    @property
    def env(self) -> dict[str, str]:
        """What the agent reads of its environment, pointing here."""
        return {"PRUNECTL_AGENT_ROOT": str(self.root), "XDG_CACHE_HOME": str(self.root / "home/.cache")}

    def set_trtexec(self, **settings: object) -> None:
        """How trtexec behaves (trtexec_standin.py). By default 8.2.1, whose windows are whole seconds; 8601 can be shorter."""
        self.trtexec.with_name("trtexec.json").write_text(json.dumps(settings))

    def sensor_files(self) -> dict[str, Path]:
        """rail -> the file whose number the sensor process moves."""
        found = {}
        for label in self.root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*"):
            found[label.read_text().strip()] = label.with_name(label.name.replace("rail_name_", "in_power") + "_input")
        for label in self.root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label"):
            found[label.read_text().strip()] = label.with_name(label.name.replace("in", "curr", 1).replace("label", "input"))
        return found

    @contextmanager
    def powered(
        self, waves: dict[str, Waveform], *, refresh_s: float = 0.05, quantum_mw: float = 1.0, life_s: float = 300.0
    ) -> Iterator[subprocess.Popen]:
        """The sensor process runs, and moves these rails. Under hwmon the volts stand at 5000 mV, so mA = mW / 5."""
        files = self.sensor_files()
        self.refresh_s = refresh_s
        job = {
            "waves": {str(files[rail]): dataclasses.asdict(wave) for rail, wave in waves.items()}, "log": str(self.sensor_log),
            "refresh_s": refresh_s, "quantum_mw": quantum_mw, "life_s": life_s, "parent": os.getpid(),
            "scale": 0.2 if "hwmon" in str(next(iter(files.values()))) else 1.0,
        }  # fmt: skip
        process = subprocess.Popen([sys.executable, "-c", SENSOR.format(here=str(HERE)), json.dumps(job)])
        try:
            time.sleep(0.3 + refresh_s)
            yield process
        finally:
            process.kill()
            process.wait()

    def tolerance_mj(self, wave: Waveform, raw: RawBench, window: Window) -> float:
        """How far the window's energy may be from the waveform's: a sensor shows the past and a sampler sees it later, at both edges.

        In time: two refreshes, a sampling period, and all delays that this machine really gave either process; in power: the
        waveform's range, of the window and as long before and after it. Beside it 0.2 %, for steps inside the window."""
        start, end = window.start_ns / 1e9, window.end_ns / 1e9
        period_s = raw.power.period_ms / 1e3
        late_s = 0.0
        for stamps, step in ((self.sensor_log.read_text().split(), self.refresh_s), ([t / 1e9 for t in raw.power.t_ns], period_s)):
            t = [float(stamp) for stamp in stamps]
            late_s += sum(max(0.0, b - a - step) for a, b in itertools.pairwise(t) if b > start and a < end)
        lag_s = 2 * self.refresh_s + period_s + late_s
        levels = [wave.at(start - lag_s + i * (end - start + 2 * lag_s) / 2000) for i in range(2000)]
        return (max(levels) - min(levels)) * lag_s + 0.002 * wave.integral(start, end)

    def running(self) -> list[str]:
        """`PID command` of every process that was started on this board."""
        mark, found = f"PRUNECTL_AGENT_ROOT={self.root}\0".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "environ").read_bytes():
                        found.append(f"{entry.name} {(entry / 'cmdline').read_bytes()!r}")
                except OSError:
                    continue
        return found

    def agents(self) -> list[int]:
        """Processes of the agent, oldest first: itself, its guard, its sampler."""
        pids = [int(line.split()[0]) for line in self.running() if "agent.py" in line and "trtexec" not in line]
        return sorted(pids, key=lambda pid: int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]))

    def leftovers(self, within_s: float = 8.0) -> list[str]:
        """What a bench left on the board beside its cached engines: folders, half files, processes, the lock. It may take a moment."""
        until = time.monotonic() + within_s
        while True:
            entries = [Path(place, name) for place, folders, names in os.walk(self.cache) for name in (*folders, *names)]
            files = [str(p) for p in entries if "session" in p.name or p.suffix == ".part"]  # walk bears what vanishes meanwhile
            locks = [line for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(f"@prunectl-agent:{self.root}")]
            found = files + self.running() + locks
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.05)


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def _common(root: Path) -> Board:
    board = Board(root)
    write(root / "proc/device-tree/model", "quill\0")
    write(root / "etc/nv_tegra_release", "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t186ref, EABI: aarch64")
    gpu = root / "sys/class/devfreq/17000000.gp10b"
    for name, hz in (("cur_freq", 1300500000), ("min_freq", 1300500000), ("max_freq", 1300500000)):
        write(gpu / name, hz)
    for i, (kind, temp) in enumerate((("BCPU-therm", 34500), ("GPU-therm", 33000), ("PMIC-Die", 100000))):
        write(root / f"sys/class/thermal/thermal_zone{i}/type", kind)
        write(root / f"sys/class/thermal/thermal_zone{i}/temp", temp)
    board.trtexec.parent.mkdir(parents=True)
    board.trtexec.write_text(
        f"#!{sys.executable}\nimport sys; sys.path.insert(0, {str(HERE)!r})\n{(HERE / 'trtexec_standin.py').read_text()}"
    )
    board.trtexec.chmod(board.trtexec.stat().st_mode | stat.S_IXUSR)
    board.set_trtexec()
    nvpmodel = root / "usr/sbin/nvpmodel"
    write(nvpmodel, "#!/bin/sh\necho 'NV Fan Mode:quiet'; echo 'NV Power Mode: MAXN'; echo 0")
    nvpmodel.chmod(0o755)
    (root / "home").mkdir()
    return board


def tx2(root: Path, *, iio: tuple[int, int] = (1, 0), unplugged: str | None = None) -> Board:
    """A TX2 under L4T r32. iio: device numbers of the chips 0x40 and 0x41. unplugged: a rail whose file gives no number."""
    board = _common(root)
    for chip, rails, number in (("0-0040", RAILS_40, iio[0]), ("0-0041", RAILS_41, iio[1])):
        folder = root / f"sys/bus/i2c/drivers/ina3221x/{chip}/iio:device{number}"
        for i, rail in enumerate(rails):
            write(folder / f"rail_name_{i}", rail)
            write(folder / f"in_power{i}_input", "" if rail == unplugged else 1000 + i)
    return board


def orin(root: Path) -> Board:
    """An Orin NX under JetPack 5 or 6: hwmon, volts and amperes apart, and the traps that are no rails."""
    board = _common(root)
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    for i, rail in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), 1):
        write(folder / f"in{i}_label", rail)
        write(folder / f"in{i}_input", 5000)
        write(folder / f"curr{i}_input", 300)
        write(folder / f"shunt{i}_resistor", 5000)  # micro-ohms
    write(folder / "in7_label", "sum of shunt voltages")
    write(folder / "in7_input", 760)
    write(folder / "in4_label", "NC")
    write(folder / "in4_input", 0)
    write(folder / "curr4_input", 0)
    return board
