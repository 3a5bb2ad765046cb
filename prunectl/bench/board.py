"""The host's side of deploy/PROTOCOL.md: streams the agent's text to a Python on the board, then a request and its files, and
reads events until the raw record comes.

Nothing is installed there. However the conversation ends, the connection is closed, and with it the agent and all it started.
No wait is unbounded: the agent says how long each phase may last, and silence beyond that ends it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.bench import ssh
from prunectl.bench.records import Job, OnnxModel, RawBench, Settings
from prunectl.errors import DeviceUnavailable, UsageError

PROTOCOL = 1
MARK = b"prunectl-agent:"
HOST_ONLY = ("threads", "python", "train_steps", "train_batch")  # settings the agent has no use for

# Runs on the board before the agent's text is there: read exactly that many bytes of it, leave the rest of stdin alone.
BOOTSTRAP = """
import os, sys
if sys.version_info < (3, 6):
    sys.exit("the agent needs Python 3.6 or later, this is " + sys.version.split()[0])
text, size = b"", int(sys.argv[1])
while len(text) < size:
    data = os.read(0, size - len(text))
    if not data:
        sys.exit("the connection ended before the agent had arrived")
    text += data
sys.argv = ["agent.py", "serve"]
exec(compile(text, "agent.py", "exec"), {"__name__": "__main__", "__file__": "agent.py"})
"""

Say = Callable[[str], None]


def agent_path(name: str = "agent.py") -> Path:
    """deploy/agent.py, or another file beside it: of this checkout, or as the wheel ships it."""
    package = Path(__file__).resolve().parents[1]
    for path in (package.parent / "deploy" / name, package / "_shipped" / "deploy" / name):
        if path.is_file():
            return path
    raise DeviceUnavailable(f"deploy/{name} is missing from this installation of prunectl: install it again.")


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that lies on the board, in the agent's cache. path: there. cached: it had been built before, with these settings.

    command: the trtexec call that built it. simulated_by: why this is no real engine, if it is not."""

    name: str
    onnx_sha256: str
    path: str
    sha256: str
    bytes: int
    tensorrt: str
    board: str | None
    build_s: float
    cached: bool
    command: tuple[str, ...]
    simulated_by: tuple[str, ...]

    @property
    def simulated(self) -> bool:
        return bool(self.simulated_by)


def measure(job: Job, settings: Settings, *, host: str | None, say: Say) -> RawBench:
    """The job, measured by the agent on `host`, or on this machine. Raises DeviceUnavailable, UsageError (host name)."""
    raw = _converse(host, job, settings, say, build_only=False)
    return RawBench.from_dict(raw, source=f"the agent's answer from {host or 'this machine'}")


def build_engines(models: Sequence[OnnxModel], settings: Settings, *, host: str | None, say: Say) -> tuple[BuiltEngine, ...]:
    """One engine of each model, built by the agent on `host`, or on this machine; nothing is run. Raises as `measure` does."""
    raw = _converse(host, Job(models=tuple(models)), settings, say, build_only=True)
    about = raw["environment"]
    shared = {"tensorrt": about["tensorrt"], "board": about["board"], "simulated_by": tuple(raw["simulated_by"])}
    own = ("name", "onnx_sha256", "path", "sha256", "bytes", "build_s", "cached")
    return tuple(BuiltEngine(**{k: e[k] for k in own}, command=tuple(e["command"]), **shared) for e in raw["engines"])


