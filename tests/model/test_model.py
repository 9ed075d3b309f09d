"""Plain model: sizes, kinds of batch, inputs that may and may not influence an output, initialization."""

import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch.nn.attention import varlen

from eve_ds.config import MoEConfig, load_config
from eve_ds.model import attention as attention_module
from eve_ds.model.attention import CrossAttention, SelfAttention
from eve_ds.model.decoders import PixelDecoder, TextHead
from eve_ds.model.eve import EVE, Block
from eve_ds.model.stream import join
from eve_ds.views import Layout, Packing

SMALL = tiny_model(
    objectives=["joint"],  # a single view; test_views.py covers the views of the other objectives
    image_size=32,
    vocab_size=61,
    text_positions=12,
    text_length=10,
    initializer_range=0.2,  # large, so that every part of the model affects its output
    position_initializer_range=0.5,
    pixel_decoder={"num_layers": 2},
)
SELF = SMALL.pixel_decoder.model_copy(update={"kind": "self"})
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}
"""Tolerance for values of order 1 after three fp32 layers, summed in another order."""


def small_model(**changes):
    torch.manual_seed(0)
    return EVE(SMALL.model_copy(update=changes)).eval()


def pair_batch(batch=3, length=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.stack([torch.randperm(16, generator=generator) for _ in range(batch)])
    lengths = torch.tensor([length - index % 3 for index in range(batch)])
    mask = torch.arange(length) < lengths[:, None]
    positions = torch.tensor([row * length + column for row in range(batch) for column in (1, 3)])
    return {
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "visible_patch_ids": patches[:, :4].sort().values,
        "masked_patch_ids": patches[:, 4:].sort().values,
        "input_ids": torch.randint(5, 61, (batch, length), generator=generator) * mask,
        "attention_mask": mask,
        "masked_token_ids": positions,
    }


def only(batch, *names):
    return {name: batch[name] for name in names}


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_base_backbone_has_the_released_number_of_parameters():
    with torch.device("meta"):
        model = EVE(load_config("eve_base").model)
    counts = {name: parameter.numel() for name, parameter in model.backbone.named_parameters()}
    assert sum(counts.values()) == 475_197_696
    assert sum(count for name, count in counts.items() if ".experts." in name) == 302_235_648


@pytest.mark.parametrize(
    ("preset", "layers", "width"), [("eve_tiny", 4, 128), ("eve_base", 12, 768), ("eve_large", 24, 1024)]
)
def test_presets_build_on_meta(preset, layers, width):
    with torch.device("meta"):
        model = EVE(load_config(preset).model)
    assert len(model.backbone.blocks) == layers
    assert model.backbone.norm.weight.shape == (width,)
    assert all(parameter.is_meta for parameter in model.parameters())


# --- kinds of batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_pair_image_and_text_batches_have_the_expected_outputs(decoder):
    model = small_model(pixel_decoder=SMALL.pixel_decoder.model_copy(update={"kind": decoder}))
    batch = pair_batch()
    pair = model(**batch)
    assert pair.pixel_predictions.shape == (3, 12, 192)
    assert pair.token_logits().shape == (6, 61)
    image = model(**only(batch, "pixel_values", "visible_patch_ids", "masked_patch_ids"))
    assert image.pixel_predictions.shape == (3, 12, 192)
    assert image.token_hidden is None
    text = model(**only(batch, "input_ids", "attention_mask", "masked_token_ids"))
    assert text.token_logits().shape == (6, 61)
    assert text.pixel_predictions is None
    assert not torch.allclose(image.pixel_predictions, pair.pixel_predictions, atol=1e-3), "text must affect pixels"
    assert not torch.allclose(text.token_hidden, pair.token_hidden, atol=1e-3), "the image must affect words"
    with pytest.raises(ValueError, match="no token logits"):
        image.token_logits()


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_mixed_batch_gives_the_same_outputs_as_single_samples(decoder):
    model = small_model(pixel_decoder=SMALL.pixel_decoder.model_copy(update={"kind": decoder}))
    batch = pair_batch()
    batch["image_mask"] = torch.tensor([True, False, True])
    batch["pixel_values"] = batch["pixel_values"] * batch["image_mask"][:, None, None, None]
    batch["attention_mask"] = batch["attention_mask"] & torch.tensor([True, True, False])[:, None]
    batch["masked_token_ids"] = batch["masked_token_ids"][:4]  # the sample without a caption has none
    mixed = model(**batch)
    names = ("pixel_values", "visible_patch_ids", "masked_patch_ids", "input_ids", "attention_mask")
    pair = model(**{name: batch[name][:1] for name in names}, masked_token_ids=torch.tensor([1, 3]))
    text = model(
        input_ids=batch["input_ids"][1:2],
        attention_mask=batch["attention_mask"][1:2],
        masked_token_ids=torch.tensor([1, 3]),
    )
    image = model(**{name: batch[name][2:] for name in names[:3]})
    torch.testing.assert_close(mixed.pixel_predictions[:1], pair.pixel_predictions, **ROUNDING)
    torch.testing.assert_close(mixed.token_hidden[:2], pair.token_hidden, **ROUNDING)
    torch.testing.assert_close(mixed.token_hidden[2:4], text.token_hidden, **ROUNDING)
    torch.testing.assert_close(mixed.pixel_predictions[2:], image.pixel_predictions, **ROUNDING)


def test_no_masked_token_gives_empty_outputs_and_an_empty_batch_is_refused():
    model = small_model()
    batch = pair_batch() | {"masked_token_ids": torch.empty(0, dtype=torch.int64)}
    assert model(**batch).token_hidden.shape == (0, 32)
    with pytest.raises(ValueError, match="a batch needs pixel_values or input_ids; both are None"):
        model()


def test_text_longer_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match=r"text of 13 tokens exceeds text_positions \(12\)"):
        small_model()(input_ids=torch.ones(1, 13, dtype=torch.int64))


