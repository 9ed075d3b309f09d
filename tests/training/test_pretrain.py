"""Settings that the engine resolves before training: schedule, batch, precision, output folder, parameter groups.

The loop itself runs in tests/distributed/test_engine_distributed.py.
"""

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tree

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.batch import Sample
from eve_ds.data.collate import Collator
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import EVE
from eve_ds.objectives.pretraining import count, encoder_tokens
from eve_ds.objectives.registry import objectives_of
from eve_ds.parallel.settings import batch_triangle, resolve_deepspeed_config
from eve_ds.training.nonfinite import poison_if_nonfinite
from eve_ds.training.optimizer import optimizer_parameter_groups
from eve_ds.training.run_folder import check_output_dir
from eve_ds.training.schedule import learning_rate


def config(**sections):
    return parse_config(sections)


# --- learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "final", "expected"),
    [
        # Four warm-up steps of twelve, peak 0.8: 0.2, 0.4, 0.6, 0.8, then eight steps of decay.
        ("linear", 0.0, {0: 0.2, 1: 0.4, 3: 0.8, 4: 0.8, 5: 0.7, 8: 0.4, 11: 0.1, 12: 0.0}),
        ("linear", 0.5, {3: 0.8, 4: 0.8, 6: 0.7, 8: 0.6, 12: 0.4, 99: 0.4}),
        # 0.4 (1 + cos(pi t)) at t = 0, 1/4, 1/2, 3/4, 1
        ("cosine", 0.0, {0: 0.2, 4: 0.8, 6: 0.682842712, 8: 0.4, 10: 0.117157288, 12: 0.0}),
        ("cosine", 0.25, {4: 0.8, 8: 0.5, 12: 0.2}),
        ("constant", 0.0, {0: 0.2, 3: 0.8, 4: 0.8, 12: 0.8}),
    ],
)
def test_learning_rate_warms_up_then_decays(decay, final, expected):
    settings = config(
        optimizer={"lr": 0.8, "warmup_steps": 4, "decay": decay, "final_lr_share": final}, train={"max_steps": 12}
    )
    for step, lr in expected.items():
        assert learning_rate(settings, step, seconds=1e9) == pytest.approx(lr, abs=1e-9), step


def test_decay_by_seconds_follows_the_time_budget():
    settings = config(
        optimizer={"lr": 0.8, "warmup_steps": 4, "decay": "linear", "decay_by": "seconds"},
        train={"max_steps": 10**6, "max_seconds": 200.0},
    )
    assert learning_rate(settings, 100, seconds=0.0) == pytest.approx(0.8)
    assert learning_rate(settings, 100, seconds=50.0) == pytest.approx(0.6)
    assert learning_rate(settings, 100, seconds=300.0) == 0.0
    assert learning_rate(settings, 0, seconds=100.0) == pytest.approx(0.8 / 4 * 0.5)


def test_learning_rate_without_warm_up_starts_at_its_peak():
    settings = config(optimizer={"lr": 0.8, "warmup_steps": 0}, train={"max_steps": 8})
    assert [learning_rate(settings, step, 0.0) for step in (0, 4)] == pytest.approx([0.8, 0.4])


# --- batch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "accumulation", "ranks", "expected"),
    [
        (64, None, None, 4, (16, 1)),
        (64, 4, None, 4, (4, 4)),
        (64, None, 2, 4, (8, 2)),
        (64, 8, 2, 4, (8, 2)),
        (6, None, None, 3, (2, 1)),
    ],
)
def test_batch_triangle_fills_in_missing_sizes(batch, micro, accumulation, ranks, expected):
    assert batch_triangle(batch, micro, accumulation, ranks) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "accumulation", "ranks", "text"),
    [
        (64, None, None, 3, "(64) must equal micro_batch_size (free) * gradient_accumulation_steps (free) * ranks (3)"),
        (64, 5, None, 2, "(64) must equal micro_batch_size (5) * gradient_accumulation_steps (free) * ranks (2)"),
        (64, 8, 3, 2, "(64) must equal micro_batch_size (8) * gradient_accumulation_steps (3) * ranks (2)"),
        (2, None, None, 4, "(2) must equal micro_batch_size (free) * gradient_accumulation_steps (free) * ranks (4)"),
        (2, 4, None, 1, "(2) must equal micro_batch_size (4) * gradient_accumulation_steps (free) * ranks (1)"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(batch, micro, accumulation, ranks, text):
    with pytest.raises(ConfigError) as caught:
        batch_triangle(batch, micro, accumulation, ranks)
    assert str(caught.value) == (
        f"train_batch_size {text}; leave one of them out, or change train_batch_size to a multiple of the others"
    )


# --- YAML and DeepSpeed JSON ------------------------------------------------------------------------------------------

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 1},
}


