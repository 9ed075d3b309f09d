"""Adapters of peft on the transformers model: they act, train, merge without a change of the outputs, and reload."""

import pytest
import torch
from hf_export import CONFIG, inputs, write_plain
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModel

from eve_ds.export import load
from eve_ds.export.hf import export_hf

ROUNDING = {"rtol": 2e-5, "atol": 2e-5}
"""Merged weights round once where an adapter rounds two products: fp32 after three blocks, values of order 1."""
EXPERTS = ["experts.fc1_weight", "experts.fc2_weight"]
LORA = {
    "attention and networks": {"target_modules": ["qkv", "proj", "fc1", "fc2"]},
    "all linear layers": {"target_modules": "all-linear"},
    "weight-decomposed": {"target_modules": ["qkv", "proj", "fc1", "fc2"], "use_dora": True},
    "patch projection": {"target_modules": ["projection"]},
    "word embedding": {"target_modules": ["word"]},
    "heads": {"target_modules": ["dense", "pixels", "query", "key_value"]},
    "experts": {"target_parameters": EXPERTS},
    "router": {"target_parameters": ["router.weight", "router.modality_embedding"]},
    "positions": {"target_parameters": ["image_embedding.position", "pixel_decoder.position"]},
    "experts and layers": {"target_modules": ["qkv"], "target_parameters": EXPERTS},
    "whole modules": {
        "target_modules": ["qkv"],
        "modules_to_save": ["text_head", "pixel_decoder", "router", "experts"],
    },
    "whole word embedding": {"target_modules": ["qkv"], "modules_to_save": ["word"]},
}


def outputs(model):
    with torch.no_grad():
        output = model(**inputs())
    return torch.cat([output[name].flatten() for name in ("last_hidden_state", "pixel_predictions", "token_logits")])


def loss_of(model):
    labels = inputs()["input_ids"]
    batch = {name: value for name, value in inputs().items() if name != "masked_token_ids"}
    return model(**batch, labels=labels).loss


def train(model, steps=4):
    """Losses of some steps of gradient descent on the parameters that learn."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(model.train())
        losses.append(loss.item())
        loss.backward()
        assert all(parameter.grad is not None for parameter in learning)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


@pytest.mark.parametrize("kind", LORA)
def test_lora_trains_and_merges_and_reloads(exported, tmp_path, kind):
    base = AutoModel.from_pretrained(exported)
    before = outputs(base)
    frozen = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, **LORA[kind]))
    assert torch.equal(outputs(model.eval()), before) or kind == "weight-decomposed"  # B starts at zero
    losses = train(model)
    assert losses[-1] < losses[0]
    adapted = outputs(model)
    assert (adapted - before).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), before, **ROUNDING)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(exported), tmp_path)
    assert torch.equal(outputs(again), adapted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), adapted, **ROUNDING)
    assert merged.state_dict().keys() == frozen.keys()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "merged")), outputs(merged))


def test_expert_adapter_equals_a_change_of_every_expert(exported):
    """The reference adds the product of the adapter's matrices to each expert by hand."""
    model = get_peft_model(
        AutoModel.from_pretrained(exported), LoraConfig(r=4, target_parameters=EXPERTS[:1], init_lora_weights=False)
    ).eval()
    by_hand = AutoModel.from_pretrained(exported)
    weights = dict(model.named_parameters())
    for layer in CONFIG.model.expert_layers:
        prefix = f"base_model.model.backbone.blocks.{layer}.moe.experts.lora_"
        down, up = weights[f"{prefix}A.default.weight"], weights[f"{prefix}B.default.weight"]
        for expert, weight in enumerate(by_hand.backbone.blocks[layer].moe.experts.fc1_weight.detach()):
            own = up.detach()[:, expert::4] @ down.detach().unflatten(0, (4, 4))[expert]  # scaling: alpha 8 / r 4
            weight.add_(2 * own)
    torch.testing.assert_close(outputs(model), outputs(by_hand), **ROUNDING)


def test_heads_for_pairs_take_adapters(tmp_path):
    config = CONFIG.model_copy(
        update={"model": CONFIG.model.model_copy(update={"objectives": ["mim", "mlm", "itc", "itm"]})}
    )
    export_hf(write_plain(tmp_path / "plain", config), tmp_path / "hf")
    lora = LoraConfig(
        r=2, target_modules=["image_projection", "text_projection", "classifier"], init_lora_weights=False
    )
    base = AutoModel.from_pretrained(tmp_path / "hf")
    kinds = {"image": "image_features", "text": "text_features", "pair": "matching_logits"}
    before = {name: base(**inputs(kind))[name] for kind, name in kinds.items()}
    model = get_peft_model(base, lora).eval()
    adapted = {name: model(**inputs(kind))[name] for kind, name in kinds.items()}
    merged = model.merge_and_unload()
    for kind, name in kinds.items():
        assert (adapted[name] - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(merged(**inputs(kind))[name], adapted[name], **ROUNDING)


def test_scaling_adapter_merges(exported):
    base = AutoModel.from_pretrained(exported)
    before = outputs(base)
    model = get_peft_model(base, IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.normal_(1, 0.2)
    adapted = outputs(model)
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(outputs(model.merge_and_unload()), adapted, **ROUNDING)


def test_plain_model_takes_adapters(plain):
    model, *_ = load(plain)

    def predicted(network):
        with torch.no_grad():
            output = network.predict(**inputs())
        return torch.cat([output.pixel_predictions.flatten(), output.token_logits().flatten()])

    before = predicted(model)
    lora = LoraConfig(target_modules=["qkv", "fc1", "projection", "word"], target_parameters=EXPERTS)
    lora.init_lora_weights = False
    adapted = get_peft_model(model, lora)
    after = predicted(adapted.base_model.model)
    assert (after - before).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(predicted(merged), after, **ROUNDING)
    assert merged.state_dict().keys() == load(plain)[0].state_dict().keys()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"Target modules \{'q_proj'\} not found"),
        ({"target_parameters": ["experts.fc1.weight"]}, "also no `target_parameters` found"),
        ({"target_modules": ["experts"]}, r"Target module Experts\(\) is not supported"),
    ],
)
def test_adapter_without_a_target_is_refused(exported, target, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(AutoModel.from_pretrained(exported), LoraConfig(**target))


def test_misspelled_parameter_beside_a_right_module_is_reported(exported):
    lora = LoraConfig(target_modules=["qkv"], target_parameters=["experts.fc1.weight"])
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        get_peft_model(AutoModel.from_pretrained(exported), lora)


@pytest.mark.parametrize("targets", [{"target_modules": ["qkv", "fc1"]}, {"target_parameters": EXPERTS}])
def test_adapter_methods_of_transformers_work(exported, tmp_path, targets):
    model = AutoModel.from_pretrained(exported)
    before = outputs(model)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, **targets))
    adapted = outputs(model.eval())
    assert (adapted - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    torch.testing.assert_close(outputs(model), before, **ROUNDING)
    again = AutoModel.from_pretrained(exported)
    again.load_adapter(tmp_path)
    assert torch.equal(outputs(again), adapted)


def test_task_type_of_encoders_works(exported):
    model = get_peft_model(
        AutoModel.from_pretrained(exported), LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["qkv"])
    )
    assert torch.equal(outputs(model.eval()), outputs(AutoModel.from_pretrained(exported)))


def test_preparation_for_small_dtypes_freezes_the_model(exported):
    model = prepare_model_for_kbit_training(AutoModel.from_pretrained(exported, dtype=torch.bfloat16))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_adapters_train_with_recomputed_activations(exported):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModel.from_pretrained(exported), LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
