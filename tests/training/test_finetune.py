"""Initial weights, recipes, learning rates, batches and saved models of fine-tuning."""

import io
import itertools
import json
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory as torch_pinned

from eve_ds.cli.command import BAD_INPUT, ending
from eve_ds.config import ConfigError, load_config, parse_config, presets
from eve_ds.data.errors import UnusableData
from eve_ds.data.image_decoding import Decoding
from eve_ds.data.image_file import open_image
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.data.transforms import resize
from eve_ds.evaluation.ask import ask, rank
from eve_ds.export import ExportError
from eve_ds.export.official import write_official
from eve_ds.export.start import DRAWN, draw_weights, write_start
from eve_ds.launch_environment import RankInfo
from eve_ds.model.embeddings import resize_positions
from eve_ds.tasks.batches import TaskCollator, training_batches
from eve_ds.tasks.examples import Example
from eve_ds.tasks.finetune_config import task_config
from eve_ds.tasks.load_examples import load_examples
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.saved import load_task_model, save_task_model, start_weights
from eve_ds.tasks.vqa import VQA
from eve_ds.topology import Topology
from eve_ds.training import finetune
from eve_ds.training.job import Loading
from eve_ds.training.optimizer import build_optimizer
from eve_ds.training.schedule import with_schedule
from eve_ds.training.task_weights import lr_scale, lr_scales, prepare_weights

POSITIONS = "backbone.image_embedding.position"


@pytest.fixture
def export(tmp_path, task_tree):
    """Exported folder of a pre-trained model, as convert.py writes it, with its configuration and weights."""
    tree = task_tree("vqa")
    config = parse_config({key: value for key, value in tree.items() if key != "task"})
    weights = draw_weights(config)
    folder = tmp_path / "export"
    write_start(
        folder, config, load_tokenizer("scenes"), weights, source="x", origins=dict.fromkeys(weights, DRAWN), notes=[]
    )
    return folder, config, weights


def save(task, folder, seed=0):
    model = task.model()
    torch.manual_seed(seed)
    prepare_weights(model, task.config, task)
    save_task_model(folder, task, task.config, load_tokenizer("scenes"), model.state_dict(), {"step": 1})
    return model.eval()


# --- start ------------------------------------------------------------------------------------------------------------


def test_backbone_of_an_export_is_read_with_resized_positions(export):
    folder, config, weights = export
    model = config.model.model_copy(update={"image_size": 96})
    read = start_weights(folder, model)
    assert torch.equal(read(POSITIONS), resize_positions(weights[POSITIONS], 6))
    assert torch.equal(
        read("backbone.blocks.1.moe.experts.2.fc1.weight"), weights["backbone.blocks.1.moe.experts.2.fc1.weight"]
    )


def test_released_weights_can_start_a_task(export, tmp_path):
    _, config, weights = export
    write_official(weights, tmp_path / "released.pth")
    read = start_weights(tmp_path / "released.pth", config.model)
    names = [name for name in weights if name.startswith("backbone.")]
    assert all(torch.equal(read(name), weights[name]) for name in names)


def test_a_fine_tuned_model_can_start_another_task(export, task_tree, tmp_path):
    task = VQA(parse_config(task_tree("vqa")), ["red", "blue"])
    model = save(task, tmp_path / "vqa")
    read = start_weights(tmp_path / "vqa", task.config.model)
    assert torch.equal(read("backbone.norm.weight"), model.state_dict()["backbone.norm.weight"])


def test_weights_that_do_not_fit_are_named_in_the_error(export, tmp_path):
    folder, config, _ = export
    width = config.model.intermediate_size
    wider = config.model.model_copy(update={"intermediate_size": 2 * width})
    shapes = rf"\({width},\) where the model has \({2 * width},\)"
    with pytest.raises(ConfigError, match=rf"--init .*backbone\.blocks\.0\.ffn\.image\.fc1\.bias {shapes}"):
        start_weights(folder, wider)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"--init .* cannot be read"):
        start_weights(folder, config.model)
    with pytest.raises(ConfigError, match=r"--init .*gone does not exist: name an export"):
        task_config("vqa", init=tmp_path / "gone", model="eve_tiny")


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in presets() if name.startswith("tasks/")])
def test_recipes_keep_base_settings_that_they_do_not_set(name):
    under = {"model": {"hidden_size": 768}, "data": {"tokenizer": "scenes"}}
    config = load_config(name, under=under)
    assert config.task is not None
    assert config.model.hidden_size == 768
    assert config.data.tokenizer == "scenes"


