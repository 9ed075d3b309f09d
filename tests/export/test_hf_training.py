"""The transformers model under its Trainer and with the methods that users call on every pre-trained model."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_export import CONFIG, inputs
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from eve_ds.config import ConfigError
from eve_ds.export import load
from eve_ds.export.hf import EveConfig

CAPTIONS = ["a red circle", "a blue square left of a green circle", "a green triangle"] * 8


def outputs(model):
    with torch.no_grad():
        return model(**inputs())


def arguments(folder, steps, **settings):
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        learning_rate=5e-3,
        **settings,
    )


def masked_captions(folder):
    """Samples whose second word is hidden; every sample has its own label."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = []
    for caption in CAPTIONS:
        sample = dict(tokenizer(caption, padding="max_length", max_length=14))
        ids = sample["input_ids"]
        sample["labels"] = [word if place == 2 else -100 for place, word in enumerate(ids)]
        sample["input_ids"] = [tokenizer.mask_token_id if place == 2 else word for place, word in enumerate(ids)]
        samples.append(sample)
    return samples


def trainer(exported, folder, **settings):
    model = AutoModel.from_pretrained(exported)
    return Trainer(model, arguments(folder, 10, **settings), train_dataset=masked_captions(exported))


def losses_of(run):
    return {record["step"]: record["loss"] for record in run.state.log_history if "loss" in record}


@pytest.mark.parametrize(
    "settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=["fp32", "bf16", "checkpointing"]
)
def test_trainer_saves_resumes_and_loads(exported, tmp_path, settings):
    run = trainer(exported, tmp_path, **settings)
    run.train()
    losses, last = losses_of(run), run.model.state_dict()
    assert len(losses) == 10
    assert losses[10] < losses[1] / 2
    saved = AutoModel.from_pretrained(tmp_path / "checkpoint-10").state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in last.items())
    shutil.rmtree(tmp_path / "checkpoint-10")
    resumed = trainer(exported, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses
    assert all(torch.equal(weight, resumed.model.state_dict()[name]) for name, weight in last.items())


def test_collator_of_masked_words_works(exported, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=3)
    data = [dict(tokenizer(caption)) for caption in CAPTIONS]
    run = Trainer(
        AutoModel.from_pretrained(exported), arguments(tmp_path, 3), train_dataset=data, data_collator=collate
    )
    run.train()
    assert all(math.isfinite(loss) for loss in losses_of(run).values())
    assert math.isfinite(run.evaluate(data[:5])["eval_loss"])


def test_trainer_with_adapter_processor_and_pairs(exported, tmp_path):
    processor = AutoProcessor.from_pretrained(exported)
    rng = np.random.default_rng(0)
    rows = [{"image": rng.integers(0, 256, (50, 70, 3), dtype=np.uint8), "caption": text} for text in CAPTIONS]

    def collate(samples):
        batch = processor(images=[row["image"] for row in samples], text=[row["caption"] for row in samples])
        order = torch.stack([torch.randperm(CONFIG.model.num_patches) for _ in samples])
        batch |= {"visible_patch_ids": order[:, :16], "masked_patch_ids": order[:, 16:]}
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"], -100)
        return batch

    lora = LoraConfig(target_modules=["qkv"], modules_to_save=["text_head"])
    run = Trainer(
        get_peft_model(AutoModel.from_pretrained(exported), lora),
        arguments(tmp_path, 5, gradient_checkpointing=True, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=collate,
        processing_class=processor,
    )
    run.train()
    assert all(math.isfinite(loss) for loss in losses_of(run).values())
    assert (tmp_path / "checkpoint-5" / "adapter_model.safetensors").is_file()
    assert math.isfinite(run.evaluate(rows[:6])["eval_loss"])


def test_labels_give_the_cross_entropy_of_labeled_words(exported):
    model, batch = AutoModel.from_pretrained(exported), inputs("pair")
    labels = torch.full((3, 9), -100)
    labels[0, 2], labels[2, 1] = 7, 11
    with torch.no_grad():
        output = model(**batch, labels=labels)
        logits = model(**batch, masked_token_ids=torch.tensor([2, 19])).token_logits
    assert torch.equal(output.token_logits, logits)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, torch.tensor([7, 11])))
    assert model(**batch, labels=torch.full((3, 9), -100)).loss.item() == 0
    assert model(**batch).loss is None


