"""Fine-tuning and evaluation as typed: from a run, under deepspeed, torchrun and plain python; bad input."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny import overrides

from eve_ds.cli.finetune import main

SHORT = ["train.train_batch_size=8", "optimizer.decay_by=steps", "train.metrics_every=1", "task.val.num_examples=12"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, launch):
    """A run of two steps of the tiny model."""
    folder = tmp_path_factory.mktemp("run") / "pretrained"
    options = ["--config", "eve_tiny", "--max_steps", "2", "--output_dir", str(folder)]
    settings = ["train.train_batch_size=8", *overrides()]
    launched = launch([sys.executable, "launcher/pretrain.py", *options, "--set", *settings])
    assert launched.returncode == 0, launched.output
    return folder


def finetune(task, init, out, *settings):
    options = ["--task", task, "--init", str(init), "--output_dir", str(out), "--max_steps", "2"]
    return ["launcher/finetune.py", *options, "--set", *SHORT, *settings]


def without_deepspeed(*arguments):
    """Run a script in a Python that cannot import DeepSpeed."""
    code = (
        "import runpy, sys; sys.modules['deepspeed'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_from_a_run_to_answers_in_a_table(pretrained, launch, free_ports, tmp_path):
    out = tmp_path / "vqa"
    (port,) = free_ports(1)
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(port)]
    launched = launch(
        [*command, *finetune("vqa", pretrained, out), "--deepspeed_config", "ds_configs/zero1_ep2_cpu.json"]
    )
    assert launched.returncode == 0, launched.output
    assert "starting from the backbone of" in launched.output

    model, again = out / "model", tmp_path / "again"
    launched = launch(
        without_deepspeed("launcher/evaluate.py", "task", "--model", model, "--out", again, "--batch_size", 5)
    )
    assert launched.returncode == 0, launched.output
    assert "accuracy" in launched.output
    by_rank = (out / "evaluation" / "step-00000002" / "predictions.jsonl").read_text()
    assert (again / "predictions.jsonl").read_text() == by_rank

    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), (225, 45, 45)).save(image)
    question = "what color is the object at the top left?"
    launched = launch(without_deepspeed("launcher/evaluate.py", "ask", "--model", model, "--image", image, question))
    assert launched.returncode == 0, launched.output
    assert launched.output.count(question) == 3


def test_retrieval_under_torchrun_ranks_captions(pretrained, launch, tmp_path):
    settings = ["task.itm_weight=1", "task.rerank=3"]
    command = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    launched = launch([*command, *finetune("retrieval", pretrained, tmp_path / "out", *settings)])
    assert launched.returncode == 0, launched.output
    result = json.loads((tmp_path / "out" / "evaluation" / "step-00000002" / "metrics.json").read_text())
    assert result["num_examples"] == 24
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), (225, 45, 45)).save(image)
    model = tmp_path / "out" / "model"
    options = ["--model", str(model), "--image", str(image), "a red circle", "a blue square"]
    launched = launch([sys.executable, "launcher/evaluate.py", "rank", *options])
    assert launched.returncode == 0, launched.output
    assert "similarity" in launched.output


def test_zero_shot_retrieval_is_the_same_on_one_and_two_processes(pretrained, launch, tmp_path):
    options = ["launcher/evaluate.py", "zero_shot", "--model", str(pretrained), "--limit", "8", "--rerank", "2"]
    launched = launch(without_deepspeed(*options, "--out", tmp_path / "one"))
    assert launched.returncode == 0, launched.output
    assert "reranked.image_retrieval.R@1" in launched.output
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", *options, "--batch_size", "3"]
    launched = launch([*command, "--out", str(tmp_path / "two")])
    assert launched.returncode == 0, launched.output
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert one["num_examples"] == 16
    launched = launch([sys.executable, *options[:4], "--rerank", "-1", "--out", str(tmp_path / "three")])
    assert (launched.returncode, launched.output.splitlines()[-1]) == (2, "evaluate: --rerank (-1) must be 0 or more")


def test_stopped_and_killed_fine_tuning_resumes(pretrained, launch, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    command = [sys.executable, *finetune("vqa", pretrained, out), "train.save_every_steps=2"]
    command[command.index("--max_steps") + 1] = "100000"
    for number, code in ((signal.SIGTERM, 4), (signal.SIGKILL, -signal.SIGKILL)):
        before = committed(out)
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        deadline = time.monotonic() + 90
        while committed(out) <= before:  # there is one that is newer
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == code, log.read_text()
    assert "Stopped by signal; rerun the same command to resume." in log.read_text()
    last = committed(out)
    command[command.index("--max_steps") + 1] = str(last + 3)
    launched = launch(command)
    assert launched.returncode == 0, launched.output
    assert f"resumed from {out}/checkpoints/step-{last:08d}" in launched.output
    assert (out / "evaluation" / f"step-{last + 3:08d}" / "metrics.json").is_file()
    launched = launch(command)
    assert launched.returncode == 2
    assert "holds a fine-tuned model: name another folder, or remove it" in launched.output


def committed(run):
    """Step of the checkpoint that `latest` names, 0 without any.

    A kill between the renaming of a folder and the replacement of `latest` leaves a folder that the run does not resume
    from.
    """
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.is_file() else 0


def test_published_nlvr_from_files_to_its_csv(launch, tmp_path):
    (tmp_path / "dev" / "images" / "0").mkdir(parents=True)
    lines = []
    for number, label in (("12-0", "true"), ("12-1", "false")):
        lines.append(json.dumps({"sentence": "a red box", "label": label, "identifier": number, "directory": "0"}))
        for k in range(6):
            Image.new("RGBA", (40, 10), (225, 45, 45, 255)).save(tmp_path / "dev/images/0" / f"dev-{number}-{k}.png")
    (tmp_path / "dev" / "dev.json").write_text("\n".join(lines))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: tasks/scenes_nlvr\ntask: {num_images: 1}\n")
    command = [sys.executable, *finetune("nlvr", "none", tmp_path / "out")]
    launched = launch([*command, "--config", str(recipe), "--data", str(tmp_path)])
    assert launched.returncode == 0, launched.output
    csv = tmp_path / "predictions.csv"
    options = ["--model", tmp_path / "out" / "model", "--out", tmp_path / "again", "--csv", csv]
    launched = launch([sys.executable, "launcher/evaluate.py", "task", *map(str, options)])
    assert launched.returncode == 0, launched.output
    rows = [line.split(",") for line in csv.read_text().splitlines()]
    assert [row[0] for row in rows] == [f"dev-12-{i}-{k}.png" for i in (0, 1) for k in range(6)]
    assert {row[1] for row in rows} <= {"true", "false"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--init", "none", "--data", "gone.json"],
            "--data gone.json does not exist: name annotation files, scenes or scenes:hard",
        ),
        (["--init", "gone"], "--init gone does not exist: name an export, a run, a checkpoint, a file, or none"),
        (["--init", "none", "--data", "scenes:easier"], "level"),
        (["--init", "none", "--set", "task.epoch=1"], "unknown key 'task.epoch'; did you mean 'epochs'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, text):
    assert main(["--task", "vqa", "--output_dir", str(tmp_path / "out"), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line]
    assert len(errors) == 1
    assert text in errors[0]
    assert not Path(tmp_path / "out").exists()