def request_of(job: Job, settings: Settings) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(request, files by their sha256) of PROTOCOL.md. Raises UsageError for a model whose weights lie beside it."""
    files: dict[str, bytes] = {}
    models, train = [], []
    for model in job.models:
        if model.weights:
            raise UsageError(f"{model.path} keeps weights in {model.weights[0].name} beside it: export it as one file for a board.")
        about = _keep(files, model.path.read_bytes())
        models.append(about | {"name": model.name, "batch": model.batch, "shapes": model.shapes})
    if job.train:
        from prunectl.bench.trace import trace_training  # torch: a bench of files needs none
    for task in job.train:
        about = _keep(files, trace_training(task.module, task.input_shape))
        fields = {name: getattr(task, name) for name in ("name", "input_shape", "num_classes", "steps", "warmup_steps")}
        train.append(about | fields)
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name not in HOST_ONLY}
    if train:
        plain["trainer"] = agent_path("trainer.py").read_text(encoding="utf-8")
    return plain | {"protocol": PROTOCOL, "models": models, "train": train}, files


def _keep(files: dict[str, bytes], data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    files[sha256] = data
    return {"sha256": sha256, "bytes": len(data)}


def _converse(host: str | None, job: Job, settings: Settings, say: Say, *, build_only: bool) -> Mapping[str, Any]:
    """The record that the agent's answer carries."""
    text = agent_path().read_bytes()
    python = [sys.executable] if host is None and settings.python == Settings.python else list(settings.python)
    command = [*python, "-c", BOOTSTRAP, str(len(text))]
    argv = ssh.argv(host, command) if host is not None else command
    request, files = request_of(job, settings)
    request["build_only"] = build_only
    body = json.dumps(request).encode()
    with _Agent(argv, host, settings.slack_s) as agent:
        agent.send(text)
        hello = agent.event("hello")
        if hello["protocol"] != PROTOCOL:
            raise DeviceUnavailable(
                f"the agent on {agent.where} speaks protocol {hello['protocol']}, this release speaks {PROTOCOL}: update one of them."
            )
        agent.send(b"%012d" % len(body) + body)
        for sha256 in agent.event("need", settings.slack_s)["sha256"]:
            say(f"sending {len(files[sha256]) / 1e6:.1f} MB")
            agent.send(files[sha256])
        at_most_s = 0.0
        while True:
            event = agent.event(None, at_most_s)
            if event["event"] == "result":
                record: Mapping[str, Any] = event["raw"]
                return record
            if event["event"] == "phase":
                say(event["text"])
                at_most_s = event["at_most_s"]


class _Agent:
    """A running agent and the pipes to it; used in a `with`, at whose end it is gone."""

    def __init__(self, argv: Sequence[str], host: str | None, slack_s: float) -> None:
        self.where = host or "this machine"
        self._host, self._slack_s = host, slack_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        try:
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr)
        except OSError as error:
            self._stderr.close()
            raise DeviceUnavailable(f"{argv[0]} could not be started: {error.strerror}; install it or check PRUNECTL_SSH.") from None
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._lines = self._read_lines()
        self._deadline = 0.0

    def __enter__(self) -> _Agent:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def send(self, data: bytes) -> None:
        """All of `data`, as fast as it is taken. Raises DeviceUnavailable when none of it is taken for slack_s."""
        view = memoryview(data)
        while view:
            # watch stdout too: an agent that refuses says so there and reads no further
            readable, writable, _ = select.select([self._out], [self._in], [], self._slack_s)
            if not writable and not readable:
                raise DeviceUnavailable(f"{self.where} took no data for {self._slack_s:.0f} s: the connection or the board hangs.")
            if not writable:
                self.event("error")
            try:
                view = view[os.write(self._in, view[: 1 << 16]) :]
            except BrokenPipeError:
                self.event("error")

    def event(self, name: str | None, at_most_s: float = 0.0) -> Mapping[str, Any]:
        """The next event, or the next one called `name`. Raises DeviceUnavailable with the agent's reason, or ssh's."""
        self._deadline = time.monotonic() + at_most_s + self._slack_s
        for line in self._lines:
            _, mark, text = line.partition(MARK)
            if not mark:
                continue  # a login banner, say; one without an end of line comes before the mark
            event: Mapping[str, Any] = json.loads(text)
            if event["event"] == "error":
                said = "".join(c if c.isprintable() else " " for c in event["message"])  # of a program there: what it said may be anything
                raise DeviceUnavailable(f"{self.where}: {said}.")
            if name is None or event["event"] == name:
                return event
        raise DeviceUnavailable(self._why_it_ended())

    def _read_lines(self) -> Iterator[bytes]:
        """Lines of stdout until it ends. Raises DeviceUnavailable at the deadline."""
        rest = bytearray()
        while True:
            if not select.select([self._out], [], [], max(0.0, self._deadline - time.monotonic()))[0]:
                raise DeviceUnavailable(f"{self.where} said nothing for longer than it should have: the board or the connection hangs.")
            data = os.read(self._out, 1 << 20)
            if not data:
                return
            self._deadline = max(self._deadline, time.monotonic() + self._slack_s)  # a long line over a slow link
            rest += data
            if b"\n" in data:
                *lines, tail = bytes(rest).split(b"\n")
                rest = bytearray(tail)
                yield from lines

    def _why_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self._stderr.seek(0)
        stderr = self._stderr.read().decode("utf-8", "replace")
        if self._host and code == 255:
            return f"{self._host}: {ssh.meaning(self._host, stderr)}."
        if code == 127:
            return f"{self.where} has no python3: install it there, or name it in bench.python."
        said = [line.strip() for line in stderr.splitlines() if line.strip()]
        return f"{self.where}: the agent ended before it had a result (exit code {code}); {said[-1] if said else 'was it killed?'}."
