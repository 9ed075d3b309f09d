"""Benchmark of pre-training quality: jobs, their execution, and tables. These tests run no training."""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from eve_ds.benchmark.quality import (
    MARKS,
    PRICES,
    TASKS,
    Budget,
    Job,
    figures,
    jobs_of,
    put_into,
    run_jobs,
    table,
    write_results,
)
from eve_ds.config import ConfigError, MaskingConfig, load_config

ROOT = Path(__file__).resolve().parents[2]

RECALL = {"text_retrieval": {"R@1": 0.5}, "image_retrieval": {"R@1": 0.25}}


def test_every_task_starts_from_every_objective_and_from_random_weights(tmp_path):
    jobs = {job.name: job for job in jobs_of(3, tmp_path, Budget(100, 10, 20, 30), ("mim+mlm", "itc+itm"))}
    starts = ("mim+mlm", "itc+itm", "none", "scratch")
    tuned = {f"{task}-{start}" for task in TASKS for start in starts}
    tuned -= {"nlvr_words-scratch", "retrieval_words-scratch"}
    assert set(jobs) == {"mim+mlm", "itc+itm", *tuned, "zero_shot-mim+mlm", "zero_shot-itc+itm"}
    assert jobs["nlvr-itc+itm"].needs == "itc+itm"
    assert jobs["vqa-scratch"].needs is None
    assert "train.max_seconds=110" in jobs["vqa-scratch"].command, "budget of pre-training and fine-tuning"
    assert "train.max_seconds=30" in jobs["retrieval-none"].command
    assert "task.train.question_types=[color,shape]" in jobs["vqa-none"].command
    assert {"train.max_seconds=30", "tasks/scenes_retrieval_words"} <= set(jobs["retrieval_words-none"].command)
    assert {"train.max_seconds=20", "nlvr", "tasks/scenes_nlvr_words"} <= set(jobs["nlvr_words-mim+mlm"].command)
    assert jobs["zero_shot-mim+mlm"].needs == "mim+mlm"
    assert all(("train.seed=3" in job.command) == ("zero_shot" not in name) for name, job in jobs.items())
    # A decay by steps would never reach low learning rates with a slow objective.
    assert all("optimizer.decay_by=seconds" in jobs[name].command for name in ("mim+mlm", "itc+itm"))
    order = list(jobs)
    assert max(order.index("mim+mlm"), order.index("itc+itm")) < min(order.index(name) for name in order if "-" in name)


def test_variants_of_objectives_have_their_own_settings(tmp_path):
    jobs = {job.name: job for job in jobs_of(0, tmp_path, Budget(), ["mim+mlm.as_written", "joint"], ["vqa"])}
    written = jobs["mim+mlm.as_written"].command
    assert {"model.objectives=[mim,mlm]", "masking.language_view_patch_share=1", "loss.mlm_weight=1"} <= set(written)
    settings = written[written.index("--set") + 1 :]
    masking, paper = load_config("eve_tiny", settings).masking, MaskingConfig()
    assert masking.model_copy(update={"text_to_image_mask_ratio": 1.0}) == paper
    assert "model.objectives=[joint]" in jobs["joint"].command
    assert jobs["vqa-mim+mlm.as_written"].needs == "mim+mlm.as_written"


def test_each_price_run_changes_one_mask_setting(tmp_path):
    ours, paper = load_config("eve_tiny").masking, MaskingConfig()
    for start in PRICES:
        (command, zero_shot) = (job.command for job in jobs_of(0, tmp_path, Budget(), [start], []))
        assert str(tmp_path / start) in zero_shot
        masking = load_config("eve_tiny", command[command.index("--set") + 1 :]).masking
        setting = start.partition(".")[2].partition("=")[0]
        changed = {name for name, value in masking if value != getattr(ours, name)}
        assert changed == {setting}
        cheaper = getattr(ours, setting) < getattr(paper, setting)
        assert (getattr(masking, setting) == getattr(paper, setting)) == cheaper