# --- influence of inputs on outputs -----------------------------------------------------------------------------------


def test_masked_patches_never_reach_the_encoder():
    model = small_model()
    batch = pair_batch()
    before = model(**batch)
    patches = torch.zeros(3, 16, dtype=torch.bool).scatter(1, batch["masked_patch_ids"], True)
    hidden = patches.view(3, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    changed = batch | {"pixel_values": torch.where(hidden, torch.full((), 1e4), batch["pixel_values"])}
    after = model(**changed)
    assert torch.equal(after.pixel_predictions, before.pixel_predictions)
    assert torch.equal(after.token_hidden, before.token_hidden)
    row, patch = 1, int(batch["visible_patch_ids"][1, 2])
    changed["pixel_values"][row, 0, 8 * (patch // 4), 8 * (patch % 4)] += 1.0
    touched = (model(**changed).pixel_predictions != before.pixel_predictions).flatten(1).any(dim=1)
    assert touched.tolist() == [False, True, False], "one pixel of a visible patch changes its sample and no other"


def test_visible_patches_keep_their_positions():
    model = small_model()
    batch = pair_batch()
    before = model.backbone(**only(batch, "pixel_values", "visible_patch_ids")).stream.padded()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = batch | {"visible_patch_ids": batch["visible_patch_ids"][:, order]}
    after = model.backbone(**only(shuffled, "pixel_values", "visible_patch_ids")).stream.padded()
    torch.testing.assert_close(after[:, 1:], before[:, 1:][:, order], **ROUNDING)
    torch.testing.assert_close(after[:, 0], before[:, 0], **ROUNDING)
    everything = torch.arange(16).expand(3, -1)
    whole = model.backbone(pixel_values=batch["pixel_values"]).stream.padded()
    listed = model.backbone(pixel_values=batch["pixel_values"], visible_patch_ids=everything).stream.padded()
    torch.testing.assert_close(listed, whole, **ROUNDING)


@pytest.mark.parametrize("decoder", [SMALL.pixel_decoder, SELF], ids=["cross", "self"])
def test_patch_hidden_by_mask_equals_removed_patch(decoder):
    model = small_model(pixel_decoder=decoder).eval()
    batch = pair_batch()
    visible = batch["visible_patch_ids"]
    mask = torch.ones_like(visible, dtype=torch.bool)
    mask[:, 1] = False
    hidden = model(**batch, visible_patch_mask=mask)
    removed = model(**{**batch, "visible_patch_ids": visible[:, [0, *range(2, visible.shape[1])]]})
    torch.testing.assert_close(hidden.pixel_predictions, removed.pixel_predictions, **ROUNDING)
    torch.testing.assert_close(hidden.token_logits(), removed.token_logits(), **ROUNDING)
    assert not torch.allclose(hidden.pixel_predictions, model(**batch).pixel_predictions, **ROUNDING)


def test_patch_projection_equals_convolution():
    embedding = small_model().backbone.image_embedding
    pixel_values = pair_batch()["pixel_values"]
    expected = embedding.projection(pixel_values).flatten(2).transpose(1, 2)
    patches = embedding(pixel_values)[:, 1:] - embedding.position[1:] - embedding.modality
    torch.testing.assert_close(patches, expected, **ROUNDING)


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_padding_does_not_change_outputs(decoder):
    model = small_model(pixel_decoder=SMALL.pixel_decoder.model_copy(update={"kind": decoder}))
    batch = pair_batch()
    before = model(**batch)
    rows, columns = batch["masked_token_ids"] // 7, batch["masked_token_ids"] % 7
    padded = batch | {
        "input_ids": F.pad(batch["input_ids"], (0, 4), value=9),
        "attention_mask": F.pad(batch["attention_mask"], (0, 4), value=False),
        "masked_token_ids": rows * 11 + columns,
    }
    after = model(**padded)
    torch.testing.assert_close(after.pixel_predictions, before.pixel_predictions, **ROUNDING)
    torch.testing.assert_close(after.token_hidden, before.token_hidden, **ROUNDING)
    for ours, theirs in zip(after.moe["joint"], before.moe["joint"], strict=True):
        torch.testing.assert_close(ours.load_balancing_loss, theirs.load_balancing_loss)
        torch.testing.assert_close(ours.router_z_sum, theirs.router_z_sum)
        assert torch.equal(ours.statistics.routes, theirs.statistics.routes)


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_evaluation_of_a_sample_does_not_depend_on_its_batch(routing):
    moe = MoEConfig(
        num_experts=4, routing=routing, min_capacity=1, capacity_factor=0.5, router_jitter=0.5, second_choice_noise=True
    )
    model = small_model(moe=moe, drop_path_rate=0.5, text_dropout=0.5)
    batch = pair_batch()
    together = model(**batch)
    assert torch.equal(model(**batch).pixel_predictions, together.pixel_predictions), "must be deterministic"
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in batch.items() if name != "masked_token_ids"}
        output = model(**alone, masked_token_ids=torch.tensor([1, 3]))
        torch.testing.assert_close(output.pixel_predictions, together.pixel_predictions[row : row + 1], **ROUNDING)
        torch.testing.assert_close(output.token_hidden, together.token_hidden[2 * row : 2 * row + 2], **ROUNDING)


# --- activation checkpointing, drop path, compilation -----------------------------------------------------------------


def losses_and_gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**batch)
    balance = torch.stack([layer.load_balancing_loss for layer in output.moe["joint"]])
    loss = output.pixel_predictions.square().mean() + output.token_hidden.square().mean() + balance.mean()
    loss.backward()
    return (
        loss.detach(),
        balance.detach(),
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    )


def test_activation_checkpointing_does_not_change_results():
    moe = MoEConfig(num_experts=4, router_jitter=0.3, second_choice_noise=True)
    model = small_model(moe=moe, drop_path_rate=0.4, text_dropout=0.3).train()
    batch = pair_batch()
    loss, balance, gradients = losses_and_gradients(model, batch)
    calls = []
    model.backbone.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model.backbone.checkpoint_blocks()
    loss_again, balance_again, gradients_again = losses_and_gradients(model, batch)
    assert len(calls) == 2, "the block must run once more in the backward"
    assert torch.equal(loss, loss_again)
    assert torch.equal(balance, balance_again)
    assert len(balance_again) == 2, "one load-balancing loss per layer, even if the layer runs twice"
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    config = SMALL.model_copy(update={"drop_path_rate": 0.4, "num_hidden_layers": 3})
    blocks = EVE(config).backbone.blocks
    assert [block.drop_path_rate for block in blocks] == pytest.approx([0.0, 0.2, 0.4])
    torch.manual_seed(0)
    packing = Packing.of([Layout.of(torch.tensor([[True, True, False]]).expand(20_000, -1))] * 2)
    kept = blocks[2].train().draw_kept(packing, torch.float32)
    per_sample = kept.view(2, 40_000, 2)
    assert (per_sample == per_sample[..., :1]).all(), "a sample must be dropped as a whole"
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6])
    # Four standard deviations of a mean over 20,000 draws with variance 0.4 / 0.6.
    means = per_sample.view(4, 20_000, 2).mean(dim=(1, 2))  # attention and feed-forward of both views
    assert means.tolist() == pytest.approx([1.0] * 4, abs=4 * math.sqrt(0.4 / 0.6 / 20_000))
    assert blocks[2].eval().draw_kept(packing, torch.float32) is None
    assert blocks[0].train().draw_kept(packing, torch.float32) is None


