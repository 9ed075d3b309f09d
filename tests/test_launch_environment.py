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


TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
"""Variables of a world of two."""


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


def comm_world(prefix, rank=1, size=2, local_rank=1, local_size=2):
    """Variables of Open MPI and of the launchers that follow its names."""
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {f"{prefix}_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ("openmpi", comm_world("OMPI_COMM_WORLD")),
        ("mvapich", comm_world("MV2_COMM_WORLD")),
        ("jsrun", comm_world("JSM_NAMESPACE")),
        ("openmpi", comm_world("JSM_NAMESPACE") | comm_world("OMPI_COMM_WORLD")),  # Spectrum MPI sets both
        ("pmi", {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}),  # MPICH, Intel
        ("pmi", {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}),  # Cray
        ("pals", {"PALS_RANKID": "1", "PMI_SIZE": "2", "PALS_LOCAL_RANKID": "1", "PMI_LOCAL_SIZE": "2"}),
    ],
)
def test_variables_of_mpi_launchers_are_mapped_and_a_single_host_needs_no_address(launcher, variables):
    environ = dict(variables)
    assert read_environment(environ) == RankInfo(1, 2, 1, launcher, 2)
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert read_environment(environ) == RankInfo(1, 2, 1, "torch", 2), "a second call finds what the first exported"


def test_flux_needs_the_address_of_the_first_host():
    environ = {"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1", "PMI_RANK": "3", "PMI_SIZE": "4"}
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set and cannot be derived for a world of 4"):
        read_environment(dict(environ))
    assert read_environment(environ | {"MASTER_ADDR": "head"}) == RankInfo(3, 4, 1, "flux")


def test_a_step_without_the_tasks_of_the_job_has_those_of_the_step():
    environ = {name: value for name, value in SLURM_STEP.items() if name != "SLURM_NTASKS"}
    assert read_environment(environ | {"SLURM_STEP_NUM_TASKS": "12"}) == RankInfo(11, 12, 3, "slurm")
    # A step of part of the job: srun sets SLURM_NTASKS to the step's number too, but a script may have exported it.
    assert read_environment(SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "12"}).world_size == 12
    with pytest.raises(LaunchError, match=r"^SLURM_STEP_NUM_TASKS is not set"):
        read_environment(environ)