def test_word_accuracies_of_pre_training_include_those_with_another_image(tmp_path):
    answers = {"right": 0.75, "wrong": 0.25}
    kinds = dict.fromkeys(("color", "shape", "size", "position"), answers)
    last = {"samples": 640, "hidden_words": answers, "masked_image": kinds | {"color": {"right": 0.5, "wrong": 0.1}}}
    last |= kinds | {"kind": "eval", "pixel_loss": {"right": 0.3, "wrong": 0.4}, "binding": {}}
    for seed in range(2):
        for start in ("mim+mlm", "mim+mlm.image_view_share=1"):
            folder = tmp_path / str(seed) / start
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints" / "latest").write_text("step-00000010")
            last["shape"] = {"right": 0.5 + seed / 4, "wrong": 0.25 + seed / 4}
            earlier = last | {"samples": 320, "size": dict.fromkeys(answers, 0.0)}
            saved = {"kind": "save", "samples": 640}
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in (earlier, last, saved)))
    found = [figures(tmp_path / str(seed)) for seed in range(2)]
    assert found[0]["words of color, a quarter of the patches, wrong image"] == dict.fromkeys(
        ("mim+mlm", "mim+mlm.image_view_share=1"), 0.1
    )
    main, prices = table(found).split("\n\n")
    assert main.splitlines()[0] == "| | mim+mlm |"
    assert prices.splitlines()[0] == "| | mim+mlm | image_view_share=1 |"
    for text in (main, prices):
        assert "| words of color | 0.750 (0.750 to 0.750) / 0.250 |" in text
        assert "| words of shape | 0.625 (0.500 to 0.750) / 0.375 |" in text
        assert "| masked object pixels: error lower with the right caption by | 0.250 (0.250 to 0.250) |" in text
        assert "another" not in text
        assert "| words of size | 0.750 (0.750 to 0.750) / 0.250 |" in text
        assert "| pairs seen in pre-training | 640 |" in text


def test_curve_adds_shorter_pre_training_with_vqa_and_zero_shot_retrieval(tmp_path):
    whole = {job.name for job in jobs_of(0, tmp_path, Budget(), ["mim+mlm"], ["vqa", "retrieval"])}
    jobs = {job.name: job for job in jobs_of(0, tmp_path, Budget(), ["mim+mlm"], ["vqa", "retrieval"], [50.0])}
    assert jobs.keys() - whole == {"mim+mlm@50", "vqa-mim+mlm@50", "zero_shot-mim+mlm@50"}
    assert {"train.max_seconds=50", "model.objectives=[mim,mlm]"} <= set(jobs["mim+mlm@50"].command)
    assert jobs["vqa-mim+mlm@50"].needs == jobs["zero_shot-mim+mlm@50"].needs == "mim+mlm@50"


def test_nlvr_is_evaluated_with_and_without_images(tmp_path):
    whole = {job.name for job in jobs_of(0, tmp_path, Budget(), ["mim+mlm", "itc+itm"], ["vqa"])}
    jobs = {
        job.name: job for job in jobs_of(0, tmp_path, Budget(), ["mim+mlm", "itc+itm"], ["vqa"], nlvr=tmp_path / "n")
    }
    added = {name: jobs[name] for name in jobs.keys() - whole}
    needs = {"itc+itm": "itc+itm", "mim+mlm": "mim+mlm", "none": None, "blind": "mim+mlm"}
    assert {name.removeprefix("nlvr_real-"): job.needs for name, job in added.items()} == needs
    assert [name for name, job in added.items() if "task.blind=True" in job.command] == ["nlvr_real-blind"]
    for job in added.values():
        assert {str(tmp_path / "n"), "task.train.split=hidden", "task.val.split=dev", "train.max_seconds=90"} <= set(
            job.command
        )
    write(tmp_path, "nlvr_real-blind", {"accuracy": 0.5, "consistency": 0.0})
    assert table([figures(tmp_path)]).splitlines()[::2] == [
        "| | text alone |",
        "| NLVR, unseen sentences (majority 0.553) | 0.500 |",
    ]


