"""Several nodes: torchrun in two network namespaces that share only a connection and a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, newest, same_weights

PORT = 29500
# log every step, so that the log shows which steps were taken
OPTIONS = ["--gpus", "0", "--crop", "67", "--global-batch", "16", "--workers", "0", "--log-every", "1"]
OPTIONS += ["--no-progress", "--no-tensorboard", "--decode-threads", "1", "--epochs", "2"]
OPTIONS += ["--save-every", "4", "--auto-resume"]
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
# torch 2.13 shares the rendezvous's store with the ranks, and then never tells its address to a later torchrun
ENVIRONMENT |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def ip(*arguments: str, permitted: bool = True) -> None:
    """Run `ip`; fails the test if it fails, or skips it if namespaces are not permitted."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        output = f"ip {' '.join(arguments)}: {done.stderr.strip()}"
        if permitted:
            pytest.fail(output)
        pytest.skip(f"network namespaces may not be made here ({output})")


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Names of two network namespaces connected by a veth pair, 10.77.0.1 and 10.77.0.2."""
    if not shutil.which("ip"):
        pytest.skip("the `ip` command is missing: apt-get install iproute2")
    names = [f"alexnet-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name, permitted=False)
            ip("netns", "exec", name, "true", permitted=False)
        here, there = (["name", "eth0", "netns", name] for name in names)
        ip("link", "add", *here, "type", "veth", "peer", *there)
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names:
            kill_node(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def kill_node(name: str) -> None:
    """Kill everything in a namespace with -9: torchrun and its ranks."""
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def start_node(names: list[str], i: int, data: Path, out: Path) -> subprocess.Popen[str]:
    """Start torchrun on node `i`; the first one hosts the rendezvous."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"10.77.0.1:{PORT}", "--rdzv-id", out.name]
    # real nodes find out by their host name who hosts, but these two have the same; and a node counts as lost
    # after 30 seconds instead of 15, for a busy machine may not hear of one for some
    conf = f"is_host={not i},keep_alive_interval=2,keep_alive_max_attempt=15"
    launcher += ["--rdzv-conf", conf, "--local-addr", f"10.77.0.{i + 1}", "--max-restarts", "3"]
    command = [*launcher, str(ROOT / "train.py"), "--data", str(data), "--out", str(out), *OPTIONS]
    return subprocess.Popen(
        ["ip", "netns", "exec", names[i], *command],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_logged(out: Path) -> list[dict[str, object]]:
    """log.jsonl without times."""
    path = out / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    output = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)
    return output


@pytest.mark.timeout(600)  # a busy machine takes minutes
def test_a_node_that_is_killed_and_comes_back_changes_nothing(
    nodes: list[str], dataset: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([start_node(nodes, i, dataset, whole) for i in range(2)])
    survivor, victim = (start_node(nodes, i, dataset, killed) for i in range(2))
    deadline = time.monotonic() + 150
    # some steps after a checkpoint
    while not any(entry["step"] == 6 for entry in steps_logged(killed)):
        assert time.monotonic() < deadline and survivor.poll() is None
        time.sleep(0.01)
    kill_node(nodes[1])
    assert victim.wait(30) == -signal.SIGKILL
    assert newest(killed)["step"] < newest(whole)["step"] == 12
    # the other node's rank loses its peer, or torchrun notices first; either way both start again
    finish([survivor, start_node(nodes, 1, dataset, killed)])
    assert newest(killed)["step"] == 12
    assert same_weights(newest(killed), newest(whole))
    # each step once, with the same loss, learning rate and validation
    assert steps_logged(killed) == steps_logged(whole)
    assert [e["step"] for e in steps_logged(killed) if e["kind"] == "train"] == list(range(1, 13))
