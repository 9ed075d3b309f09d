"""A new objective needs only a class in the registry, with its heads, masks, losses, counts and FLOPs."""

from functools import partial

import pytest
import torch
from torch import nn

from eve_ds.config import load_config
from eve_ds.data.collate import Collator
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.evaluation.scenes import samples_of
from eve_ds.model.eve import EVE
from eve_ds.model.with_losses import ModelWithLosses
from eve_ds.objectives import registry
from eve_ds.objectives.objective import Objective
from eve_ds.objectives.pretraining import count, pretraining_flops, pretraining_losses
from eve_ds.views import whole_view


class CountWords(Objective):
    """Predict the number of words of a caption from the class token of its image."""

    name = "count_words"

    def heads(self, config):
        return {"word_counter": lambda: nn.Linear(config.hidden_size, 1)}

    def masks(self, masker, batch):
        return {"num_words": torch.tensor([len(row) - 2 for row in batch.tokens])}

    def views(self, inputs):
        return {"count_words": whole_view(inputs)._replace(input_ids=None, attention_mask=None)}

    def predict(self, model, encoded, inputs, made):
        return {"word_counts": model.word_counter(encoded["count_words"].stream.padded()[:, 0]).squeeze(1)}

    def counts(self, batch):
        return {"captions": float(len(batch))}

    def losses(self, output, targets, counts, config, gather):
        error = output.more["word_counts"].float() - targets["num_words"]
        return {"count_words": (error**2).sum() / counts["captions"]}

    def forward_macs(self, config, masking, text_tokens):
        return 1000.0


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(registry.OBJECTIVES, "count_words", CountWords())
    config = load_config("eve_tiny", ["model.num_hidden_layers=2", "model.moe_layers=[1]", "model.objectives=[mlm]"])
    model = config.model.model_copy(
        update={"objectives": ["mlm", "count_words"]}
    )  # model_copy skips the check of objective names
    return config.model_copy(update={"model": model})


def test_a_new_objective_trains_beside_another(config):
    objectives = registry.objectives_of(config.model)
    collate = Collator(config, load_tokenizer("scenes"), objectives, has_images=True, has_captions=True)
    scenes = Scenes("easy", 0, "train")
    batch = collate(samples_of([scenes[number] for number in range(4)]))
    assert batch.more["num_words"].tolist() == [len(scenes[number].caption.split()) for number in range(4)]
    counts = count(batch, config.model)
    assert counts["captions"] == 4
    losses = partial(_losses, config=config.model)
    module = ModelWithLosses(EVE(config.model), losses, config.loss.weights | {"count_words": 0.5})
    output = module(batch, counts)
    assert {"mlm", "count_words"} <= output.terms.keys()
    assert set(output.moe) == {"mlm", "count_words"}
    weights = config.loss.weights | {"count_words": 0.5}
    total = sum(weights[name] * term for name, term in output.terms.items())
    torch.testing.assert_close(output.loss, total)
    output.loss.backward()
    assert module.model.word_counter.weight.grad.abs().sum() > 0
    alone = config.model.model_copy(update={"objectives": ["mlm"]})
    flops = [pretraining_flops(model, config.masking, 10.0) for model in (config.model, alone)]
    assert flops[0] - flops[1] == pytest.approx(2000.0)


def _losses(output, batch, counts, config):
    return pretraining_losses(output, batch.targets(), counts, config)
