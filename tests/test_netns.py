"""Several hosts: network namespaces on this machine, joined by a cable of two ends, each with
addresses and processes of its own. Needs root and iproute2: pytest -m netns"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, records
from helpers import close, equal_records

pytestmark = pytest.mark.netns
PORT = 29411  # of a namespace, so of nobody else
PATIENCE = 600  # seconds, for a machine that is slow or busy


class Host:
    """A namespace and the torchrun in it; two systems to a host."""

    def __init__(self, name: str, address: str):
        self.name, self.address = name, address

    def torchrun(self, first: "Host", config, *flags: object, restarts: int = 0) -> None:
        """As docs/scale-out.md says it, on the host itself."""
        agent = ["--nnodes", "2", "--nproc_per_node", "2", "--max_restarts", str(restarts)]
        agent += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first.address}:{PORT}"]
        agent += ["--rdzv_id", "run", "--local_addr", self.address]
        # the name of this machine leads to 127.0.0.1 in both, so that they can't tell by themselves
        agent += ["--rdzv_conf", f"is_host={self is first}"]
        self.log = open(config.out.parent / f"{self.name}.log", "a+")  # noqa: SIM115
        inside = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        more = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*inside, *agent, "train.py", config.path, "--num_systems", "4", *map(str, flags)],
            cwd=ROOT,
            env=os.environ | more | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def text(self) -> str:
        return Path(self.log.name).read_text()

    def end(self) -> int:
        """Waits for it; its status."""
        return self.process.wait(timeout=PATIENCE)

    def kill(self) -> None:
        """All its processes, those too that they start meanwhile."""
        list_them = ["ip", "netns", "pids", self.name]
        while pids := subprocess.run(list_them, capture_output=True, text=True).stdout.split():
            for pid in pids:
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    pair = [Host(f"gigagpt-{os.getpid()}-{i}", f"10.211.77.{i}") for i in (1, 2)]
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            a, b = (host.name for host in pair)
            cable = f"link add eth0 netns {a} type veth peer name eth0 netns {b}"
            ip(*cable.split())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces can't be made here: {error}")
        for host in pair:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host.name, "link", "set", device, "up")
        yield tuple(pair)
    finally:
        for host in pair:
            if Path("/run/netns", host.name).exists():
                host.kill()
                ip("netns", "del", host.name)


@pytest.fixture
def config(config):
    """Eight sequences and clipping in every step."""
    config.values |= {"batch_size": 8, "max_gradient_norm": 0.1, "learning_rate": 1e-3}
    Path(config.path).write_text(yaml.safe_dump(config.values))
    return config


def await_text(hosts: Iterable[Host], words: str, count: int = 1) -> Host:
    """The first host that has said it so many times."""
    deadline = time.monotonic() + PATIENCE
    while not (found := [host for host in hosts if host.text().count(words) >= count]):
        assert time.monotonic() < deadline, [host.text() for host in hosts]
        time.sleep(0.1)
    return found[0]


def await_steps(hosts: tuple[Host, Host]) -> Host:
    """The host of the first system, when it has told some steps."""
    return await_text(hosts, " | loss ", 10)


def await_lost(host: Host) -> None:
    await_text([host], "connection to another process was lost")


def test_two_hosts_equal_one(run, config, tmp_path, hosts):
    """Weights shared within a host, gradients summed between them: hybrid sharding."""
    flags = ["--num_steps", 20, "--checkpoint_steps", 10]
    assert run("train", config.path, *flags, "--out_dir", tmp_path / "one").status == 0
    for host in hosts:
        host.torchrun(hosts[0], config, *flags)
    for host in hosts:
        assert host.end() == 0, host.text()
    assert "4 processes, 2 share a copy of the weights" in hosts[0].text() + hosts[1].text()
    equal_records(tmp_path / "one", config.out)
    # a unit's files are written by one of the copies, so by one of the hosts
    names = {path.name for path in (config.out / "checkpoint_20.mdl").iterdir()}
    assert {"head.1-of-2.safetensors", "head.2-of-2.safetensors"} <= names
    assert not any("-of-4" in name for name in names)


def test_a_killed_host_comes_back(run, config, tmp_path, hosts):
    """The other notices; its torchrun is started again, and all go on from the newest
    checkpoint."""
    flags = ["--num_steps", 300, "--checkpoint_steps", 5, "--eval_steps", 300]
    flags += ["--keep_checkpoints", 2]
    assert run("train", config.path, *flags, "--out_dir", tmp_path / "one").status == 0
    flags += ["--checkpoint_path", "latest"]
    first, second = hosts
    for host in hosts:
        host.torchrun(first, config, *flags, restarts=3)
    await_steps(hosts)
    second.kill()  # the first holds the rendezvous
    second.process.wait()
    await_lost(first)
    second.torchrun(first, config, *flags, restarts=3)
    for host in hosts:
        assert host.end() == 0, host.text()
    assert "resumed from" in first.text() + second.text()
    for a, b in zip(records(tmp_path / "one"), records(config.out), strict=True):
        assert close(b["loss"], a["loss"], 1e-4), a["step"]  # Adam amplifies rounding


def test_a_killed_host_ends_the_run(config, hosts):
    for host in hosts:
        host.torchrun(hosts[0], config, "--num_steps", 100000)
    teller = await_steps(hosts)
    began = time.monotonic()
    hosts[1 - hosts.index(teller)].kill()
    await_lost(teller)
    assert time.monotonic() - began < 100  # at once, not after the two minutes of step_timeout
    assert teller.end() != 0


def test_a_cut_cable_ends_the_run(config, hosts):
    """No process ends and no connection is closed: silence is all there is to notice."""
    never = ["--eval_steps", 100000, "--checkpoint_steps", 100000]  # these have an hour's patience
    for host in hosts:
        host.torchrun(hosts[0], config, "--num_steps", 100000, "--step_timeout", 30, *never)
    await_steps(hosts)
    ip("-n", hosts[0].name, "link", "set", "eth0", "down")
    for host in hosts:
        await_lost(host)
    assert hosts[0].end() != 0  # the other torchrun waits for the first's store
