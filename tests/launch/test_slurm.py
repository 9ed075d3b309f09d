"""The batch script and srun on a real SLURM: two nodes, a controller and munge, all on this machine."""

import contextlib
import getpass
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launcher" / "slurm" / "pretrain.sbatch"

soak = pytest.mark.skipif("EVE_DS_SOAK" not in os.environ, reason="minutes: make soak")
NODES = ("127.0.0.2", "127.0.0.3")
"""Node names that resolve everywhere, as names in a cluster do."""


@pytest.fixture(scope="module")
def cluster(daemons, free_ports, require):
    """Environment in which SLURM's commands talk to a two-node cluster of our own."""
    munged, slurmctld, slurmd, *_ = require("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo")
    if os.geteuid() != 0:
        pytest.skip("needs root: slurmd starts tasks only for root")
    folder = daemons.folder
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    start_munge(daemons, munged)
    write_configuration(folder, *free_ports(3))
    daemons.start([slurmctld, "-D", "-f", environment["SLURM_CONF"]])
    for node in NODES:
        daemons.start([slurmd, "-D", "-N", node, "-f", environment["SLURM_CONF"]])
    sinfo = ["sinfo", "--noheader", "--format=%T"]
    daemons.wait_until(lambda: output_of(sinfo, environment) == "idle", "both nodes are idle")
    yield environment
    subprocess.run(["scancel", "--user", getpass.getuser()], env=os.environ | environment, check=True)
    daemons.wait_until(lambda: output_of(["squeue", "--noheader"], environment) == "", "no job is left", limit=60)


def start_munge(daemons, munged):
    """Authentication with a key of our own; its folder may belong to anybody, hence --force."""
    folder = daemons.folder
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    names = {"socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge-own.log", "seed-file": "munge.seed"}
    files = [f"--{option}={folder}/{name}" for option, name in names.items()]
    daemons.start([munged, "--force", "--foreground", f"--key-file={folder}/munge.key", *files])
    daemons.wait_until((folder / "munge.sock").exists, "munge has its socket")


def write_configuration(folder, controller_port, *node_ports):
    """slurm.conf and gres.conf: nodes that claim 64 cores and 8 GPUs, so that the batch script fits unchanged."""
    for index in range(8):
        (folder / f"gpu{index}").touch()
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-7]\n")
    (folder / "state").mkdir()
    nodes = "\n".join(
        f"NodeName={node} NodeAddr={node} NodeHostname=localhost Port={port} CPUs=64 Gres=gpu:8"
        for node, port in zip(NODES, node_ports, strict=True)
    )
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmdTimeout=10
SchedulerParameters=sched_interval=1,defer_batch=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld-own.log
SlurmdLogFile={folder}/slurmd-%n-own.log
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
""")


def output_of(command, environment):
    done = subprocess.run(
        command, check=False, env=os.environ | environment, capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip()


def submit(run, launch, cluster, log, max_steps):
    """Submit the batch script as it is; only tasks and cores per node are made to fit. Gives the job id."""
    fit = ["--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={log}"]
    command = ["sbatch", *fit, "launcher/slurm/pretrain.sbatch", *run.arguments(max_steps=max_steps)]
    submitted = launch(command, PYTHON=sys.executable, **cluster)
    assert submitted.returncode == 0, submitted.output
    return submitted.output.strip()


@soak
@pytest.mark.timeout(600)
def test_a_preempted_job_requeues_itself_and_resumes_three_times(run, launch, cluster, daemons, tmp_path):
    log, queue = tmp_path / "job.log", ["squeue", "--noheader", "--format=%T"]
    job = submit(run, launch, cluster, log, max_steps=1_000_000)
    for round in range(1, 4):
        daemons.wait_until(lambda round=round: steps_since_start(run, log, round) >= 3, "training", limit=120)
        subprocess.run(["scancel", "--signal=USR1", job], env=os.environ | cluster, check=True)
        daemons.wait_until(lambda round=round: saves(log) == round, "the job has saved", limit=60)
    daemons.wait_until(lambda: steps_since_start(run, log, 4) >= 3, "training", limit=120)
    subprocess.run(["scancel", job], env=os.environ | cluster, check=True)
    daemons.wait_until(lambda: output_of(queue, cluster) == "", "the job is over", limit=60)
    assert "JobState=CANCEL" in output_of(["scontrol", "show", "job", job], cluster)
    text = log.read_text()
    assert text.count("resumed from") == 3
    assert saves(log) == 4, "scancel without a signal saves too, but queues nothing again"
    assert "Traceback" not in text
    assert run.steps() == list(range(1, max(run.steps()) + 1)), "every step once: nothing was lost"


@soak
@pytest.mark.timeout(600)
def test_a_job_that_loses_a_node_waits_for_it_and_resumes(run, launch, cluster, daemons, tmp_path):
    """The daemon of the second node dies, then that of the batch script's node, then the second node as a whole."""
    log, queue = tmp_path / "job.log", ["squeue", "--noheader", "--format=%T"]
    job = submit(run, launch, cluster, log, max_steps=1_000_000)
    for start, (node, crashes) in enumerate(((NODES[1], False), (NODES[0], False), (NODES[1], True)), start=1):
        daemons.wait_until(lambda start=start: steps_since_start(run, log, start) >= 3, "training", limit=120)
        daemon, *tasks = processes_of(node, cluster, run.folder)
        command = daemon.cmdline()
        for process in [daemon, *tasks] if crashes else [daemon]:
            process.kill()
        daemons.wait_until(lambda: output_of(queue, cluster) == "PENDING", "the job is queued again", limit=120)
        daemons.start(command)
        resume = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        subprocess.run(resume, env=os.environ | cluster, check=True)
    daemons.wait_until(lambda: steps_since_start(run, log, 4) >= 3, "training", limit=120)
    subprocess.run(["scancel", job], env=os.environ | cluster, check=True)
    daemons.wait_until(lambda: output_of(queue, cluster) == "", "the job is over", limit=60)
    text, resumed = log.read_text(), re.findall(r"resumed from .*step-(\d+)", log.read_text())
    assert len(resumed) == 3
    assert "Traceback" not in text
    assert run.steps()[: int(resumed[-1])] == list(range(1, int(resumed[-1]) + 1)), "a daemon alone loses no step"
    assert text.count("another rank has ended") == 1, "the rank of the other node notices the crash"


