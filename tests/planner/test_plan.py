"""Plans: parameter counts, the order of the shapes, the command, its errors, and the tables of ds_configs/README.md."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from eve_ds.cli.report import main
from eve_ds.config import load_config
from eve_ds.model.eve import model_shapes
from eve_ds.parallel.engine import DEFAULT_BUCKET
from eve_ds.parallel.nodes import ranks_per_node
from eve_ds.parallel.settings import resolve_deepspeed_config
from eve_ds.planner.files import FILES, FOLDER, file_of, with_buffers
from eve_ds.planner.forward import forward_of
from eve_ds.planner.memory import most_touched
from eve_ds.planner.parameters import Cutting, count_parameters, model_on_meta
from eve_ds.planner.plan import GIB, Machine, Planner, divisors
from eve_ds.planner.shape import Shape
from eve_ds.reading import read_json
from eve_ds.topology import Topology

README = (FOLDER / "README.md").read_text(encoding="utf-8")
MODELS = ("eve_base", "eve_large", "eve_giant")


@pytest.fixture(scope="module")
def planners():
    """Preset -> planner."""
    return {name: Planner(load_config(name)) for name in MODELS}


# ------------------------------------------------------------------------------------------------------- parameters


def test_giant_has_14_6_billion_parameters_and_was_never_trained():
    config = load_config("eve_giant")
    total = sum(shape.numel() for shape in model_shapes(config.model).values())
    assert round(total / 1e9, 1) == 14.6
    assert count_parameters(model_on_meta(config.model)).all == total
    first = (FOLDER.parent / "eve_ds" / "configs" / "eve_giant.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert "14.6 billion parameters, never trained" in first


def test_shards_of_the_ranks_make_the_whole_model_and_its_padding():
    model = model_on_meta(load_config("eve_base", ["model.vocab_size=63999"]).model)
    whole, cut = count_parameters(model), count_parameters(model, 8, Cutting(2, split_experts=True))
    experts = {name: parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name}
    biases = sum(size for name, size in experts.items() if name.endswith("fc2_bias"))
    assert 16 * cut.experts == whole.experts + biases  # the bias behind the sum is on both ranks
    is_cut = re.compile(
        r"(qkv\.weight|[qv]_bias|attention\.proj\.weight|fc1\.\w+|fc2\.weight|word\.weight|text_head\.bias)$"
    )
    kept = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name not in experts and not is_cut.search(name)
    )
    assert 2 * cut.dense == whole.dense + kept + 768 + 1  # a row and a bias of padding
    assert count_parameters(model, 8, Cutting(2)).experts == whole.experts // 8


@pytest.mark.parametrize(("sizes", "ranks", "expected"), [((4, 4), 2, 4), ((6, 2), 2, 8), ((8,), 4, 8), ((), 2, 0)])
def test_parts_touch_whole_tensors(sizes, ranks, expected):
    assert most_touched(sizes, ranks) == expected


def test_buffers_are_those_of_deepspeed_and_of_the_files():
    assert Shape(1).reduce_bucket == DEFAULT_BUCKET == DeepSpeedZeroConfig().reduce_bucket_size
    assert Shape(1).max_live_parameters == DeepSpeedZeroConfig().max_live_parameters


@pytest.mark.parametrize("gpus", [8, 12, 24, 48])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_group_spans_nodes_if_it_has_ranks_of_several(gpus, tp_size):
    for gpus_per_node in (size for size in divisors(gpus) if size % tp_size == 0):
        nodes = [rank // gpus_per_node for rank in range(gpus)]
        for ep_size in divisors(gpus // tp_size):
            groups = Topology(0, gpus, ep_size, tp_size).expert_groups
            shape = Shape(gpus, gpus_per_node, ep_size, tp_size)
            expected = any(len(ranks_per_node(group, nodes)) > 1 for group in groups)
            assert shape.spans_nodes(ep_size, tp_size) == expected, shape
            replicas = gpus // (ep_size * tp_size)
            first = range(0, gpus, ep_size * tp_size)
            assert shape.spans_nodes(replicas, ep_size * tp_size) == (len(ranks_per_node(first, nodes)) > 1), shape


# -------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ["eve_base", "eve_large"])
def test_bytes_of_a_micro_batch_grow_evenly(planners, name):
    between, measured = planners[name].forward(20, Cutting()), forward_of(load_config(name), 20)
    assert between[:-1] == pytest.approx(measured[:-1], rel=1e-3)
    assert between.passes == pytest.approx(measured.passes, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 64])
def test_base_and_large_need_zero_1_alone(planners, gpus):
    for name in ("eve_base", "eve_large"):
        best = planners[name].plan(Machine(gpus, min(gpus, 8), 80))[0].shape
        assert (best.zero_stage, best.tp_size, best.offload, best.checkpointing) == (1, 1, False, False)
        assert best.samples == 2048


def test_experts_stay_inside_a_node(planners):
    options = planners["eve_base"].plan(Machine(64, 8, 80))
    assert all(not option.shape.spans_nodes(option.shape.ep_size, option.shape.tp_size) for option in options)
    assert options[0].shape.ep_size == 8


def test_every_shape_fits_and_the_first_does_with_least(planners):
    machine = Machine(8, 8, 40)
    options = planners["eve_giant"].plan(machine)
    assert all(option.memory.gpu <= machine.usable for option in options)
    assert [option.order for option in options] == sorted(option.order for option in options)
    assert options[0].shape.zero_stage > 1 or options[0].shape.tp_size > 1


KEPT = [
    "train.compile=blocks",
    "train.activation_checkpointing=true",
    "train.gradient_accumulation_steps=2",
    "train.micro_batch_size=4",
    "parallel.overlap=4",
    "parallel.ep_size=2",
    "parallel.tp_size=2 parallel.split_experts=true",
    "parallel.tp_size=2 parallel.split_experts=false",
    "optimizer.clip_grad_norm=0",
]
"""Settings of a configuration that restrict the shapes of its runs."""


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
@pytest.mark.parametrize("settings", KEPT)
def test_training_takes_every_shape_and_keeps_named_settings(settings):
    named = ["train.precision=bf16", "train.train_batch_size=16", *settings.split()]
    planner = Planner(load_config("eve_tiny", named))
    machine = Machine(4, 4, 80)
    shapes = list(planner.shapes(machine))
    assert shapes
    for shape in shapes:
        config = load_config("eve_tiny", [*named, *shape.settings])
        settled, resolved = resolve_deepspeed_config(read_json(file_of(shape)), config, machine.gpus)
        parallel, train = settled.parallel, settled.train
        assert (parallel.ep_size, parallel.tp_size) == (shape.ep_size, shape.tp_size)
        assert parallel.split_experts is shape.split_experts
        assert (train.micro_batch_size, train.gradient_accumulation_steps, train.activation_checkpointing) == (
            *(shape.micro_batch, shape.accumulation_steps, shape.checkpointing),
        )
        assert (resolved["zero_optimization"]["stage"], train.precision) == (shape.zero_stage, shape.precision)
        for setting in named:
            section, _, field = setting.partition("=")[0].partition(".")
            assert getattr(getattr(settled, section), field) == getattr(getattr(planner.config, section), field)


def test_plans_need_no_megatron(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    options = Planner(load_config("eve_tiny", ["parallel.tp_size=2"])).plan(Machine(4, 4, 80))
    assert {option.shape.tp_size for option in options} == {2}


# ----------------------------------------------------------------------------------------------------------- command


def test_command_recommends_settings_that_training_takes(capsys):
    assert main(["plan", "--model", "eve_base", "--gpus", "64", "--set", "train.train_batch_size=4096"]) == 0
    out = capsys.readouterr().out
    model, file, settings = re.search(r"--config (\S+) --deepspeed_config (\S+) --set (.*)", out).groups()
    config = load_config(model, settings.split())
    assert config.train.train_batch_size == 4096
    read = json.loads((FOLDER.parent / file).read_text(encoding="utf-8"))
    settled, _ = resolve_deepspeed_config(read, config, world_size=64)
    assert (settled.parallel.ep_size, settled.train.micro_batch_size) == (8, 64)
    assert "recommended: the first, which fits without offload, tensor parallelism, recomputation" in out
    assert "zero2_bf16.json" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model eve_bas --gpus 8", "config 'eve_bas' is neither a file nor a preset; did you mean 'eve_base'"),
        ("--model eve_base --gpus 12", "--gpus (12) must be a multiple of --gpus_per_node (8): plan for whole nodes"),
        ("--model eve_base --gpus 80000", "--gpus (80000) must be at most 65536"),
        ("--model eve_base --gpus 7", "train.train_batch_size (2048) cannot be split into micro-batches on 7 GPUs: "),
        (
            "--model eve_base --gpus 8 --micro_batch 3",
            "cannot be split into micro-batches on 8 GPUs with train.micro_batch_size=3: take a multiple, another ",
        ),
        (
            "--model eve_base --gpus 8 --set parallel.tp_size=5",
            "no run starts on 8 GPUs with parallel.tp_size=5: parallel.ep_size * parallel.tp_size must divide the GPUs",
        ),
        ("--model tasks/nlvr2 --gpus 8", "has a section task (nlvr), and only pre-training can be planned, "),
        ("--model eve_giant --gpus 1 --gpu_memory 24", "eve_giant does not fit on 1 GPU of 24 GiB, of which 90% are"),
        ("--model eve_base --gpus 8 --set train.precision=fp16", "train.precision (fp16) has no file in ds_configs/: "),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["plan", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("report plan: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["--model", "eve_base"], ["--model", "eve_base", "--gpus", "0"]])
def test_bad_arguments_are_one_line(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *arguments])
    assert capsys.readouterr().err.count("\n") == 1


def test_plans_do_not_load_deepspeed():
    code = "import sys, eve_ds.planner.plan; sys.exit(bool({'deepspeed', 'megatron'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ ds_configs/README.md


def rows():
    """Cells of the rows of plans."""
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in MODELS:
            yield cells


def planned(planner, gpus, file, settings):
    """Option of a row; None if its file is not there."""
    config = planner.config.model_copy(update={"parallel": load_config("eve_base", settings).parallel})
    train = load_config("eve_base", settings).train
    stage, offload = next(key for key, name in FILES["bf16"].items() if f"{name}.json" == file)
    parallel = config.parallel
    shape = Shape(
        gpus,
        8,
        parallel.ep_size,
        parallel.tp_size,
        parallel.split_experts,
        stage,
        offload,
        train.micro_batch_size,
        2048 // train.micro_batch_size * parallel.tp_size // gpus,
        train.activation_checkpointing,
    )
    return planner.option(with_buffers(shape)) if file_of(shape).exists() else None


@pytest.mark.parametrize("cells", list(rows()), ids=lambda cells: " ".join(cells[:4]))
def test_rows_are_those_of_the_planner(planners, cells):
    model, gpus, file, settings, *numbers = cells
    option = planned(planners[model], int(gpus), file, settings.split()[1:])
    if option is None:
        pytest.skip(f"{file} is not there")
    memory = option.memory
    sizes = [
        *(memory.persistent, memory.gradients + memory.buckets + memory.gathered, memory.activations),
        *(memory.gpu, memory.host, option.sent_inside_node, option.sent_between_nodes),
    ]
    assert numbers == [f"{size / GIB:.1f}" for size in sizes]


def test_rows_without_recomputation_are_recommendations(planners):
    for model, gpus, file, settings, *_ in rows():
        if "checkpointing" not in settings:
            best = planners[model].plan(Machine(int(gpus), min(int(gpus), 8), 80))[0]
            assert (file, settings) == (Path(best.file).name, f"--set {' '.join(best.shape.settings)}")


def test_every_file_has_a_line():
    described = set(re.findall(r"^\| `(\w+\.json)` \| .{20,} \|$", README, re.MULTILINE))
    assert {file.name for file in FOLDER.glob("*.json")} <= described
    assert {f"{name}.json" for files in FILES.values() for name in files.values()} <= described