def writes(tmp_path, name, text, needs=None):
    """Return a job that appends text to the result of the job that it needs."""
    before = f"open(r'{tmp_path / (needs or '')}/result').read()" if needs else "''"
    made = f"import pathlib; p = pathlib.Path(r'{tmp_path / name}'); p.mkdir()"
    code = f"{made}; (p / 'result').write_text({before} + '{text}')"
    return Job(name, [sys.executable, "-c", code], "result", needs)


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_jobs_wait_for_needed_jobs_and_run_once(tmp_path, at_a_time):
    jobs = [writes(tmp_path, "a", "A"), writes(tmp_path, "b", "B"), writes(tmp_path, "c", "C", "a")]
    jobs.append(writes(tmp_path, "d", "D", "b"))
    said = []
    run_jobs(jobs, tmp_path, at_a_time, said.append)
    assert [(tmp_path / name / "result").read_text() for name in "abcd"] == ["A", "B", "AC", "BD"]
    assert len(said) == 4
    run_jobs(jobs, tmp_path, at_a_time, said.append)
    assert len(said) == 4


def test_output_of_a_killed_job_is_removed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "half").write_text("")
    run_jobs([writes(tmp_path, "a", "A")], tmp_path, 1, lambda _: None)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["result"]


def test_error_of_a_failed_job_names_its_log(tmp_path):
    bad = Job("bad", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], "result")
    good = writes(tmp_path, "good", "G")
    with pytest.raises(RuntimeError, match=r"bad ended with code 3: see .*bad\.log"):
        run_jobs([bad, good, writes(tmp_path, "after", "X", "bad")], tmp_path, 1, lambda _: None)
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert (tmp_path / "good" / "result").is_file()
    assert not (tmp_path / "after").exists()


def write(folder, name, metrics):
    out = folder / name / "evaluation" / "step-00000007"
    out.mkdir(parents=True)
    (out / "metrics.json").write_text(json.dumps(metrics))


def test_table_has_a_row_per_measure_and_a_column_per_start(tmp_path):
    for seed in range(2):
        folder = tmp_path / str(seed)
        recall = RECALL | {"text_retrieval": {"R@1": 0.5 + seed / 10}}
        write(folder, "retrieval-mim+mlm", {"dot": recall})
        write(folder, "nlvr-none", {"accuracy": 0.5, "consistency": 0.2})
        write(folder, "vqa-scratch", {"accuracy": 0.6, "by_type": {"color": 0.7, "shape": 0.5}})
        (folder / "mim+mlm" / "checkpoints").mkdir(parents=True)
        (folder / "mim+mlm" / "checkpoints" / "latest").write_text("step-00000001")
        (folder / "itc+itm").mkdir()
        (folder / "itc+itm" / "metrics.jsonl").write_text("")  # a run that has written nothing yet
        (folder / "mim+mlm" / "metrics.jsonl").write_text(f'{{"samples": 64}}\n{{"samples": {6400 + 64 * seed}}}\n')
    found = [figures(tmp_path / str(seed)) for seed in range(2)]
    assert found[0]["statements"] == {"none": 0.5}
    assert table(found).splitlines() == [
        "| | random weights | mim+mlm | random weights, full time |",
        "|---|---:|---:|---:|",
        "| pairs seen in pre-training |  | 6,400 to 6,464 |  |",
        "| statements | 0.500 (0.500 to 0.500) |  |  |",
        "| retrieval of texts, R@1 |  | 0.550 (0.500 to 0.600) |  |",
        "| retrieval of images, R@1 |  | 0.250 (0.250 to 0.250) |  |",
        "| questions (unbound 0.594) |  |  | 0.600 (0.600 to 0.600) |",
        "| questions on color (unbound 0.5625) |  |  | 0.700 (0.700 to 0.700) |",
        "| questions on shape (unbound 0.625) |  |  | 0.500 (0.500 to 0.500) |",
    ]
    assert "| statements | 0.500 |" in table(found[:1])


