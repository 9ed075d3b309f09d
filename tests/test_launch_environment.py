"""Rank and world size for every launcher's variables."""

import pytest

from eve_ds.launch_environment import LaunchError, RankInfo, read_environment

SLURM_STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NODELIST": "cpu1,gpu[03-04]",
}
TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}


def test_torch_variables_are_used_unchanged():
    environ = dict(TORCH)
    assert read_environment(environ) == RankInfo(5, 8, 1, "torch")
    assert environ == TORCH


def test_slurm_step_is_mapped_and_exported():
    environ = dict(SLURM_STEP)
    assert read_environment(environ) == RankInfo(11, 16, 3, "slurm")
    exported = {name: environ[name] for name in TORCH}
    assert exported == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(15000 + (47110 + 2) % 15000),
    }


def test_given_master_address_and_port_are_kept():
    environ = SLURM_STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6000"}
    read_environment(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "6000")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("gpu[003-010,012]", "gpu003"),
        ("gpu[9,12-14],cpu2", "gpu9"),
        ("alpha,beta[1-2]", "alpha"),
        ("rack[2-3]-node[08-09]", "rack2-node08"),
        ("127.0.0.[2-3]", "127.0.0.2"),
    ],
)
def test_master_address_is_the_first_host_of_a_slurm_node_list(nodes, first):
    environ = SLURM_STEP | {"SLURM_STEP_NODELIST": nodes}
    read_environment(environ)
    assert environ["MASTER_ADDR"] == first


def test_tasks_of_a_step_derive_one_port_and_steps_derive_different_ports():
    ports = set()
    for step in "01":
        for rank in "07":
            environ = SLURM_STEP | {"SLURM_STEP_ID": step, "SLURM_PROCID": rank}
            read_environment(environ)
            ports.add((step, environ["MASTER_PORT"]))
    assert len(ports) == 2
    assert len({port for _, port in ports}) == 2


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
    ],
)
def test_mpi_variables_are_mapped_and_a_single_host_needs_no_address(variables):
    environ = dict(variables)
    assert read_environment(environ) == RankInfo(1, 2, 1, "mpi")
    assert environ["MASTER_ADDR"] == "127.0.0.1"


def test_mpi_variables_override_those_of_the_slurm_job():
    inside = SLURM_STEP | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    environ = inside | {"PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"}
    assert read_environment(environ) == RankInfo(9, 16, 1, "mpi")
    assert environ["MASTER_ADDR"] == "gpu03"


def test_mpi_over_several_hosts_requires_master_address():
    environ = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set and cannot be derived for a world of 4: export it"):
        read_environment(environ)


def test_pmi2_under_srun_takes_the_local_rank_from_slurm():
    environ = SLURM_STEP | {"PMI_RANK": "11", "PMI_SIZE": "16"}
    assert read_environment(environ) == RankInfo(11, 16, 3, "mpi")


def test_plain_python_is_a_world_of_one():
    environ = {}
    assert read_environment(environ) == RankInfo(0, 1, 0, "single")
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("0", "1", "0")


@pytest.mark.parametrize(
    ("extra", "source"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK 0, WORLD_SIZE 1"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "by its mpi variables"),
    ],
)
def test_world_of_one_inside_a_step_of_several_tasks_is_refused(extra, source):
    with pytest.raises(LaunchError) as caught:
        read_environment(SLURM_STEP | extra)
    text = str(caught.value)
    assert "SLURM_NTASKS (16)" in text
    assert source in text
    assert "start it with srun" in text
    assert "\n" not in text


def test_plain_python_in_the_batch_script_of_several_tasks_is_refused():
    environ = {name: value for name, value in SLURM_STEP.items() if name != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    with pytest.raises(LaunchError, match=r"SLURM_NTASKS \(16\).*no srun step around it"):
        read_environment(environ)


def test_job_of_one_task_may_have_one_process():
    assert read_environment(SLURM_STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).world_size == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set, but the launcher's other variables are"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, r"RANK \('one'\) must be an integer"),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            r"^RANK \(2\) must be in 0 \.\. WORLD_SIZE - 1 \(1\): unset both, or start with torchrun, srun or mpirun$",
        ),
        (
            {"PMI_RANK": "-1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"},
            r"^PMI_RANK \(-1\) must be in 0 \.\. PMI_SIZE",
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is not set"),
    ],
)
def test_invalid_environment_error_names_the_variable(environ, message):
    with pytest.raises(LaunchError, match=message):
        read_environment(environ)
