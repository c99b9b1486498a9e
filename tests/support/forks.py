"""Processes of `sedd` without the cost of importing: a server imports the program once and forks for each command.

Each is a process like any other: it starts JAX by itself, gets signals, and ends as Python ends.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

_REQUEST = 2**20  # bytes
_POLL_SECONDS = 0.01


class Child:
    """A process that a server has forked, with what tests use of subprocess.Popen."""

    def __init__(self, server: "Server", argv: list[str], env: dict[str, str], prelude: str) -> None:
        out, err = os.pipe(), os.pipe()
        request = {"argv": argv, "env": env, "prelude": prelude}
        self._server = server
        self.pid = server.ask(request, out[1], err[1])
        for end in (out[1], err[1]):
            os.close(end)
        self.stdout, self.stderr = (os.fdopen(pipe[0], encoding="utf-8") for pipe in (out, err))
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kills it if it runs. Nothing more is read."""
        self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()

    def poll(self) -> int | None:
        """The exit status, negative where a signal ended the process; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"wait": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        ends = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired("sedd", timeout)
            time.sleep(_POLL_SECONDS)
        return status

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it still prints until it ends, on standard output and standard error."""
        found = ["", ""]

        def read(number: int, stream: io.TextIOBase) -> None:
            found[number] = stream.read()

        streams = (self.stdout, self.stderr)
        threads = [threading.Thread(target=read, args=one, daemon=True) for one in enumerate(streams)]
        for thread in threads:
            thread.start()
        ends = time.monotonic() + timeout
        for thread in threads:
            thread.join(ends - time.monotonic())
            if thread.is_alive():
                raise subprocess.TimeoutExpired("sedd", timeout)
        self.wait(timeout)
        for stream in streams:
            stream.close()
        return found[0], found[1]


class Server:
    """A process that has imported the program."""

    def __init__(self, variables: dict[str, str]) -> None:
        # Without it a command restarts itself to set it (`hosts.use_huge_pages`), and loses what is imported.
        self._variables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | variables
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=os.environ | self._variables, pass_fds=[theirs.fileno()])
        theirs.close()

    def ask(self, request: dict, *descriptors: int) -> int | None:
        socket.send_fds(self._ours, [json.dumps(request).encode()], descriptors)
        return json.loads(self._ours.recv(_REQUEST))

    def start(self, *argv: str, env: dict[str, str] | None = None, prelude: str = "") -> Child:
        """Begins `sedd` with arguments and variables. The process executes `prelude` before."""
        return Child(self, list(argv), {**(os.environ if env is None else env), **self._variables}, prelude)

    def close(self) -> None:
        self._ours.close()
        self._process.wait()


@functools.cache
def server() -> Server:
    """The server of this worker. It has as many devices as a command's variables say."""
    made = Server({})
    atexit.register(made.close)
    return made


def _serve(asked: socket.socket) -> None:
    """Answers until the other end is closed. Returns in each forked process, which is then to run the command."""
    from sedd_jax.cli import eval_flags, sample_flags  # noqa: F401
    from sedd_jax.evaluation import perplexity  # noqa: F401
    from sedd_jax.training import train  # noqa: F401

    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, _REQUEST, 2)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            asked.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
            continue
        if not (pid := os.fork()):
            asked.close()
            for number, descriptor in zip((1, 2), descriptors, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            # As Python opens them where it begins: to a pipe.
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
            os.environ.clear()
            os.environ.update(request["env"])
            sys.argv = ["sedd", *request["argv"]]
            exec(request["prelude"], {})
            return
        for descriptor in descriptors:
            os.close(descriptor)
        asked.send(json.dumps(pid).encode())


if __name__ == "__main__":
    with contextlib.closing(socket.socket(fileno=int(sys.argv[1]))) as _asked:
        _serve(_asked)
    from sedd_jax import __main__ as program

    program.run()