def test_dropped_branch_adds_zero_and_kept_branch_is_scaled():
    block = randomize(EVE(SMALL).backbone.blocks[0].double())
    mask = key_mask()
    x = torch.randn(int(mask.sum()), 32, dtype=torch.float64)
    packing = Packing.of([Layout.of(mask, 2)])
    nothing, twice = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 2.0).double()
    assert torch.equal(block(x, packing, torch.stack([nothing, nothing]))[0], x)
    attended = x + block.gamma_1 * block.attention(block.norm1(x), packing.layouts)
    expected = attended + 2 * block.gamma_2 * block.ffn(attended, packing)
    torch.testing.assert_close(block(x, packing, torch.stack([nothing + 1, twice]))[0], expected)
    torch.testing.assert_close(block(x, packing, torch.stack([twice, nothing]))[0], 2 * attended - x)


INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        shutil.which("g++") is None or "EVE_DS_SLOW_TESTS" not in os.environ,
        reason="minutes of C++ compilation: set EVE_DS_SLOW_TESTS, and have g++",
    ),
)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.timeout(900)
def test_compiled_model_gives_the_same_results(backend):
    model = small_model(num_hidden_layers=2, moe_layers=[1]).train()
    batch = pair_batch()
    loss, balance, gradients = losses_and_gradients(model, batch)
    compiled = torch.compile(model, backend=backend)
    loss_again, balance_again, gradients_again = losses_and_gradients(compiled, batch)
    torch.testing.assert_close(loss_again, loss, **ROUNDING)
    torch.testing.assert_close(balance_again, balance, **ROUNDING)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[f"_orig_mod.{name}"], gradient, **ROUNDING)