def test_loss_sums_words_and_patches(exported):
    model, batch = AutoModel.from_pretrained(exported), inputs()
    labels = torch.full((3, 9), -100)
    labels[0, 1] = 7
    with torch.no_grad():
        both, patches = model(**batch, labels=labels), model(**batch)
        del batch["masked_token_ids"]
        words = model(**{name: v for name, v in batch.items() if name != "masked_patch_ids"}, labels=labels)
    torch.testing.assert_close(both.loss, words.loss + patches.loss)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_give_the_same_gradients(exported, use_reentrant, every):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModel.from_pretrained(exported).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant}, every_n_layers=every)
            assert model.is_activation_checkpointing
            assert [block.checkpoint is None for block in model.backbone.blocks] == [False, every == 2, False]
        output = model(**inputs())
        (output.loss + output.token_logits.square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        same = gradients[1][name] is None if gradient is None else torch.equal(gradient, gradients[1][name])
        assert same, name
    model.activation_checkpointing_disable()
    assert all(block.checkpoint is None for block in model.backbone.blocks)


def test_activations_are_recomputed(exported):
    model, calls = AutoModel.from_pretrained(exported).train(), []
    model.gradient_checkpointing_enable()
    model.backbone.blocks[1].attention.register_forward_hook(lambda *_: calls.append(1))
    model(**inputs()).loss.backward()
    assert len(calls) == 2


def test_vocabulary_is_resized(exported, tmp_path):
    model = AutoModel.from_pretrained(exported)
    before = outputs(model).token_logits
    assert model.get_input_embeddings() is model.backbone.text_embedding.word
    assert model.get_output_embeddings() is None
    assert model.resize_token_embeddings(300).weight.shape == (300, 32)
    assert (model.config.vocab_size, model.text_head.bias.shape) == (300, (300,))
    torch.testing.assert_close(outputs(model).token_logits[:, :256], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path)).token_logits, outputs(model).token_logits)
    model.resize_token_embeddings(100)
    torch.testing.assert_close(outputs(model).token_logits, before[:, :100])
    assert model.resize_token_embeddings(pad_to_multiple_of=64).weight.shape[0] == 128


def test_new_words_without_the_mean_of_others_are_drawn_like_those_of_a_new_model(exported):
    model = AutoModel.from_pretrained(exported)
    before = model.get_input_embeddings().weight.detach().clone()
    after = model.resize_token_embeddings(1000, mean_resizing=False).weight.detach()
    assert torch.equal(after[:256], before)
    assert after[256:].std().item() == pytest.approx(CONFIG.model.initializer_range, rel=0.05)


def test_new_word_embedding_is_used_for_input_and_output(exported):
    model = AutoModel.from_pretrained(exported)
    word = torch.nn.Embedding(256, 32)
    model.set_input_embeddings(word)
    assert model.get_input_embeddings() is word
    loss = model(**inputs("text"), labels=inputs()["input_ids"]).loss
    loss.backward()
    assert word.weight.grad.abs().sum(dim=1).min() > 0  # words outside the captions learn through the logits


