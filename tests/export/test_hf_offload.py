"""Placement of the transformers model by accelerate: a part in memory, a part on the disk, the same outputs."""

import shutil

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map, init_empty_weights
from accelerate import load_checkpoint_and_dispatch as load_and_dispatch
from hf_export import inputs
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from eve_ds.export import ExportError

SMALL = {"cpu": 200_000}
"""Bytes of memory that hold a part of the model; the rest goes to the disk."""


def outputs(model):
    with torch.no_grad():
        return dict(model(**inputs(), labels=inputs()["input_ids"]))


@pytest.fixture(scope="module")
def expected(exported):
    return outputs(AutoModel.from_pretrained(exported))


def assert_same(found, expected):
    """Compare to fp32 rounding: tensors in a file can have any alignment, which changes the order of sums."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-5, atol=2e-5)


DEVICE_MAPS = {
    "auto": "auto",
    "one device": {"": "cpu"},
    "heads on the disk": {"backbone": "cpu", "pixel_decoder": "disk", "text_head": "disk"},
    "encoder on the disk": {"backbone": "disk", "pixel_decoder": "cpu", "text_head": "cpu"},
}


@pytest.mark.parametrize("case", DEVICE_MAPS)
def test_from_pretrained_places_weights(exported, expected, tmp_path, case):
    model = AutoModel.from_pretrained(exported, device_map=DEVICE_MAPS[case], offload_folder=tmp_path)
    assert_same(outputs(model), expected)


def test_memory_limit_splits_the_model(exported, expected, tmp_path):
    model = AutoModel.from_pretrained(exported, device_map="auto", max_memory=SMALL, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert_same(outputs(model), expected)


@pytest.mark.parametrize("device_map", ["auto", "split"])
def test_accelerate_loads_and_dispatches_a_checkpoint(exported, expected, tmp_path, device_map):
    with init_empty_weights():
        model = AutoModel.from_config(AutoConfig.from_pretrained(exported))
    if device_map == "split":
        device_map = infer_auto_device_map(model, max_memory=SMALL, no_split_module_classes=model._no_split_modules)
        assert set(device_map.values()) == {"cpu", "disk"}
    model = load_and_dispatch(model, str(exported), device_map=device_map, offload_folder=tmp_path)
    assert_same(outputs(model.eval()), expected)


def test_offloaded_weights_are_present_during_the_call_of_their_module_only(exported, expected, tmp_path):
    model = cpu_offload(AutoModel.from_pretrained(exported))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(outputs(model), expected)
    assert_same(outputs(disk_offload(AutoModel.from_pretrained(exported), tmp_path)), expected)


def test_split_model_saves_all_weights(exported, tmp_path):
    model = AutoModel.from_pretrained(exported, device_map="auto", max_memory=SMALL, offload_folder=tmp_path / "disk")
    model.save_pretrained(tmp_path / "saved")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", exported))
    assert_same(found, expected)


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_export_that_names_each_expert_loads(plain, exported, expected, tmp_path, device_map):
    former = shutil.copytree(exported, tmp_path / "former")
    shutil.copy(plain / "model.safetensors", former)
    assert_same(outputs(AutoModel.from_pretrained(former, device_map=device_map)), expected)
    with pytest.raises(ExportError, match="cannot be offloaded to the disk: load it without device_map, and save it"):
        AutoModel.from_pretrained(former, device_map={"": "disk"}, offload_folder=tmp_path)