def test_packed_and_padded_tokens_give_the_same_results():
    """Padding kept as tokens that attention ignores gives the same as packing, in training mode, with all gradients."""
    for kind in ("cross", "self"):
        decoder = SMALL.pixel_decoder.model_copy(update={"kind": kind})
        results = []
        for keep_padding in (False, True):
            model = small_model(pixel_decoder=decoder).train()
            model.backbone.keep_padding = keep_padding
            results.append(losses_and_gradients(model, pair_batch()))
        (loss, balance, gradients), (padded_loss, padded_balance, padded_gradients) = results
        torch.testing.assert_close(loss, padded_loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(balance, padded_balance, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, padded_gradients[name], rtol=1e-5, atol=1e-5)


# --- parts against loops in fp64 --------------------------------------------------------------------------------------


def attention_by_loops(q, k, v, num_heads, key_mask):
    """(B, N, D), (B, S, D), (B, S, D), (B, S) -> (B, N, D), one query at a time."""
    out = torch.zeros_like(q)
    width = q.shape[-1] // num_heads
    for b in range(q.shape[0]):
        keys = [s for s in range(k.shape[1]) if key_mask[b, s]]
        for head in range(num_heads):
            part = slice(head * width, (head + 1) * width)
            for n in range(q.shape[1]):
                scores = [float(q[b, n, part] @ k[b, s, part]) / math.sqrt(width) for s in keys]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                for weight, s in zip(weights, keys, strict=True):
                    out[b, n, part] += weight / sum(weights) * v[b, s, part]
    return out


def randomize(module, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module.double().eval()


def key_mask():
    return torch.tensor([[True, True, False, True, True], [True, False, False, True, False]])


def test_self_attention_equals_a_softmax_loop():
    attention = randomize(SelfAttention(12, 3).double())
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weight = attention.qkv.weight
    q, k, v = x @ weight[:12].T + attention.q_bias, x @ weight[12:24].T, x @ weight[24:].T + attention.v_bias
    mixed = attention_by_loops(q.detach(), k.detach(), v.detach(), 3, key_mask())
    expected = mixed @ attention.proj.weight.T + attention.proj.bias
    mask = key_mask()
    torch.testing.assert_close(attention(x[mask], [Layout.of(mask)]), expected[mask])
    kept = attention(x.flatten(0, 1), [Layout.of(mask, keep_padding=True)])
    torch.testing.assert_close(kept, expected.flatten(0, 1))


def varlen_by_loops(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
    """Loop version of `torch.nn.attention.varlen.varlen_attn`, which needs a GPU: (N, heads, D / heads) -> same."""
    out = torch.zeros_like(q)
    for sample in range(len(cu_seq_q) - 1):
        queries, keys = (slice(*ends[sample : sample + 2].tolist()) for ends in (cu_seq_q, cu_seq_k))
        assert queries.stop - queries.start <= max_q
        assert keys.stop - keys.start <= max_k
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) / math.sqrt(q.shape[-1])
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v[keys])
    return out


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_over_packed_tokens_equals_attention_over_padded_tokens(kind, monkeypatch):
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    layout = Layout.of(mask, 2)
    generator = torch.Generator().manual_seed(4)
    results = []
    for packed in (False, True):
        monkeypatch.setattr(attention_module, "_takes_packed", lambda *_, packed=packed: packed)
        monkeypatch.setattr(varlen, "varlen_attn", varlen_by_loops)
        generator.manual_seed(4)
        tokens = torch.randn(layout.num_tokens, 24, dtype=torch.float64, generator=generator).requires_grad_()
        queries = torch.randn(4, 3, 24, dtype=torch.float64, generator=generator).requires_grad_()
        if kind == "self":
            module = randomize(SelfAttention(24, 3).double())
            out = module(tokens, [layout])
        else:
            module = randomize(CrossAttention(24, 24, 3).double())
            out = module(queries, tokens, layout)
        out.sin().sum().backward()
        results.append([out, tokens.grad, queries.grad if kind == "cross" else None, module.proj.weight.grad])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-12)