def resolve(dictionary, ranks=2, **sections):
    return resolve_deepspeed_config(dictionary, config(**sections), ranks)


def refused(dictionary, ranks=2, **sections):
    with pytest.raises(ConfigError) as caught:
        resolve(dictionary, ranks, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_auto_values_come_from_the_yaml():
    train = {"train_batch_size": 24, "gradient_accumulation_steps": 3, "precision": "bf16"}
    settled, resolved = resolve(AUTO, train=train, optimizer={"clip_grad_norm": 0.7})
    assert resolved["train_batch_size"] == 24
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 3
    assert resolved["gradient_clipping"] == 0.7
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (True, False)
    assert resolved["zero_optimization"] == {"stage": 1}
    assert settled.train.micro_batch_size == 4
    assert AUTO["train_batch_size"] == "auto", "the dictionary that was passed must not change"


def test_values_only_in_the_json_enter_the_configuration():
    dictionary = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }
    settled, resolved = resolve(dictionary)
    assert settled.train.train_batch_size == 12
    assert settled.train.gradient_accumulation_steps == resolved["gradient_accumulation_steps"] == 2
    assert settled.train.precision == "bf16"
    assert settled.optimizer.clip_grad_norm == 2.0


def test_an_empty_json_means_zero_0_in_fp32():
    settled, resolved = resolve({}, train={"train_batch_size": 8})
    assert resolved["zero_optimization"] == {"stage": 0}
    assert settled.train.precision == "fp32"


def test_equal_values_in_yaml_and_json_are_accepted():
    dictionary = {"train_batch_size": 8, "gradient_clipping": 1.0, "fp16": {"enabled": False}}
    resolve(dictionary, train={"train_batch_size": 8, "precision": "fp32"}, optimizer={"clip_grad_norm": 1.0})


END = 'in the DeepSpeed JSON: set the JSON to "auto", or make them equal'


@pytest.mark.parametrize(
    ("dictionary", "sections", "text"),
    [
        (
            {"train_batch_size": 16},
            {"train": {"train_batch_size": 8}},
            f"train.train_batch_size (8) in the YAML contradicts train_batch_size (16) {END}",
        ),
        (
            {"train_micro_batch_size_per_gpu": 2},
            {"train": {"train_batch_size": 8, "micro_batch_size": 4}},
            f"train.micro_batch_size (4) in the YAML contradicts train_micro_batch_size_per_gpu (2) {END}",
        ),
        (
            {"gradient_accumulation_steps": 2},
            {"train": {"train_batch_size": 8, "gradient_accumulation_steps": 4}},
            f"train.gradient_accumulation_steps (4) in the YAML contradicts gradient_accumulation_steps (2) {END}",
        ),
        (
            {"gradient_clipping": 0.5},
            {"optimizer": {"clip_grad_norm": 1.0}},
            f"optimizer.clip_grad_norm (1.0) in the YAML contradicts gradient_clipping (0.5) {END}",
        ),
        (
            {"bf16": {"enabled": True}},
            {"train": {"precision": "fp32"}},
            f"train.precision (fp32) in the YAML contradicts bf16.enabled (True) {END}",
        ),
        (
            {"bf16": {"enabled": False}},
            {"train": {"precision": "bf16"}},
            f"train.precision (bf16) in the YAML contradicts bf16.enabled (False) {END}",
        ),
        (
            {"fp16": {"enabled": True}},
            {"train": {"precision": "bf16"}},
            f"train.precision (bf16) in the YAML contradicts fp16.enabled (True) {END}",
        ),
    ],
)
def test_a_contradiction_names_both_places(dictionary, sections, text):
    assert refused(dictionary, **sections) == text