def test_hidden_states_and_tuples(exported):
    model = AutoModel.from_pretrained(exported)
    with torch.no_grad():
        output = model(**inputs(), output_hidden_states=True)
        as_tuple = model(**inputs(), return_dict=False)
        last = model.backbone.norm(output.hidden_states[-1])
    assert len(output.hidden_states) == CONFIG.model.num_hidden_layers + 1
    real = output.attention_mask
    torch.testing.assert_close(last[real], output.last_hidden_state[real])
    assert all(state[~real].eq(0).all() for state in output.hidden_states)
    plain = outputs(model)
    assert len(as_tuple) == len(plain)
    assert all(torch.equal(one, other) for one, other in zip(as_tuple, plain.values(), strict=True))
    model.config.output_hidden_states, model.config.return_dict = True, False
    assert isinstance(outputs(model), tuple)
    assert len(outputs(model)[-1]) == CONFIG.model.num_hidden_layers + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, r"output_attentions \(True\) is not available: .* leave it out"),
        ({"inputs_embeds": torch.zeros(3, 9, 32)}, "inputs_embeds must be None: pass input_ids"),
        ({"labels": torch.zeros(3, 8)}, r"labels \(3, 8\) must have the shape of input_ids \(\(3, 9\)\)"),
        ({"labels": torch.zeros(3, 9)}, r"labels \(torch.float32\) must be int64: pass token ids, and -100 for tokens"),
        ({"labels": torch.ones(3, 9, dtype=torch.bool)}, r"labels \(torch.bool\) must be int64"),
        (
            {"visible_patch_ids": None, "visible_patch_mask": None},
            "masked_patch_ids needs visible_patch_ids, since seen patches are not predicted: pass both",
        ),
        (
            {"attention_mask": inputs()["attention_mask"].flip(1).long()},
            r"attention_mask starts with 0 in row 1: pad on the right \(padding_side='right'\)",
        ),
    ],
)
def test_arguments_that_cannot_be_served_are_refused(exported, arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(exported)(**inputs() | arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_labels_of_any_integer_dtype_give_the_same_loss(exported, dtype):
    model, labels = AutoModel.from_pretrained(exported), inputs()["input_ids"]
    assert torch.equal(
        model(**inputs("text"), labels=labels.to(dtype)).loss, model(**inputs("text"), labels=labels).loss
    )


def test_caption_without_a_token_beside_others_is_no_left_padding(exported):
    batch = inputs("pair")
    batch["attention_mask"][1] = False
    with torch.no_grad():
        assert AutoModel.from_pretrained(exported)(**batch).text_embedding[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_in_a_small_dtype_equals_the_plain_model_in_it(plain, exported, dtype):
    with torch.no_grad():
        expected = load(plain)[0].to(dtype).predict(**inputs())
    model = AutoModel.from_pretrained(exported)
    for small in (model.half() if dtype == torch.float16 else model.bfloat16(), model.to(dtype)):
        assert small.dtype == dtype
        assert torch.equal(outputs(small).pixel_predictions, expected.pixel_predictions)
        assert torch.equal(outputs(small).token_logits, expected.token_logits())
    assert torch.equal(outputs(AutoModel.from_pretrained(exported, dtype=dtype)).token_logits, expected.token_logits())


def test_compiled_model_has_the_same_outputs(exported):
    model = AutoModel.from_pretrained(exported)
    assert torch.equal(outputs(torch.compile(model, backend="eager")).token_logits, outputs(model).token_logits)


ATTRIBUTES = {
    "pad_token_id": 0,
    "bos_token_id": 2,
    "architectures": ["EveModel"],
    "problem_type": "regression",
    "num_labels": 3,
    "my_note": {"data": ["a", "b"]},
    "freeze_encoder": True,
    "hidden_dropout_prob": 0.1,
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_config_keeps_attributes_of_transformers_and_of_users(exported, tmp_path, name):
    for config in (EveConfig(**{name: ATTRIBUTES[name]}), AutoConfig.from_pretrained(exported)):
        setattr(config, name, ATTRIBUTES[name])
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert getattr(again, name) == ATTRIBUTES[name]
        assert again.to_model_config() == config.to_model_config()


def test_setting_of_the_trainer_does_not_prevent_loading(exported, tmp_path):
    model = AutoModel.from_pretrained(exported)
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)
    assert AutoModel.from_pretrained(exported, config=EveConfig.from_pretrained(exported, use_cache=True)) is not None


@pytest.mark.parametrize("name", ["hiden_size", "hidden_sizes", "num_hidden_layer", "vocabsize", "moe_layer"])
def test_misspelled_field_is_not_taken_as_an_own_attribute(name):
    with pytest.raises(ConfigError, match=rf"unknown key .*{name}'; did you mean"):
        EveConfig(**{name: 3})


def test_model_does_not_generate(exported):
    model = AutoModel.from_pretrained(exported)
    assert not model.can_generate()
    with pytest.raises(AttributeError, match="generate"):
        model.generate()