def test_packed_attention_is_used_on_a_gpu_if_there_is_padding():
    ragged, whole = Layout.of(key_mask()), Layout.of(torch.ones(2, 5, dtype=torch.bool))
    kept = Layout.of(key_mask(), keep_padding=True)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert attention_module._takes_packed(on_gpu, 64, ragged)
    for tokens, head_size, layout in (
        *((on_gpu, 64, whole), (on_gpu, 64, kept), (on_gpu, 12, ragged), (on_gpu, 512, ragged)),
        (SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16), 64, ragged),
        (SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32), 64, ragged),
    ):
        assert not attention_module._takes_packed(tokens, head_size, layout)


def cross_by_loops(attention, x, memory, mask, num_heads, width):
    q = x @ attention.query.weight.T + attention.query.bias
    kv = memory @ attention.key_value.weight.T + attention.key_value.bias
    mixed = attention_by_loops(q.detach(), kv[..., :width].detach(), kv[..., width:].detach(), num_heads, mask)
    return mixed @ attention.proj.weight.T + attention.proj.bias


def test_cross_attention_equals_a_softmax_loop():
    attention = randomize(CrossAttention(12, 7, 3).double())
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 4, 12, dtype=torch.float64, generator=generator)
    memory = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    expected = cross_by_loops(attention, x, memory, key_mask(), 3, 12)
    mask = key_mask()
    torch.testing.assert_close(attention(x, memory[mask], Layout.of(mask)), expected)