@pytest.mark.parametrize(
    ("dictionary", "text"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage (3) must be below 3, since DeepSpeed cannot"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size in the DeepSpeed JSON is "auto", but no setting',
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer in the DeepSpeed JSON has no effect here: remove it and set"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler in the DeepSpeed JSON has no effect here"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled and fp16.enabled in the DeepSpeed JSON"),
        ({"bf16": True}, "bf16 (True) in the DeepSpeed JSON must be a section such as {'enabled': 'auto'}"),
        ({"zero_optimization": 1}, "zero_optimization (1) in the DeepSpeed JSON must be a section"),
        ({"train_batch_size": "64"}, "train_batch_size ('64') in the DeepSpeed JSON must be a whole number above 0"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu (0) in the DeepSpeed JSON must be"),
        ({"gradient_clipping": -1}, "gradient_clipping (-1) in the DeepSpeed JSON must be a number from 0 on"),
        (
            {"bf16": {"enabled": True, "check_grad_overflow": False}},
            "bf16.check_grad_overflow (false) in the DeepSpeed JSON must be left out: a gradient that is not finite",
        ),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm (false) in the DeepSpeed JSON must be left out",
        ),
        (
            {"bf16": {"enabled": True}},
            "cannot be used with precision bf16 and zero_optimization.stage 0, where DeepSpeed",
        ),
        ([], "the DeepSpeed JSON must be a mapping of settings, not a list"),
    ],
)
def test_unsupported_deepspeed_settings_are_refused(dictionary, text):
    assert text in refused(dictionary, train={"train_batch_size": 8}, optimizer={"clip_grad_norm": 1.0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 runs on this device")
def test_a_precision_that_the_device_lacks_is_refused():
    text = refused({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    assert text == "precision fp16 cannot be used on this device (cpu): take another one of bf16, fp32"


def test_expert_parallelism_that_does_not_fit_is_refused():
    text = refused({"zero_optimization": {"stage": 1}}, ranks=3, parallel={"ep_size": 2}, train={"train_batch_size": 9})
    assert "the number of ranks (3) must be divisible by parallel.ep_size (2)" in text
    text = refused({}, parallel={"ep_size": 2}, train={"train_batch_size": 8})
    assert "optimizer.clip_grad_norm (1) cannot be used with zero_optimization.stage 0 and parallel.ep_size (2)" in text


# --- output folder ----------------------------------------------------------------------------------------------------


def of_run(folder, **train):
    return config(train={"output_dir": str(folder), **train})


def write_config(run):
    Path(run.train.output_dir, "config.json").write_text(run.model_dump_json())


def refused_folder(run, resume="auto"):
    with pytest.raises(ConfigError) as caught:
        check_output_dir(run, resume)
    return str(caught.value)


def test_a_missing_field_in_an_old_run_counts_as_its_default(tmp_path):
    run = of_run(tmp_path)
    tree = run.model_dump(mode="json")
    del tree["loss"]["itc_weight"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    check_output_dir(run, "auto")


def test_an_old_run_without_pixel_target_resumes_with_normalized_pixels(tmp_path):
    run = of_run(tmp_path)
    tree = run.model_dump(mode="json")
    del tree["model"]["pixel_target"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert "pixel_target" in refused_folder(run)
    model = run.model.model_copy(update={"pixel_target": "normalized"})
    check_output_dir(run.model_copy(update={"model": model}), "auto")


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ({}, ["joint"]),
        ({"objective": "msm"}, ["joint"]),
        ({"objective": "itc_itm"}, ["itc", "itm"]),
        ({"objective": "itc_itm_mlm"}, ["mlm", "itc", "itm"]),
    ],
)
def test_an_old_run_without_objectives_resumes_with_the_equivalent_set(tmp_path, former, now):
    run = of_run(tmp_path)
    run = run.model_copy(update={"model": run.model.model_copy(update={"objectives": now})})
    tree = run.model_dump(mode="json")
    del tree["model"]["objectives"]
    tree["model"] |= former
    tree["loss"] |= {"pixel_weight": tree["loss"].pop("mim_weight"), "text_weight": tree["loss"].pop("mlm_weight")}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    check_output_dir(run, "auto")
    other = run.model_copy(update={"model": run.model.model_copy(update={"objectives": ["mim", "mlm"]})})
    assert f"its model.objectives is {now!r}, this run's is ['mim', 'mlm']" in refused_folder(other)


def test_hard_negatives_need_a_micro_batch_of_two():
    sizes = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings = config(model={"objectives": ["itc", "itm"]}, train=sizes)
    resolve_deepspeed_config({}, settings, 1)
    with pytest.raises(ConfigError, match=r"model.objectives \(itc, itm\) needs a micro_batch_size \(1\) of 2 or more"):
        resolve_deepspeed_config({}, settings, 2)


def test_a_new_folder_is_created_empty(tmp_path):
    check_output_dir(of_run(tmp_path / "a" / "b"), "none")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"intermediate_size": 8}}, "its model.intermediate_size is 3072, this run's is 8"),
        ({"masking": {"patch_mask_ratio": 0.5}}, "its masking.patch_mask_ratio is 0.75, this run's is 0.5"),
        ({"data": {"shuffle_buffer": 7}}, "its data.shuffle_buffer is 1000, this run's is 7"),
        ({"loss": {"mlm_weight": 3}}, "its loss.mlm_weight is 1.0, this run's is 3.0"),
        ({"train": {"seed": 4}}, "its train.seed is 0, this run's is 4"),
    ],
)
def test_the_folder_of_another_run_is_refused(tmp_path, changes, text):
    write_config(of_run(tmp_path))
    train = {"output_dir": str(tmp_path), **changes.pop("train", {})}
    message = refused_folder(config(train=train, **changes))
    assert message == f"train.output_dir ({tmp_path}) is the folder of another run: {text}; name another folder"


