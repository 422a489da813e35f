"""Two hosts on this machine: network namespaces with names of their own, joined by a link that can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch import environment

HOSTS = ("host-a", "host-b")
_ETC = Path("/etc/netns")


class Hosts:
    """The link is up; whatever was started ends with the context."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.started: list[subprocess.Popen] = []

    def torchrun(self, number: int, words: Sequence[str], log: Path, python: str) -> subprocess.Popen:
        """One rank on a host, as a job of two hosts; what it says goes to `log`."""
        launch = [
            python,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--max-restarts",
            "3",
        ]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "job"]
        launch += ["--local-addr", f"10.77.0.{number + 1}", "--monitor-interval", "0.2", *words]
        inside = ["ip", "netns", "exec", self._name(number), "unshare", "--uts", "sh", "-c"]
        named = f'hostname {HOSTS[number]}; exec "$@"'
        with log.open("a") as file:
            process = subprocess.Popen(
                [*inside, named, "sh", *launch],
                env=environment(2, GLOO_SOCKET_IFNAME="cable"),
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def link(self, up: bool) -> None:
        """Cut or mend the link."""
        _ip("-n", self._name(1), "link", "set", "cable", "up" if up else "down")

    def _name(self, number: int) -> str:
        return f"{self.prefix}{number}"


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make them; wants the rights to."""
    hosts = Hosts(f"medground{os.getpid()}-")
    names = [hosts._name(number) for number in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
            (_ETC / name).mkdir(parents=True)  # `ip netns exec` puts its files in place of those in /etc
            known = ["127.0.0.1 localhost", *(f"10.77.0.{n + 1} {host}" for n, host in enumerate(HOSTS))]
            (_ETC / name / "hosts").write_text("\n".join(known) + "\n")
        _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            for device in ("cable", "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        for name in names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in found.split():
                os.kill(int(pid), 9)
        for process in hosts.started:
            process.wait()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(_ETC / name, ignore_errors=True)


def why_not() -> str | None:
    """Why this machine cannot have them; None where it can."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "no ip or no unshare here"
    name = f"medground{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