def layer_norm_by_hand(x, norm):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def ffn_by_hand(x, ffn):
    h = x @ ffn.fc1.weight.T + ffn.fc1.bias
    return (h / (1 + torch.exp(-1.702 * h))) @ ffn.fc2.weight.T + ffn.fc2.bias


def self_by_loops(attention, x, mask, num_heads):
    width = x.shape[-1]
    q, k, v = (x @ part.T for part in attention.qkv.weight.split(width))
    q, v = q + attention.q_bias, v + attention.v_bias
    mixed = attention_by_loops(q.detach(), k.detach(), v.detach(), num_heads, mask)
    return mixed @ attention.proj.weight.T + attention.proj.bias


def decoder_inputs():
    """Stream, the same tokens by sample with their mask, visible and masked patches."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 8, 32, dtype=torch.float64, generator=generator)  # class token, 4 patches, 3 words
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 6:] = False
    visible = torch.tensor([[0, 3, 7, 9], [1, 2, 14, 15]])
    masked = torch.tensor([[1, 5], [0, 8]])
    return join(hidden[:, :5], hidden[:, 5:], Layout.of(mask, 5)), hidden, mask, visible, masked


def test_cross_decoder_equals_loops():
    decoder = randomize(PixelDecoder(SMALL).double())
    stream, hidden, mask, visible, masked = decoder_inputs()
    x = decoder.mask_token + decoder.position[masked]
    memory = layer_norm_by_hand(hidden, decoder.memory_norm)
    for block in decoder.blocks:
        read = cross_by_loops(block.attention, layer_norm_by_hand(x, block.norm1), memory, mask, 4, 24)
        x = x + read
        x = x + ffn_by_hand(layer_norm_by_hand(x, block.norm2), block.ffn)
    expected = layer_norm_by_hand(x, decoder.norm) @ decoder.pixels.weight.T + decoder.pixels.bias
    torch.testing.assert_close(decoder(stream, visible, masked), expected)
    one = decoder(stream, visible, masked[:, :1])
    torch.testing.assert_close(one, expected[:, :1], msg="mask tokens must not see each other")


def test_self_decoder_equals_loops():
    decoder = randomize(PixelDecoder(SMALL.model_copy(update={"pixel_decoder": SELF})).double())
    stream, hidden, mask, visible, masked = decoder_inputs()
    memory = layer_norm_by_hand(hidden, decoder.memory_norm) @ decoder.memory.weight.T + decoder.memory.bias
    for row in range(2):
        for place, patch in enumerate(visible[row]):
            memory[row, 1 + place] += decoder.position[patch]
    x = torch.cat([memory, decoder.mask_token + decoder.position[masked]], dim=1)  # unlike the decoder's token order
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.bool)], dim=1)
    for block in decoder.blocks:
        x = x + self_by_loops(block.attention, layer_norm_by_hand(x, block.norm1), mask, 4)
        x = x + ffn_by_hand(layer_norm_by_hand(x, block.norm2), block.ffn)
    expected = layer_norm_by_hand(x[:, -2:], decoder.norm) @ decoder.pixels.weight.T + decoder.pixels.bias
    torch.testing.assert_close(decoder(stream, visible, masked), expected)


def test_text_head_is_dense_gelu_norm_and_tied_to_the_word_embedding():
    head = randomize(TextHead(SMALL).double())
    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    h = x @ head.dense.weight.T + head.dense.bias
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    torch.testing.assert_close(head(x), layer_norm_by_hand(h, head.norm))
    model = small_model()
    output = model(**pair_batch())
    assert output.vocabulary.weight is model.backbone.text_embedding.word.weight
    expected = output.token_hidden @ model.backbone.text_embedding.word.weight.T + model.text_head.bias
    torch.testing.assert_close(output.token_logits(), expected)


def test_shallow_block_equals_formula():
    block = randomize(Block(SMALL.model_copy(update={"moe_layers": []}), 0, None).double())
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    mask = key_mask()  # two image tokens, three words
    (out,) = block(x[mask], Packing.of([Layout.of(mask, 2)]))  # no MoE
    h = x + block.gamma_1 * self_by_loops(block.attention, layer_norm_by_hand(x, block.norm1), key_mask(), 4)
    image = ffn_by_hand(layer_norm_by_hand(h[:, :2], block.ffn.norm_image), block.ffn.image)
    text = ffn_by_hand(layer_norm_by_hand(h[:, 2:], block.ffn.norm_text), block.ffn.text)
    torch.testing.assert_close(out, (h + block.gamma_2 * torch.cat([image, text], dim=1))[mask])


# --- initialization ---------------------------------------------------------------------------------------------------

TRUNCATED_STD = math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))
"""Standard deviation of a standard normal truncated at -1 and 1: sqrt(1 - 2 phi(1) / (2 Phi(1) - 1)) = 0.5396."""


def test_initial_weights_are_truncated_normals_and_experts_differ():
    torch.manual_seed(1)
    config = SMALL.model_copy(
        update={"initializer_range": 0.02, "position_initializer_range": 0.1, "layer_scale_init": 0.3}
    )
    model = EVE(config)
    assert pytest.approx(0.5396, abs=1e-4) == TRUNCATED_STD
    for name, parameter in model.named_parameters():
        value, kind = parameter.detach(), name.rpartition(".")[2]
        if "gamma" in kind:
            assert (value == 0.3).all(), name
        elif kind.endswith("bias"):
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            std = 0.1 if kind in ("position", "class_token", "mask_token") else 0.02
            assert value.abs().max() <= std, name
            # The standard deviation of n draws has a relative error of about 1 / sqrt(2 n).
            tolerance = 5 / math.sqrt(2 * value.numel())
            assert float(value.std()) == pytest.approx(std * TRUNCATED_STD, rel=tolerance), name
    experts = model.backbone.blocks[1].moe.experts
    weights = [*experts.fc1_weight, model.backbone.blocks[2].moe.experts.fc1_weight[0]]
    for first, one in enumerate(weights):
        assert all(not torch.equal(one, other) for other in weights[first + 1 :])


def test_seed_determines_the_initial_weights():
    def draw(seed):
        torch.manual_seed(seed)
        return EVE(SMALL).state_dict()

    one, again, other = draw(5), draw(5), draw(6)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(
        one["backbone.blocks.0.attention.qkv.weight"], other["backbone.blocks.0.attention.qkv.weight"]
    )


def test_sincos_positions_equal_loops():
    model = small_model(position_init="sincos")
    for position, width in ((model.backbone.image_embedding.position, 32), (model.pixel_decoder.position, 24)):
        rows = position[-16:]
        pairs = width // 4
        for patch in range(16):
            for axis, place in enumerate(divmod(patch, 4)):
                for k in range(pairs):
                    angle = 2 * math.pi * place / (4 * 4 ** (k / (pairs - 1)))  # wavelengths from 4 to 16
                    column = axis * width // 2 + k
                    assert rows[patch, column].item() == pytest.approx(0.5 * math.sin(angle), abs=1e-6)
                    assert rows[patch, column + pairs].item() == pytest.approx(0.5 * math.cos(angle), abs=1e-6)
    assert not model.backbone.image_embedding.position[0].any()
    text = model.backbone.text_embedding.position
    for place in range(12):
        for k in range(16):
            angle = place / 100 ** (k / 15)
            assert text[place, k].item() == pytest.approx(0.5 * math.sin(angle), abs=1e-6)
            assert text[place, k + 16].item() == pytest.approx(0.5 * math.cos(angle), abs=1e-6)