def processes_of(node, cluster, folder):
    """Daemon of a node, then the ranks of a run on it, each with the daemon's helper above it."""
    daemon, tasks = None, []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if command[1:] == ["-D", "-N", node, "-f", cluster["SLURM_CONF"]]:
                daemon = process
            elif str(folder) in command and process.environ().get("SLURMD_NODENAME") == node:
                tasks += [process.parent(), process]
    return [daemon, *tasks]


def saves(log):
    """Number of starts that a signal has ended after a save."""
    return log.read_text().count("Stopped by signal; rerun the same command to resume.")


def steps_since_start(run, log, start):
    """Number of steps that the job has made since its `start`-th start."""
    resumed = re.findall(r"resumed from .*step-(\d+)", log.read_text()) if log.is_file() else []
    if len(resumed) < start - 1 or not (run.folder / "metrics.jsonl").is_file():
        return 0
    return max([0, *run.steps()]) - (int(resumed[-1]) if resumed else 0)


def test_sbatch_trains_on_two_nodes_and_the_same_line_again_resumes(
    run, launch, cluster, daemons, tmp_path, two_rank_losses
):
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    jobs = [submit(run, launch, cluster, log, steps) for log, steps in zip(logs, (2, 3), strict=True)]
    queue = ["squeue", "--noheader", "--format=%i %T %r"]
    assert f"{jobs[1]} PENDING Dependency" in output_of(queue, cluster), "singleton: the second waits for the first"
    daemons.wait_until(lambda: output_of(queue, cluster) == "", "both jobs are over", limit=240)
    for job, log in zip(jobs, logs, strict=True):
        state = output_of(["scontrol", "show", "job", job], cluster)
        assert "JobState=COMPLETED" in state, log.read_text()
        assert f"NodeList={NODES[0].removesuffix('2')}[2-3]" in state
    assert "resumed from" in logs[1].read_text()
    assert run.losses()[:2] == two_rank_losses
    assert len(run.losses()) == 3, "the second job trained the third step only"


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_srun_gives_every_task_its_rank(launch, cluster, mpi):
    code = (
        "import os; from eve_ds.launch_environment import read_environment as r; print(r(), os.environ['MASTER_ADDR'])"
    )
    launched = launch(["srun", f"--mpi={mpi}", "--nodes=2", "--ntasks-per-node=2", "python", "-c", code], **cluster)
    assert launched.returncode == 0, launched.output
    found = sorted(re.findall(r"rank=(\d), world_size=(\d), local_rank=(\d).* (\S+)", launched.output))
    assert found == [(str(rank), "4", str(rank % 2), NODES[0]) for rank in range(4)]


def test_srun_tasks_that_are_each_a_world_of_one_are_refused(run, launch, cluster):
    alone = ["env", "RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0"]
    command = ["srun", "--nodes=2", "--ntasks=2", *alone, "python", "launcher/pretrain.py", *run.arguments(ep_size=1)]
    launched = launch(command, **cluster)
    assert launched.returncode == 2
    assert launched.output.count("SLURM_NTASKS (2) requests several tasks, but this process is a world of one") == 2
    assert "start it with srun and do not set RANK" in launched.output
    assert not run.folder.exists()


@pytest.mark.parametrize(("code", "requeued"), [(0, ""), (2, ""), (4, "requeue 77\n")])
def test_a_job_that_saved_at_a_signal_is_queued_again(tmp_path, code, requeued):
    """The batch script itself, with stand-ins for SLURM's commands: a real requeue takes minutes."""
    calls = tmp_path / "calls"
    calls.touch()
    for name, action in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" >> {calls}')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{action}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": "/x"}
    done = subprocess.run(["bash", str(SCRIPT)], env=env, check=False)
    assert done.returncode == code
    assert calls.read_text() == requeued