def test_the_folder_of_the_same_run_is_accepted(tmp_path):
    run = of_run(tmp_path)
    write_config(run)
    check_output_dir(run, "auto")
    longer = config(
        train={"output_dir": str(tmp_path), "max_steps": 7, "log_every": 3},
        optimizer={"lr": 1e-5},
        data={"num_workers": 3, "max_bad_share": 0.5},
    )
    check_output_dir(longer, "auto")
    assert refused_folder(run, "none") == (
        f"train.output_dir ({tmp_path}) holds a run: use --resume auto, or name another folder"
    )
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path}/config.json is not JSON (" in refused_folder(run)


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    text = refused_folder(of_run(tmp_path / "file" / "run"))
    assert text == (
        f"train.output_dir ({tmp_path}/file/run) cannot be written: Not a directory; "
        "name another folder or change its permissions"
    )


def test_a_read_only_folder_is_refused():
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent, "run")
        folder.mkdir(mode=0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere; the user nobody may not
        try:
            text = refused_folder(of_run(folder))
        finally:
            os.seteuid(user)
    assert text == (
        f"train.output_dir ({folder}) cannot be written: Permission denied; "
        "name another folder or change its permissions"
    )


# --- gradients and groups ---------------------------------------------------------------------------------------------


def test_a_non_finite_loss_gets_non_finite_gradients():
    x = torch.tensor([1e30, 1.0], requires_grad=True)
    loss = x.square().sum()
    assert loss.item() == math.inf
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert plain.isfinite().all(), "the plain gradient must not show the overflow"
    (gradient,) = torch.autograd.grad(poison_if_nonfinite(loss), x)
    assert gradient.isnan().all()
    y = torch.tensor([0.1, -3.7], requires_grad=True)
    value = y.square().sum()
    poisoned = poison_if_nonfinite(value)
    assert torch.equal(poisoned, value)
    assert torch.equal(*(torch.autograd.grad(one, y, retain_graph=True)[0] for one in (poisoned, value)))


MASKS = {"text_to_image_share": 0.5, "text_to_image_mask_ratio": 0.9}
CHEAP = MASKS | {"image_view_share": 0.5, "image_view_word_share": 0.5, "language_view_patch_share": 0.25}


@pytest.mark.parametrize("masking", [MASKS, CHEAP], ids=["whole", "cheap"])
@pytest.mark.parametrize("objectives", [["joint"], ["mim"], ["mlm"], ["mim", "mlm"]], ids="+".join)
def test_denominators_equal_the_encoded_tokens_and_predictions(objectives, masking):
    settings = config(model=tiny_tree(image_size=32, objectives=objectives), masking=masking)
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    samples = [Sample(f"k{number}", 0, image, "a small red circle top left") for number in range(20)]
    samples += [Sample("image", 0, image, None), Sample("text", 0, None, "a large blue square")]
    batch = Collator(
        settings, load_tokenizer("scenes"), objectives_of(settings.model), has_images=True, has_captions=True
    )(samples)
    output = EVE(settings.model)(**batch.model_inputs())
    counts = count(batch, settings.model)
    routed = {view: float(layers[0].statistics.tokens.sum()) for view, layers in output.moe.items()}
    assert encoder_tokens(batch, settings.model) == routed
    assert counts["tokens"] == sum(routed.values())
    if "mlm" not in objectives:
        images = 21 if batch.image_view_ids is None or "joint" in objectives else len(batch.image_view_ids)
        assert counts["masked_patches"] == images * 12
        assert images == 21 or masking is CHEAP
    if "mim" not in objectives:
        assert counts["masked_tokens"] == len(batch.token_labels)


@pytest.mark.parametrize(("objectives", "passes"), [(["itc"], 1), (["itc", "itm"], 4), (["mlm", "itc", "itm"], 5)])
def test_denominators_of_matching_include_every_pass(objectives, passes):
    settings = config(model=tiny_tree(image_size=32, objectives=objectives))
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    samples = [Sample(f"k{number}", 0, image, "a small red circle top left") for number in range(3)]
    batch = Collator(
        settings, load_tokenizer("scenes"), objectives_of(settings.model), has_images=True, has_captions=True
    )(samples)
    output = EVE(settings.model)(**batch.model_inputs())
    counts = count(batch, settings.model)
    routed = sum(float(layers[0].statistics.tokens.sum()) for layers in output.moe.values())
    assert counts["tokens"] == routed == passes * 3 * (1 + 16 + 8)
    assert counts.keys() == {"tokens", *(["masked_tokens"] if "mlm" in objectives else [])}
    assert counts.get("masked_tokens", 0) == (
        9 if "mlm" in objectives else 0
    )  # half of six words in each of three captions


def test_parameter_groups_hold_every_parameter_once():
    model = EVE(tiny_model())
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # as DeepSpeed's MoE marks its experts
            parameter.allreduce, parameter.group_name = False, "ep_size_1"
    groups = optimizer_parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    where = {names[id(p)]: (g["weight_decay"], bool(g.get("moe", False))) for g in groups for p in g["params"]}
    assert len(where) == sum(len(g["params"]) for g in groups) == len(names)
    assert len({group["name"] for group in groups if not group.get("moe")}) == 2
    for name, (weight_decay, moe) in where.items():
        assert moe == (".experts." in name), name
        exempt = name.endswith((".bias", "_bias")) or any(
            word in name for word in ("norm", "gamma_", "position", "modality", "class_token", "mask_token", "word.")
        )
        assert weight_decay == (0.0 if exempt else 0.05), name
