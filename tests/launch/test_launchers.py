"""launcher/pretrain.py trains the same run under every launcher: on one machine, and on two hosts over ssh."""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

HOSTFILE_EXAMPLE = Path(__file__).resolve().parents[2] / "launcher" / "hostfile.example"
HOSTS = ("127.0.0.2", "127.0.0.3")
"""Two addresses of every Linux machine, so that nothing has to be set up for two hosts."""


def test_one_process_without_a_launcher_trains_the_same_run(run, launch, two_rank_losses):
    launched = launch(["python", "launcher/pretrain.py", *run.arguments(ep_size=1)])
    assert launched.returncode == 0, launched.output
    # The same global batch in one forward instead of two: only the order of float32 sums differs.
    assert run.losses() == pytest.approx(two_rank_losses, rel=1e-5)


def test_a_world_that_is_too_small_for_the_experts_is_refused(run, launch):
    launched = launch(["python", "launcher/pretrain.py", *run.arguments(ep_size=2)])
    assert launched.returncode == 2
    assert "ranks (1) must be divisible by parallel.ep_size (2)" in launched.output
    assert "Traceback" not in launched.output


def test_deepspeed_on_one_host_trains_the_same_run(run, launch, free_ports, two_rank_losses):
    (port,) = free_ports(1)
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(port), "launcher/pretrain.py"]
    launched = launch([*command, *run.arguments()])
    assert launched.returncode == 0, launched.output
    assert run.losses() == two_rank_losses


def test_mpirun_trains_the_same_run(run, launch, free_ports, require, two_rank_losses):
    (mpirun,) = require("mpirun")
    (port,) = free_ports(1)
    command = [mpirun, "-n", "2", "python", "launcher/pretrain.py", *run.arguments()]
    launched = launch(command, MASTER_PORT=str(port))
    assert launched.returncode == 0, launched.output
    assert run.losses() == two_rank_losses


@pytest.fixture(scope="module")
def ssh(daemons, free_ports, require):
    """(port, client configuration) of an sshd of our own that listens on both hosts and knows one fresh key."""
    sshd, keygen, _ = require("sshd", "ssh-keygen", "ssh")
    folder = daemons.folder
    for key in ("host_key", "user_key"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # sshd started by root refuses to run without it
    (port,) = free_ports(1)
    listen = "\n".join(f"ListenAddress {host}" for host in HOSTS)
    (folder / "sshd_config").write_text(
        f"Port {port}\n{listen}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        # Variables do not travel over ssh; on a cluster they come from .deepspeed_env or the hosts' own profiles.
        "SetEnv OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE DS_ACCELERATOR=cpu\n"
    )
    client = folder / "ssh_config"
    client.write_text(
        f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    daemons.start([sshd, "-D", "-e", "-f", str(folder / "sshd_config")])
    for host in HOSTS:
        daemons.wait_until(lambda host=host: accepts(host, port), f"sshd listens on {host}:{port}")
    return port, client


def accepts(host, port):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_a_hostfile_over_ssh_trains_the_same_run(run, launch, free_ports, require, ssh, tmp_path, two_rank_losses):
    require("pdsh")
    ssh_port, ssh_config = ssh
    hostfile = tmp_path / "hosts"
    example = HOSTFILE_EXAMPLE.read_text()
    names = re.findall(r"^(\S+) slots=8$", example, re.MULTILINE)
    assert len(names) == len(HOSTS)
    for name, host in zip(names, HOSTS, strict=True):
        example = example.replace(f"{name} slots=8", f"{host} slots=1")
    hostfile.write_text(example)
    (port,) = free_ports(1)
    # The check would use the user's own ssh configuration, which does not know these hosts.
    command = ["deepspeed", "--hostfile", str(hostfile), "--ssh_port", str(ssh_port), "--no_ssh_check"]
    command += ["--master_addr", HOSTS[0], "--master_port", str(port), "launcher/pretrain.py"]
    launched = launch([*command, *run.arguments()], PDSH_SSH_ARGS_APPEND=f"-F {ssh_config}")
    assert launched.returncode == 0, launched.output
    assert f"{HOSTS[0]},{HOSTS[1]}" in launched.output
    assert run.losses() == two_rank_losses
