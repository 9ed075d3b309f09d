"""The benchmark of what pre-training is worth: its plan, running it, and the table. Training itself is not run here."""

import json
import sys

import pytest

from eve_ds.benchmark.quality import Budget, Job, figures, jobs_of, run_jobs, table


def test_every_task_starts_from_every_objective_and_from_nothing(tmp_path):
    jobs = {job.name: job for job in jobs_of(3, tmp_path, Budget(100, 10, 20, 30), ("msm", "itc_itm"))}
    starts = ("msm", "itc_itm", "none", "scratch")
    assert set(jobs) == {"msm", "itc_itm", *(f"{task}-{s}" for task in ("vqa", "nlvr", "retrieval") for s in starts)}
    assert jobs["nlvr-itc_itm"].needs == "itc_itm"
    assert jobs["vqa-scratch"].needs is None
    assert "train.max_seconds=110" in jobs["vqa-scratch"].command, "all the seconds"
    assert "train.max_seconds=30" in jobs["retrieval-none"].command
    assert "task.train.question_types=[color,shape]" in jobs["vqa-none"].command
    assert all("train.seed=3" in job.command for job in jobs.values())
    order = list(jobs)
    assert max(order.index("msm"), order.index("itc_itm")) < min(order.index(name) for name in order if "-" in name)


def writes(tmp_path, name, text, needs=None):
    """A job that copies what its predecessor wrote, and adds to it."""
    before = f"open(r'{tmp_path / (needs or '')}/result').read()" if needs else "''"
    made = f"import pathlib; p = pathlib.Path(r'{tmp_path / name}'); p.mkdir()"
    code = f"{made}; (p / 'result').write_text({before} + '{text}')"
    return Job(name, [sys.executable, "-c", code], "result", needs)


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_jobs_wait_for_what_they_need_and_run_once(tmp_path, at_a_time):
    jobs = [writes(tmp_path, "a", "A"), writes(tmp_path, "b", "B"), writes(tmp_path, "c", "C", "a")]
    jobs.append(writes(tmp_path, "d", "D", "b"))
    said = []
    run_jobs(jobs, tmp_path, at_a_time, said.append)
    assert [(tmp_path / name / "result").read_text() for name in "abcd"] == ["A", "B", "AC", "BD"]
    assert len(said) == 4
    run_jobs(jobs, tmp_path, at_a_time, said.append)
    assert len(said) == 4


def test_a_job_that_fails_names_its_log(tmp_path):
    bad = Job("bad", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], "result")
    good = writes(tmp_path, "good", "G")
    with pytest.raises(RuntimeError, match=r"bad ended with code 3: see .*bad\.log"):
        run_jobs([bad, good, writes(tmp_path, "after", "X", "bad")], tmp_path, 1, lambda _: None)
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert (tmp_path / "good" / "result").is_file()
    assert not (tmp_path / "after").exists()


def write(folder, name, metrics):
    (folder / name / "evaluation").mkdir(parents=True)
    (folder / name / "evaluation" / "metrics.json").write_text(json.dumps(metrics))


def test_the_table_has_a_row_a_measure_and_a_column_a_start(tmp_path):
    for seed in range(2):
        folder = tmp_path / str(seed)
        recall = {"text_retrieval": {"R@1": 0.5 + seed / 10}, "image_retrieval": {"R@1": 0.25}}
        write(folder, "retrieval-msm", {"dot": recall})
        write(folder, "nlvr-none", {"accuracy": 0.5, "consistency": 0.2})
        write(folder, "vqa-scratch", {"accuracy": 0.6, "by_type": {"color": 0.7, "shape": 0.5}})
    found = [figures(tmp_path / str(seed)) for seed in range(2)]
    assert found[0]["statements"] == {"none": 0.5}
    assert table(found).splitlines() == [
        "| | random weights | msm | random weights, all the seconds |",
        "|---|---:|---:|---:|",
        "| statements | 0.500 (0.500 to 0.500) |  |  |",
        "| retrieval of texts, R@1 |  | 0.550 (0.500 to 0.600) |  |",
        "| retrieval of images, R@1 |  | 0.250 (0.250 to 0.250) |  |",
        "| questions (unbound 0.594) |  |  | 0.600 (0.600 to 0.600) |",
        "| questions on color (unbound 0.5625) |  |  | 0.700 (0.700 to 0.700) |",
        "| questions on shape (unbound 0.625) |  |  | 0.500 (0.500 to 0.500) |",
    ]
    assert "| statements | 0.500 |" in table(found[:1])
