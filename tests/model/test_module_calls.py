"""Every module that holds parameters is called in a forward pass, so that hooks and adapters act on it."""

import pytest
import torch
from hf_export import CONFIG, inputs
from tiny import tiny_model
from torch import nn
from torch.nn.utils import parametrize

from eve_ds.export.hf import EveConfig, EveModel
from eve_ds.model.attention import FusedProjection, SelfAttention
from eve_ds.model.embeddings import ImageEmbedding, PatchProjection, vocabulary_matrix
from eve_ds.model.eve import EVE
from eve_ds.views import Layout

PAIRS = ["mim", "mlm", "itc", "itm"]
VARIANTS = {
    "msm": {},
    "pairs": {"objectives": PAIRS},
    "joint": {"objectives": ["joint"], "pixel_decoder": {"kind": "self"}},
    "hard router": {"deep_ffn": "hard_router"},
    "shared": {"deep_ffn": "shared"},
    "official": {"profile": "official", "moe": {"routing": "capacity"}},
    "jitter": {"moe": {"router_jitter": 0.1}},
}


def holders(model):
    """Names of the modules with parameters of their own."""
    return {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}


def called(model, run):
    """Names of the modules whose forward hook fires."""
    found = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: found.add(name))
    run()
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_model_calls_every_module_with_parameters(variant, training):
    model = EVE(tiny_model(**VARIANTS[variant])).train(training)
    batch = {name: value for name, value in inputs().items() if name not in ("image_mask", "visible_patch_mask")}
    assert holders(model) - called(model, lambda: model(**batch)) == set()


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_model_calls_every_module_with_parameters(variant):
    model = EveModel(EveConfig(**tiny_model(**VARIANTS[variant]).model_dump(mode="json")))
    found = set()
    for kind in ("image", "text", "masked"):  # features of `itc` are those of one modality
        found |= called(model, lambda kind=kind: model(**inputs(kind)))
    assert holders(model) - found == set()


class Doubled(nn.Module):
    """Parametrization such as adapters register: the parameter times two."""

    def forward(self, parameter):
        return 2 * parameter


def outputs(model):
    output = model.predict(**inputs())
    return torch.cat([output.pixel_predictions.flatten(), output.token_logits().flatten()])


def test_every_parametrization_acts_like_the_changed_parameter():
    """A module may read parameters only where a change of them, made from outside, is seen."""
    torch.manual_seed(0)
    model, changed = EVE(CONFIG.model).eval(), EVE(CONFIG.model).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.copy_(
                1.0 + 0.1 * torch.randn_like(parameter) if "norm" in name else torch.randn_like(parameter) / 8
            )
        model.load_state_dict(changed.state_dict())
        for parameter in changed.parameters():
            parameter.mul_(2)
        for name in holders(model):
            module = model.get_submodule(name)
            for own in [own for own, _ in module.named_parameters(recurse=False)]:
                parametrize.register_parametrization(module, own, Doubled())
        torch.testing.assert_close(outputs(model), outputs(changed))


def test_fused_projection_equals_the_layer_that_an_adapter_expects():
    torch.manual_seed(0)
    attention, x, layout = SelfAttention(8, 2), torch.randn(5, 8), Layout.of(torch.ones(1, 5, dtype=torch.bool))
    with torch.no_grad():
        attention.q_bias.normal_()
        attention.v_bias.normal_()
    fused = attention(x, [layout])
    plain = nn.Linear(8, 24, bias=False)
    plain.weight = attention.qkv.weight
    assert type(attention.qkv) is FusedProjection
    attention.qkv = plain
    torch.testing.assert_close(attention(x, [layout]), fused)


def test_patch_projection_equals_a_convolution():
    torch.manual_seed(0)
    embedding = ImageEmbedding(CONFIG.model)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.normal_()
    pixels, ids = torch.randn(2, 3, 64, 64), torch.tensor([[3, 0, 63], [5, 9, 1]])
    projection = embedding.projection
    grid = nn.functional.conv2d(pixels, projection.weight, projection.bias, stride=8).flatten(2).transpose(1, 2)
    expected = torch.stack([grid[row, own] for row, own in enumerate(ids)]) + embedding.position[1:][ids]
    torch.testing.assert_close(embedding(pixels, ids)[:, 1:], expected + embedding.modality, rtol=1e-5, atol=1e-4)
    assert type(projection) is PatchProjection
    torch.testing.assert_close(projection(pixels).flatten(2).transpose(1, 2), grid)


def test_vocabulary_is_what_the_word_embedding_returns():
    word = nn.Embedding(7, 3)
    assert vocabulary_matrix(word) is word.weight

    class Adapter(nn.Module):
        """Takes the place of a layer and changes its output, as peft's layers do."""

        def __init__(self):
            super().__init__()
            self.base = word

        @property
        def weight(self):
            return self.base.weight

        def forward(self, ids):
            return self.base(ids) + 1

    assert torch.equal(vocabulary_matrix(Adapter()), word.weight + 1)