def test_zero_shot_and_shorter_pre_training_have_their_own_rows(tmp_path):
    write(tmp_path, "zero_shot-mim+mlm", {"dot": RECALL, "reranked": RECALL | {"image_retrieval": {"R@1": 1.0}}})
    write(tmp_path, "retrieval_words-mim+mlm", {"dot": RECALL})
    write(tmp_path, "nlvr_words-mim+mlm", {"accuracy": 0.75, "consistency": 0.5})
    write(tmp_path, "zero_shot-mim+mlm@100", {"dot": RECALL | {"text_retrieval": {"R@1": 0.375}}})
    write(tmp_path, "zero_shot-mim+mlm@50", {"dot": RECALL | {"text_retrieval": {"R@1": 0.125}}})
    text = table([figures(tmp_path)])
    assert "| retrieval by words of texts, R@1 | 0.500 |" in text
    assert "| statements by words | 0.750 |" in text
    assert "| zero-shot retrieval of images, R@1, best 8 rescored | 1.000 |" in text
    assert text.splitlines()[-4:] == [
        "| pre-training for | zero-shot retrieval of texts, R@1 | zero-shot retrieval of images, R@1 |",
        "|---|---:|---:|",
        "| mim+mlm, 50 s | 0.125 | 0.250 |",
        "| mim+mlm, 100 s | 0.375 | 0.250 |",
    ]


def read_results(file):
    """Read a CSV file of results; returns the results of each seed, for `table`."""
    seeds = defaultdict(dict)
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            value = row["value"]
            number = int(value) if value.isdecimal() else float(value)
            seeds[int(row["seed"])].setdefault(row["measure"], {})[row["start"]] = number
    return [seeds[number] for number in sorted(seeds)]


def test_results_file_has_a_row_for_every_value(tmp_path):
    seeds = [
        {"statements": {"mim+mlm": 0.5, "none": 0.25}, "pairs seen in pre-training": {"mim+mlm@50": 640}},
        {"statements": {"mim+mlm": 1.0}},
    ]
    write_results(seeds, tmp_path / "new" / "quality.csv", {"device": "a CPU, two cores", "date": "2026-01-01"})
    assert read_results(tmp_path / "new" / "quality.csv") == seeds
    assert (tmp_path / "new" / "quality.csv").read_text().splitlines()[
        1
    ] == '0,mim+mlm,statements,0.5,"a CPU, two cores",2026-01-01'


def test_unchanged_results_keep_their_provenance(tmp_path):
    file = tmp_path / "quality.csv"
    write_results([{"statements": {"mim+mlm": 0.5, "none": 0.25}}], file, {"commit": "a", "date": "2026-01-01"})
    write_results([{"statements": {"mim+mlm": 0.5, "none": 0.75}}, {}], file, {"commit": "b", "date": "2026-02-02"})
    assert file.read_text().splitlines() == [
        "seed,start,measure,value,commit,date",
        "0,mim+mlm,statements,0.5,a,2026-01-01",
        "0,none,statements,0.75,b,2026-02-02",
    ]


def test_table_replaces_the_text_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    put_into(page, "| new |")
    put_into(page, "| new |")
    assert page.read_text() == f"before\n{MARKS[0]}\n| new |\n{MARKS[1]}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match=r"--page .* lacks the marks .*: put them where"):
        put_into(page, "| new |")


def test_tables_of_the_results_page_match_the_stored_results():
    text = table(read_results(ROOT / "kernels" / "bench" / "quality.csv"))
    assert f"{MARKS[0]}\n{text}\n{MARKS[1]}" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