def test_a_recipe_wins_over_the_model_and_loses_to_overrides(export, tmp_path):
    folder, config, _ = export
    file = tmp_path / "a.json"
    file.touch()
    made = task_config(
        "vqa",
        init=folder,
        model="eve_base",
        train_data=[str(file)],
        overrides=["optimizer.lr=1", "model.text_length=20"],
    )
    assert made.model == config.model.model_copy(update={"image_size": 480, "text_length": 20})
    assert (made.optimizer.lr, made.optimizer.clip_grad_norm, made.task.head_lr_multiple) == (1.0, 3.0, 10.0)
    assert made.data.tokenizer == str(folder / "tokenizer")
    assert made.train.init == folder
    assert [str(path) for path in made.task.val.annotations] == [str(file)]
    with pytest.raises(ConfigError, match="recipe tasks/vqa is for the task 'vqa', not 'nlvr'"):
        task_config("nlvr", init=None, model="eve_tiny", recipe="tasks/vqa")
    with pytest.raises(ConfigError, match=r"unknown key 'task\.head_lr'; did you mean 'head_lr_multiple'"):
        task_config("nlvr", init=None, model="eve_tiny", overrides=["task.head_lr=3"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"train_data": ["scene"]}, "--data scene does not exist: name annotation files, scenes or scenes:hard"),
        ({"train_data": ["scenes:foo"]}, "--data scenes:foo: the level of scenes must be easy or hard"),
        ({"train_data": ["scenes", "a.json"]}, "--data scenes a.json: scenes cannot be mixed with files"),
        ({"train_data": ["scenes"], "val_data": ["gone.json"]}, "--val_data gone.json does not exist"),
        ({"train_data": ["scenes_train.json"]}, "--data scenes_train.json does not exist"),
    ],
)
def test_wrong_data_names_the_option(options, text):
    with pytest.raises(ConfigError, match=text):
        task_config("vqa", init=None, model="eve_tiny", **options)


def test_a_file_whose_name_begins_with_scenes_takes_the_recipe_for_files(tmp_path):
    file = tmp_path / "scenes_train.json"
    file.touch()
    made = task_config("vqa", init=None, model="eve_tiny", train_data=[str(file)])
    assert made.task.train.format == "auto"
    assert made.model.image_size == 480


def test_steps_and_warm_up_follow_from_the_number_of_examples(task_tree):
    tree = task_tree("vqa", epochs=3, warmup_share=0.1)
    tree["train"] = {"train_batch_size": 8}
    config = with_schedule(parse_config(tree), 84)
    assert (config.train.max_steps, config.optimizer.warmup_steps) == (31, 3)
    with pytest.raises(
        ConfigError, match=r"train_batch_size \(8\) must not exceed the number of training examples \(5\)"
    ):
        with_schedule(config, 5)


def test_steps_follow_from_the_batch_size_of_the_deepspeed_json(task_tree, monkeypatch, tmp_path):
    tree = task_tree("vqa", epochs=3, train={"num_examples": 84})
    tree["train"] = {"output_dir": str(tmp_path)}
    started = mock.Mock(return_value=mock.MagicMock(evaluation={}))
    monkeypatch.setattr(finetune, "start", started)
    monkeypatch.setattr(finetune, "initialize_deepspeed_distributed", lambda timeout: RankInfo(0, 1, 0, "single"))
    finetune.finetune(parse_config(tree), {"train_batch_size": 8})
    train = started.call_args.args[0].config.train
    assert (train.train_batch_size, train.max_steps) == (8, 31)


