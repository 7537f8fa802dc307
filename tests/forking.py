"""Run by `conftest.py` as a process of its own: imports everything once, then runs each command in a fork of itself.

A request is one line of JSON on stdin, its answer one line on stdout. A fork may be killed by SIGKILL (after some
seconds, or before a line of the modules that write files, counted from 1), be given limits, a small or read-only disk at
`disk`, and no network.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import av
import decord
import matplotlib.figure

from tav_peft import formats, lock, tensor_file, trail, whole
from tav_peft.adapter import Adapter
from tav_peft.cli.main import main
from tav_peft.inversion import Inversion
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.tuning import tune
from tav_peft.video import writing
from tav_peft.video.clip import Clip

WRITING = {module.__file__ for module in (whole, lock, tensor_file, trail, writing, formats.peft)}
KNOWN = {"Adapter": Adapter, "Clip": Clip, "Inversion": Inversion, "Path": Path, "formats": formats}
USED = (TuneAVideoPipeline, tune, main, av, decord, matplotlib.figure)  # imported for what they import


def count_lines(end: int | None, count_to: int) -> None:
    """Count the lines of the writing modules as they run; at line `end` stop living, and tell the count at the end."""
    seen = 0

    def line(frame, event, _argument):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == end:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame, _event, _argument):
        return line if frame.f_code.co_filename in WRITING else None

    def tell():
        sys.settrace(None)
        os.write(count_to, str(seen).encode())

    contextlib_exit.callback(tell)
    sys.settrace(call)


def mount(disk: str, options: str) -> None:
    """Mount an empty disk in memory that this process alone sees; whoever may not leaves with code 77."""
    libc = ctypes.CDLL(None, use_errno=True)
    private, read_only = 1 << 14 | 1 << 18, "ro" in options.split(",")
    done = libc.unshare(0x00020000) == 0 and libc.mount(b"none", b"/", None, private, None) == 0
    sizes = ",".join(each for each in options.split(",") if each != "ro").encode()
    if not done or libc.mount(b"tmpfs", disk.encode(), b"tmpfs", int(read_only), sizes) != 0:
        os._exit(77)


def cut_off() -> None:
    """Refuse whatever would go over a network, and say so."""

    def refuse(event, arguments):
        if event in ("socket.getaddrinfo", "socket.sendto", "socket.connect"):
            target = arguments[-1] if event == "socket.connect" else arguments[0]
            if not isinstance(target, (str, bytes)) or event != "socket.connect":  # no socket of this machine
                print(f"network: {event} {target}", file=sys.stderr)
                raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    sys.addaudithook(refuse)


def memory_in_use() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run(request: dict) -> None:
    os.chdir(request["folder"])
    if "disk" in request:
        mount("disk", request["disk"])
    if request.get("offline"):
        cut_off()
    os.environ.update(request.get("environment", {}))
    for name, value in request.get("limits", {}).items():
        most = value + (memory_in_use() if name == "RLIMIT_AS" else 0)
        resource.setrlimit(getattr(resource, name), (most, most))
    if "code" in request:
        exec(request["code"], dict(KNOWN))
        return
    sys.argv = ["tav", *request["tav"]]
    try:
        main()
    finally:
        if "disk" in request:
            print("on the disk:", *sorted(str(path) for path in Path("disk").rglob("*")))


def answer(request: dict) -> dict:
    reading, count_to = os.pipe()
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (the fork writes to them)
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 0
        try:
            os.close(reading)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            with contextlib_exit:
                if "line" in request:
                    count_lines(request["line"] or None, count_to)
                run(request)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 70
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    os.close(count_to)
    limit = request.get("seconds")
    timer = threading.Timer(limit, os.kill, (child, signal.SIGKILL)) if limit is not None else None
    if timer:
        timer.start()
    _, status = os.waitpid(child, 0)
    if timer:
        timer.cancel()
        timer.join()
    counted = os.read(reading, 100).decode()
    os.close(reading)
    out.seek(0)
    err.seek(0)
    stdout, stderr = (each.read().decode(errors="replace") for each in (out, err))
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": stdout,
        "stderr": stderr,
        "said": stdout + stderr,
        "lines": int(counted or 0),
        "seconds": time.monotonic() - began,
    }


if __name__ == "__main__":
    contextlib_exit = contextlib.ExitStack()
    for text in sys.stdin:
        print(json.dumps(answer(json.loads(text))), flush=True)
