"""``ddpm-fast`` in processes of their own that can be killed, without a start of Python for each.

This file's own process imports the package once and forks for every command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path


class Forks:
    """The process that forks; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()

    def start(self, arguments: list[str], code: str = "", **environment: str) -> Forked:
        """A command, after lines of Python that get in its way."""
        said = str(self._folder / f"process-{self._count}")
        self._count += 1
        pid = self.ask(
            arguments=arguments, code=textwrap.dedent(code), environment=environment, said=said
        )
        return Forked(self, pid, said)

    def ask(self, **request: object) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


class Forked:
    """A command that runs."""

    def __init__(self, forks: Forks, pid: int, said: str) -> None:
        self._forks, self.pid, self._said = forks, pid, said

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # until wait it is there, if only as a zombie

    def wait(self) -> tuple[int, str, str]:
        """Its status, less than 0 for a signal's; what it has said on stdout and on stderr."""
        status = self._forks.ask(pid=self.pid)
        out, error = (Path(self._said + end).read_text() for end in (".out", ".err"))
        return status, out, error


def _serve() -> None:
    from ddpm_fast import NoiseSchedule, UNet, UNetConfig
    from ddpm_fast.cli import main
    from ddpm_fast.commands import missing_package
    from ddpm_fast.training.draw import Artist, DrawConfig

    # What is imported and made at the first use is so once, for all.
    missing_package("sample", "demo", ("PIL.Image", "safetensors.torch", "tqdm.auto"))
    config = UNetConfig(8, 1, channels=(8,), attention_resolutions=(), norm_groups=4, num_classes=2)
    schedule = NoiseSchedule.linear(2)
    Artist(UNet(config), schedule, "epsilon", "fixed_small", DrawConfig()).images([0])
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            _, status = os.waitpid(request["pid"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        for descriptor, end in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(request["said"] + end, os.O_CREAT | os.O_WRONLY), descriptor)
        os.environ.update(request["environment"])
        exec(request["code"], {})
        sys.exit(main(request["arguments"]))


if __name__ == "__main__":
    _serve()