def test_learning_rates_decay_towards_the_embeddings(task_tree):
    scale = {
        name: lr_scale(name, num_layers=2, layer_decay=0.5, head_multiple=10.0)
        for name in (
            "head.0.weight",
            "backbone.norm.weight",
            "backbone.blocks.1.moe.router.weight",
            "backbone.blocks.0.norm1.weight",
            "backbone.pre_norm.weight",
            "backbone.text_embedding.word.weight",
        )
    }
    assert list(scale.values()) == [10.0, 1.0, 1.0, 0.5, 0.25, 0.25]
    task = VQA(parse_config(task_tree("vqa", layer_decay=0.5, head_lr_multiple=10.0)), ["red"])
    model = task.model()
    optimizer = build_optimizer(model, task.config, {"zero_optimization": {"stage": 1}}, lr_scales(task.config))
    by_parameter = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(by_parameter) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        scale, decay = by_parameter[id(parameter)]
        assert scale == lr_scale(name, 2, 0.5, 10.0), name
        assert (decay == 0) == (
            parameter.ndim < 2 or "bias" in name or ("embedding" in name and "projection" not in name)
        )


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "decoding"),
    [
        (None, Decoding("simplejpeg", "torch")),
        ([{}], Decoding("pillow", "pillow")),
        ([Decoding("simplejpeg", "torch").position()], Decoding("simplejpeg", "torch")),
        ([Decoding("pillow", "torch").position()], Decoding("pillow", "torch")),
    ],
)
def test_a_resumed_run_decodes_its_images_as_before(task_tree, positions, decoding):
    """A position of an earlier version names no decoder; such a run goes on with Pillow alone."""
    config = parse_config(task_tree("vqa"))
    file = io.BytesIO()
    Image.linear_gradient("L").resize((90, 70)).convert("RGB").save(file, "JPEG")
    examples = [Example(str(number), (file.getvalue(),), "what is it?", answers=("a",)) for number in range(8)]
    job = finetune.Finetuning(config, VQA(config, ["a"]), examples)
    batches = job.open(Loading(Topology.current(), 8, 0, positions, False, None))
    pixels = next(batches).pixel_values[0, 0].permute(1, 2, 0).numpy()
    size = config.model.image_size
    assert (pixels == resize(open_image(file.getvalue()), (0, 0, 90, 70), size, decoding)).all()
    assert decoding.position().items() <= batches.state_dict().items()


def batches(config, task, examples, rank=0, world_size=1, step=0):
    collate = TaskCollator(config, load_tokenizer("scenes"), task.targets)
    micro = config.train.train_batch_size // world_size
    options = {"step": step, "rank": rank, "world_size": world_size, "micro_batch_size": micro}
    return training_batches(examples, config, collate, **options)


def scenes(n):
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    return [Example(str(i), (image,), "what?", answers=("red",)) for i in range(n)]


def test_a_step_has_the_same_examples_on_any_number_of_ranks(task_tree):
    config, examples = parse_config(task_tree("vqa")), scenes(20)
    task = VQA(config, ["red"])
    whole = [[e.key for e in b.examples] for b in itertools.islice(batches(config, task, examples), 5)]
    halves = [
        [[e.key for e in b.examples] for b in itertools.islice(batches(config, task, examples, rank, 2), 5)]
        for rank in (0, 1)
    ]
    assert whole == [left + right for left, right in zip(*halves, strict=True)]
    flat = [key for batch in whole for key in batch]
    assert sorted(flat[:20], key=int) == [str(i) for i in range(20)] == sorted(flat[20:], key=int)
    assert flat[:20] != flat[20:]
    later = [e.key for e in next(batches(config, task, examples, step=3)).examples]
    assert later == whole[3]


@pytest.mark.parametrize("generated", [True, False])
def test_worker_processes_make_the_same_batches(task_tree, generated):
    found = []
    for num_workers in (0, 2):
        config = parse_config(task_tree("vqa") | {"data": {"num_workers": num_workers}})
        examples = load_examples(config, "train") if generated else scenes(20)
        found.append(list(itertools.islice(batches(config, VQA(config, ["red"]), examples), 4)))
    for batch, other in zip(*found, strict=True):
        assert [example.key for example in batch.examples] == [example.key for example in other.examples]
        assert torch.equal(batch.pixel_values, other.pixel_values)
        assert torch.equal(batch.input_ids, other.input_ids)


def test_an_example_without_a_usable_image_is_replaced_and_counted(task_tree, tmp_path):
    config, examples = parse_config(task_tree("vqa")), scenes(8)
    examples[3] = Example("3", (tmp_path / "gone.png",), "what?", answers=("red",))
    batch = next(batches(config, VQA(config, ["red"]), examples))
    assert sorted(e.key for e in batch.examples) == ["0", "1", "2", "4", "4", "5", "6", "7"]
    assert batch.skipped == {"missing image": 1}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_examples_without_any_usable_image_end_training_with_one_line(task_tree, tmp_path, num_workers):
    tree = task_tree("vqa")
    config = parse_config(tree | {"data": {"num_workers": num_workers}})
    example = Example("3", (tmp_path / "gone.png",), "what?", answers=("red",))
    message = (
        r"^100 examples in a row had no usable image, the last error is: missing image \(.*gone\.png\); check task"
    )
    with pytest.raises(UnusableData, match=message) as caught:
        next(batches(config, VQA(config, ["red"]), [example] * 8))
    assert "\n" not in str(caught.value)
    assert ending(caught.value).code == BAD_INPUT


