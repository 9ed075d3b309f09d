"""The command for a GPU machine: every part on the CPU, and a part that fails, hangs or has no time left."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest

from eve_ds.cli import gpu

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "launcher" / "gpu.py"


def run(*arguments):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.timeout(300)
def test_dry_run_measures_every_part(tmp_path):
    parts = ["facts", "build", "tests", "step", "routing", "layers", "engine", "images"]
    done = run("--out", tmp_path, "--dry_run", "--parts", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("cpu-*.json")
    document = json.loads(file.read_text())
    assert document["parts"] == dict.fromkeys(parts, "ok")
    named = {(row["part"], row["what"]) for row in document["rows"]}
    assert {
        *(("facts", "copy"), ("facts", "matrix product"), ("build", "build"), ("step", "step"), ("step", "kernel")),
        *(("routing", name) for name in ("route", "dispatch", "combine", "combine, backward")),
        *(("layers", name) for name in ("linear cross entropy, as it is", "attention, plain, masked")),
        *(("layers", "attention of the model, padding left out"), ("engine", "host of the engine, eve_tiny, whole")),
    } <= named
    assert any(row["part"] == "images" for row in document["rows"]), "a line, also where torchvision is absent"
    step = next(row for row in document["rows"] if row["what"] == "step")
    assert step["pairs_s"] == pytest.approx(step["batch"] / step["ms"] * 1e3, rel=1e-3)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + sum(row["what"] != "kernel" for row in document["rows"])


def test_gpu_parts_have_distinct_names_and_sanitize_our_kernels_only(tmp_path):
    parts = gpu.gpu_parts(tmp_path / "rows.jsonl", tmp_path)
    assert len({part.name for part in parts}) == len(parts)
    sanitizers = [part for part in parts if part.environment]
    assert [part.name for part in sanitizers] == ["memcheck", "racecheck", "synccheck"]
    assert all(part.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for part in sanitizers)
    assert all("kernel_substring=eve_ds" in part.command for part in sanitizers)
    assert [part.name for part in parts if part.expected] == ["planted error, found"]


def test_failed_or_hanging_part_is_reported_in_one_line(tmp_path):
    python = [sys.executable, "-c"]
    outcome = gpu.run_part(gpu.Part("fails", 30, [*python, "print('why'); raise SystemExit(3)"]), 30, tmp_path)
    assert outcome == f"exit code 3 instead of 0, see {tmp_path / 'fails.log'}"
    assert (tmp_path / "fails.log").read_text() == "why\n"
    hangs = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); import time; time.sleep(60)"
    outcome = gpu.run_part(gpu.Part("hangs", 2, [*python, hangs]), 2, tmp_path)
    assert outcome == f"stopped after 2 s, see {tmp_path / 'hangs.log'}"
    child = int((tmp_path / "hangs.log").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert gpu.run_part(gpu.Part("finds", 30, [*python, "raise SystemExit(9)"], expected=9), 30, tmp_path) == "ok"
    assert gpu.run_part(gpu.Part("lacks", 30, ["no-such-tool"]), 30, tmp_path) == (
        "no-such-tool cannot be run (No such file or directory)"
    )


def test_parts_import_the_wheels_and_the_package_of_the_checkout(tmp_path, monkeypatch):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    site.mkdir()
    with zipfile.ZipFile(wheels / "probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe.py", "")
        wheel.writestr("probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
        wheel.writestr("probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("probe-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert gpu._prepare(site, wheels) is None
    code = "import probe, eve_ds, importlib.util as i; print(probe.__file__, eve_ds.__file__, i.find_spec('kernels'))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [str(site / "probe.py"), str(site / "eve_ds" / "__init__.py"), "None"]
    assert (site / "eve_ds").resolve() == ROOT / "eve_ds"


def test_no_part_starts_after_the_time(tmp_path):
    done = run("--out", tmp_path, "--dry_run", "--seconds", "0", "--parts", "facts", "tests")
    assert done.returncode == 1
    (file,) = tmp_path.glob("unknown-*.json")
    assert json.loads(file.read_text())["parts"] == dict.fromkeys(["facts", "tests"], "not run: no time left")


def test_half_a_row_of_a_stopped_part_is_left_out(tmp_path):
    rows = tmp_path / "rows.jsonl"
    whole = json.dumps({"part": "facts", "what": "device", "name": "cpu"}) + "\n"
    rows.write_text(whole + '{"part": "st')
    (tmp_path / "tiny").mkdir()
    metrics = json.dumps({"kind": "train", "step": 3}) + "\n"
    (tmp_path / "tiny" / "metrics.jsonl").write_text(metrics + '{"ki')
    gpu.write_document(rows, {"step": "stopped"}, tmp_path)
    (file,) = tmp_path.glob("cpu-*.json")
    assert [row["what"] for row in json.loads(file.read_text())["rows"]] == ["device", "engine"]
    assert rows.read_text() == whole, "the next part begins a line of its own"


def test_bad_input_is_one_line(tmp_path):
    done = run("--out", tmp_path, "--wheels", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"gpu: --wheels ({tmp_path}) holds no wheel: collect them with `make gpu-wheels`\n",
    )
    done = run("--out", tmp_path, "--dry_run", "--parts", "speed")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: --parts (speed) must be among facts, build, tests, step, ")
    done = subprocess.run(  # -I -S: neither the environment's packages nor the current folder
        [sys.executable, "-I", "-S", str(PROGRAM)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: packages (deepspeed, pydantic, ")
    assert done.stderr.endswith(
        ", pytest) are missing: pip install -e '.[dev]' here, or collect `make gpu-wheels` elsewhere and name "
        "--wheels\n"
    )