@pytest.mark.parametrize("rank", ["0", "3"])
@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACME_RANK": "", "ACME_SIZE": "4"}, r"ACME_RANK \(\d\) of ACME_SIZE \(4\)"),
        ({"ACME_TASK_RANK": "", "ACME_NTASKS": "4"}, r"ACME_TASK_RANK \(\d\) of ACME_NTASKS \(4\)"),
        ({"ACME_PROCID": "", "ACME_NPROCS": "4"}, r"ACME_PROCID \(\d\) of ACME_NPROCS \(4\)"),
        ({"PMIX_RANK": "", "PMIX_NAMESPACE": "prte-1@1"}, r"PMIX_RANK \(\d\)"),
        ({"ALPS_APP_PE": ""}, r"ALPS_APP_PE \(\d\)"),
    ],
)
def test_tasks_of_an_unknown_launcher_are_refused_by_the_name_of_their_variable(variables, named, rank):
    environ = {name: value or rank for name, value in variables.items()}
    with pytest.raises(LaunchError, match=f"^{named} is the variable of a launcher that is not known.*set RANK"):
        read_environment(environ)
    assert read_environment(environ | {"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1, "the remedy works"


@pytest.mark.parametrize("variables", [{"ACME_RANK": "0", "ACME_SIZE": "1"}, {"PAGE_RANK": "7"}, {"NODE_RANK": "x"}])
def test_names_that_end_like_ranks_do_not_matter_without_several_tasks(variables):
    assert read_environment(dict(variables)) == RankInfo(0, 1, 0, "single")


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")])
def test_half_of_the_variables_of_torch_are_refused(name, value):
    with pytest.raises(LaunchError, match=rf"^{name} \({value}\) is set, but RANK is not: set RANK too, or unset"):
        read_environment({name: value})


MPI = comm_world("OMPI_COMM_WORLD", rank=1, size=4)


@pytest.mark.parametrize(
    ("torch", "other"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, MPI),
        ({"RANK": "0", "WORLD_SIZE": "4"}, MPI),
        ({"RANK": "1", "WORLD_SIZE": "2"}, MPI),
        ({"RANK": "0", "WORLD_SIZE": "16"}, SLURM_STEP),
    ],
)
def test_variables_left_over_in_a_shell_are_refused(torch, other):
    with pytest.raises(
        LaunchError, match=r"^RANK \(\d\) of WORLD_SIZE \(\d+\) contradicts .*: unset RANK and WORLD_SIZE"
    ):
        read_environment(torch | other)


@pytest.mark.parametrize(
    "more",
    [
        {"RANK": "1", "WORLD_SIZE": "4"},  # exported from the launcher's own variables
        {"RANK": "9", "WORLD_SIZE": "32"},  # each task starts eight ranks
        {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},  # torchrun beside others
        {"RANK": "0", "WORLD_SIZE": "2", "CROSS_SIZE": "1"},  # deepspeed
    ],
)
def test_ranks_of_a_launcher_inside_of_another_launcher_count(more):
    assert read_environment({"MASTER_ADDR": "head"} | MPI | more).rank == int(more["RANK"])


def test_mpi_variables_override_those_of_the_slurm_job():
    inside = SLURM_STEP | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    environ = inside | {"PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"}
    assert read_environment(environ) == RankInfo(9, 16, 1, "pmi", 8)
    assert environ["MASTER_ADDR"] == "gpu03"


def test_mpi_over_several_hosts_requires_master_address():
    environ = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set and cannot be derived for a world of 4: export it"):
        read_environment(environ)


def test_pmi2_under_srun_takes_the_local_rank_from_slurm():
    environ = SLURM_STEP | {"PMI_RANK": "11", "PMI_SIZE": "16"}
    assert read_environment(environ) == RankInfo(11, 16, 3, "pmi")


def test_plain_python_is_a_world_of_one():
    environ = {}
    assert read_environment(environ) == RankInfo(0, 1, 0, "single")
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("0", "1", "0")


@pytest.mark.parametrize(
    ("extra", "source"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK 0, WORLD_SIZE 1"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "by its pmi variables"),
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
        (TWO | {"LOCAL_RANK": "-1"}, r"^LOCAL_RANK \(-1\) must be in 0 on, the rank among the processes of this host"),
        (
            TWO | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            r"^LOCAL_RANK \(2\) must be in 0 \.\. LOCAL_WORLD_SIZE - 1",
        ),
        (
            comm_world("OMPI_COMM_WORLD", local_rank=3),
            r"^OMPI_COMM_WORLD_LOCAL_RANK \(3\) must be in 0 \.\. OMPI_COMM_",
        ),
        (TWO | {"MASTER_PORT": "abc"}, r"^MASTER_PORT \('abc'\) must be an integer"),
        *(
            (TWO | {"MASTER_PORT": port}, rf"^MASTER_PORT \({port}\) must be a port from 1 to 65535, the same for all")
            for port in ("0", "-1", "65536")
        ),
        *(
            (TWO | {"MASTER_ADDR": address}, r"^MASTER_ADDR \('.*'\) must be the name or IP address of the host of ra")
            for address in ("h:29500", "tcp://h", " h", "h,h2", "(null)", "n[1-2]", "[::1]:29500", "h\t")
        ),
    ],
)
def test_invalid_environment_error_names_the_variable(environ, message):
    with pytest.raises(LaunchError, match=message):
        read_environment(environ)


@pytest.mark.parametrize("address", ["h", "node-1.cluster_a", "10.0.0.1", "::1", "[fe80::1%eth0]", "fd00:1::2"])
def test_names_and_addresses_of_hosts_are_taken(address):
    environ = TWO | {"MASTER_ADDR": address}
    read_environment(environ)
    assert environ["MASTER_ADDR"] == address


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_world_of_one_meets_nobody(name):
    assert read_environment({name: "(null)"}).world_size == 1