def test_images_are_batched_as_bytes_and_normalized_once(task_tree, monkeypatch):
    config, examples = parse_config(task_tree("vqa")), scenes(8)
    task = VQA(config, ["red"])
    examples = [replace(e, images=(np.full((64, 64, 3), 30 * i, np.uint8),)) for i, e in enumerate(examples)]
    batch = next(batches(config, task, examples))
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.pixel_values.shape == (8, 1, 3, 64, 64)
    assert sorted(batch.pixel_values.flatten(1)[:, 0].tolist()) == [30 * i for i in range(8)]
    before = batch.pixel_values.float().mul_(2 / 255).sub_(1)
    assert torch.equal(batch.normalized_pixels, before)
    assert batch.model_inputs()["pixel_values"] is batch.normalized_pixels
    moved = batch.to("meta")
    assert [tensor.device.type for tensor in moved.tensors()] == ["meta"] * 4
    assert [example.key for example in moved.examples] == [example.key for example in batch.examples]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = torch_pinned(batch)
    assert all(torch.equal(*both) for both in zip(pinned.tensors(), [t + 1 for t in batch.tensors()], strict=True))


# --- saved models -----------------------------------------------------------------------------------------------------


def test_a_saved_model_gives_the_same_answers(task_tree, tmp_path):
    task = VQA(parse_config(task_tree("vqa")), ["red", "blue"])
    model = save(task, tmp_path / "model")
    loaded = load_task_model(tmp_path / "model")
    assert loaded.task.answers == ["red", "blue"]
    inputs = {"input_ids": torch.tensor([[2, 9, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    pixels = torch.randn(1, 1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(pixels, **inputs).logits, model(pixels, **inputs).logits)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["task"]["name"] == "vqa"


def test_folders_without_a_fine_tuned_model_are_refused(export, task_tree, tmp_path):
    folder, *_ = export
    with pytest.raises(ExportError, match=r"is a pre-trained model without a task: fine-tune it"):
        load_task_model(folder)
    with pytest.raises(ExportError, match=r"is no saved model, it lacks model\.safetensors or config\.json"):
        load_task_model(tmp_path)
    save(VQA(parse_config(task_tree("vqa")), ["red", "blue"]), tmp_path / "model")
    (tmp_path / "model" / "answers.json").write_text('["red"]')
    with pytest.raises(ExportError, match=r"head\.3\.weight \(2, 64\) where the model has \(1, 64\)"):
        load_task_model(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.raises(ExportError, match="cannot be loaded"):
        load_task_model(tmp_path / "model")


def test_ask_and_rank_return_sorted_answers(task_tree, tmp_path):
    from PIL import Image

    image = tmp_path / "a.png"
    Image.new("RGB", (30, 20), (200, 0, 0)).save(image)
    save(VQA(parse_config(task_tree("vqa")), ["red", "blue", "green"]), tmp_path / "vqa")
    save(Retrieval(parse_config(task_tree("retrieval"))), tmp_path / "retrieval")
    vqa, retrieval = load_task_model(tmp_path / "vqa"), load_task_model(tmp_path / "retrieval")
    answers = ask(vqa, [image], ["what color?", "is it red?"], top=2)
    assert [answer.question for answer in answers] == ["what color?"] * 2 + ["is it red?"] * 2
    assert answers[0].score >= answers[1].score
    matches = rank(retrieval, image, ["a red circle", "a blue square"])
    assert {match.caption for match in matches} == {"a red circle", "a blue square"}
    assert matches[0].match >= matches[1].match
    with pytest.raises(ConfigError, match="--image was given 2 times, the model needs 1: give it once per image"):
        ask(vqa, [image, image], ["what?"])
    with pytest.raises(ConfigError, match=r"image .*gone\.png cannot be used: missing image"):
        rank(retrieval, tmp_path / "gone.png", ["a"])
    with pytest.raises(ConfigError, match="no caption to rank: give at least one"):
        rank(retrieval, image, [])
    with pytest.raises(ConfigError, match="answers no questions"):
        ask(retrieval, [image], ["what?"])
    with pytest.raises(ConfigError, match="ranks no captions"):
        rank(vqa, image, ["a"])
    with pytest.raises(ConfigError, match="neither answers questions nor ranks captions"):
        rank(vqa._replace(task=object()), image, ["a"])
