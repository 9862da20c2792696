"""Runs of the command line in processes that can be killed: forked from one that has imported everything already.

`python tests/fault_process.py` is that process. It does no arithmetic itself, so that a fork of it is as good as a fresh one.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT = 240.0


class Command:
    """One command that was started: its process, what it prints, how it ended."""

    def __init__(self, folder):
        self.folder = folder

    @property
    def pid(self):
        return int(self._read("pid", TIMEOUT))

    def wait(self, timeout=TIMEOUT):
        """Exit status; of a killed process minus the signal's number."""
        return int(self._read("status", timeout))

    @property
    def output(self):
        return (self.folder / "output").read_text(errors="replace")

    def until(self, holds, timeout=TIMEOUT):
        """Wait for something to be so; that it never is fails."""
        limit = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < limit, self.output
            assert not (self.folder / "status").exists(), self.output
            time.sleep(0.02)

    def _read(self, name, timeout):
        limit = time.monotonic() + timeout
        while not (self.folder / name).exists():
            assert time.monotonic() < limit, f"{self.folder}: no {name}; {self.output}"
            time.sleep(0.01)
        return (self.folder / name).read_text()


class Zygote:
    """Starts commands."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *arguments, cwd=None, **environment):
        self.count += 1
        folder = self.folder / f"command-{self.count}"
        folder.mkdir()
        asked = {"arguments": [str(one) for one in arguments], "folder": str(folder), "environment": environment}
        self.process.stdin.write(json.dumps(asked | {"cwd": str(cwd or self.folder)}) + "\n")
        self.process.stdin.flush()
        return Command(folder)

    def run(self, *arguments, **named):
        """(exit status, what was printed)"""
        command = self.start(*arguments, **named)
        return command.wait(), command.output

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


def failing(fault, log):
    """The environment in which a fault happens; `fired` reads the log."""
    return {"CASCADE_FAILPOINT": fault, "CASCADE_ALLOW_FAILPOINTS": "1", "CASCADE_FAILPOINT_LOG": str(log)}


def fired(log):
    return log.read_text().splitlines() if log.exists() else []


def weights_of(run):
    """sha256 of every member's weights."""
    files = sorted(run.glob("members/*/*.safetensors"))
    return {file.relative_to(run).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def results_of(run):
    """family.json without what differs from run to run."""
    family = json.loads((run / "family.json").read_text())
    for row in family["rows"]:
        for key in ("speed", "cost"):
            row.pop(key)
        row["tokens"].pop("teacher_labelled")  # fewer where a cache had some
    return family


def leftovers(run):
    """What no finished run may leave."""
    names = ("**/.staging-*", "**/.partial-*", "**/.replaced-*", "**/.*.json-*", "**/*.damaged")
    return [str(path) for name in names for path in run.glob(name)]


def _serve():
    import cascade.cli.main
    import cascade.pipeline.run  # noqa: F401
    from cascade.evaluation.tasks_lm_eval import harness  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if os.fork() == 0:
            _supervise(asked)
        # Those that are through are collected, or there would be ever more of them.
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def _supervise(asked):
    """Fork the command, wait for its end, write that down."""
    folder = Path(asked["folder"])
    child = os.fork()
    if child == 0:
        _command(asked)
    (folder / "pid.new").write_text(str(child))
    (folder / "pid.new").rename(folder / "pid")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder / "status.new").write_text(str(status))
    (folder / "status.new").rename(folder / "status")
    os._exit(0)


def _command(asked):
    os.setsid()
    output = os.open(Path(asked["folder"]) / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _reload_in_a_fork()
    os.chdir(asked["cwd"])
    os.environ.update(asked["environment"])
    if "LIMIT_FILE_BYTES" in os.environ:
        limit = int(os.environ["LIMIT_FILE_BYTES"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "LIMIT_MORE_MEMORY" in os.environ:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = held + int(os.environ["LIMIT_MORE_MEMORY"])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from cascade.cli.main import main

    status = 0
    try:
        main(asked["arguments"], prog_name="cascade")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Reloader:
    """Stands for the process that reloads checkpoints: a fork of this one, which has imported all that it needs."""

    def __init__(self, pid, stdin, stdout):
        self.pid, self.stdin, self.stdout = pid, os.fdopen(stdin, "w"), os.fdopen(stdout)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        os.waitpid(self.pid, 0)


def _reload_in_a_fork():
    from cascade.evaluation import reload, reload_process

    (asked, asks), (answers, answered) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(asks)
        os.close(answers)
        sys.stdin, sys.stdout = os.fdopen(asked), os.fdopen(answered, "w")
        reload_process._serve()
        os._exit(0)
    os.close(asked)
    os.close(answered)
    process = _Reloader(pid, asks, answers)
    reload.start_fresh_process = lambda: process
    from cascade.evaluation import evaluate

    evaluate.start_fresh_process = lambda: process


if __name__ == "__main__":
    _serve()
