"""Benchmark harness: arithmetic, files, and equal work of all sides of every measure."""

import csv
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from eve_ds.benchmark import calls, inputs, measures, objectives, peers
from eve_ds.benchmark.harness import COLUMNS, append_results, compare, json_line
from eve_ds.config import load_config
from eve_ds.model.moe import MoE
from eve_ds.objectives.pretraining import pretraining_flops

ROOT = Path(__file__).resolve().parents[2]
MOST_CALLS = 2500
"""Limit of host calls in a step of eve_tiny at ZeRO 1 in bf16."""


def burn(milliseconds):
    end = time.process_time() + milliseconds / 1e3
    while time.process_time() < end:
        pass


def test_sides_alternate_and_memory_is_the_peak_of_one_call():
    order = []

    def side(name, milliseconds, megabytes):
        # Allocated within the timed part, because touching new pages takes milliseconds, and more on a busy machine.
        end = time.process_time() + milliseconds / 1e3
        order.append(name)
        torch.ones(megabytes * 250_000)
        while time.process_time() < end:
            pass

    (row,) = compare("m", torch.float32, "s", partial(side, "a", 25, 40), {"b": partial(side, "b", 75, 120)}, 0.3, True)
    assert order[:4] == ["a", "a", "b", "b"]  # for each side a warm-up call and a measured call of memory
    assert order[4:8] == ["a", "b", "a", "b"]
    assert row.ours_ms == pytest.approx(25, rel=0.2)
    assert row.ratio == pytest.approx(3, rel=0.2)
    assert row.ratio == row.peer_ms / row.ours_ms
    if row.ours_mb is not None:
        assert row.ours_mb == pytest.approx(40, abs=5)
        assert row.peer_mb == pytest.approx(120, abs=5)


def test_rows_are_appended_with_provenance(tmp_path):
    rows = compare("m", torch.bfloat16, "T=1", partial(burn, 1), {"p": partial(burn, 1), "q": partial(burn, 1)}, 0.01)
    append_results(rows, tmp_path / "bench" / "results.csv")
    append_results(rows, tmp_path / "bench" / "results.csv")
    with (tmp_path / "bench" / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS
    assert [row["peer"] for row in found] == ["p", "q", "p", "q"]
    assert {row["torch"] for row in found} == {torch.__version__}
    assert all(row["device"] and row["date"] and row["commit"] for row in found)
    line = json.loads(json_line(rows[0]))
    assert list(line) == ["measure", "dtype", "shape", "peer", "ours_ms", "peer_ms", "ratio", "ours_mb", "peer_mb"]
    assert line["dtype"] == "bfloat16"


@pytest.mark.parametrize("before", ["build", None])
def test_the_choice_of_ops_is_restored_after_an_error(monkeypatch, before):
    if before is None:
        monkeypatch.delenv("EVE_DS_OPS", raising=False)
    else:
        monkeypatch.setenv("EVE_DS_OPS", before)
    with inputs.reference_ops():
        assert os.environ["EVE_DS_OPS"] == "reference"
    with pytest.raises(ZeroDivisionError), inputs.reference_ops():
        1 / 0  # noqa: B018
    assert os.environ.get("EVE_DS_OPS") == before


def outputs_of_both_layers(rank, world_size):
    torch.manual_seed(0)
    config = tiny_model()
    layer = MoE(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        layer.router.modality_embedding.zero_()
        x, modality = torch.randn(40, config.hidden_size), torch.randint(0, 2, (40,))
        outputs = layer(x, modality), peers.StockMoE(layer, capacity_factor=8.0)(x, modality)
    return [(output.hidden_states, output.load_balancing_loss) for output in outputs]


def test_stock_layer_and_our_layer_compute_the_same(run_ranks):
    """The comparison requires equal work; here capacity suffices for all tokens, and modality embeddings are zero."""
    ((ours, stock),) = run_ranks(outputs_of_both_layers, 1)
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)


def losses_of_both_implementations(rank, world_size):
    config = measures.load_config("eve_tiny", ["model.text_length=12", "model.moe.capacity_factor=8.0"])
    both = measures.BothForms(config, 3)
    with torch.no_grad():
        for _, ours, _ in both.layers:
            ours.router.modality_embedding.zero_()
    found = []

    def keep(terms, weights):
        found.append({name: term.detach() for name, term in terms.items()})
        return terms["mim"] * 0

    inputs.weighted_sum = keep
    for optimizer in both.optimizers:
        optimizer.step = lambda: None
    both.step(stock=False)
    both.step(stock=True)
    return found


def test_both_implementations_of_a_step_have_the_same_loss_without_padding_and_drops(run_ranks):
    ((packed, stock),) = run_ranks(losses_of_both_implementations, 1)
    for name in ("mim", "mlm", "load_balancing"):
        torch.testing.assert_close(packed[name], stock[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [("_our_routing", "_stock_routing")])
def test_both_sides_of_routing_have_the_same_gradients(ours, theirs, monkeypatch):
    monkeypatch.setattr(measures, "WIDTH", 16)
    inputs = measures._routing_inputs(torch.float32, 64)
    grads = []
    monkeypatch.setattr(
        measures,
        "_backward",
        lambda out, balance, inputs: grads.append(
            torch.autograd.grad([out, balance], [inputs["x"], inputs["embedding"]], [inputs["upstream"], None])
        ),
    )
    measures._our_routing(inputs, 64, True)
    measures._stock_routing(inputs, peers.StockRouting(capacity_factor=16.0), True)
    for mine, stock in zip(*grads, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-4)


def test_all_variants_of_objectives_are_compared_and_their_operations_counted():
    config = load_config("eve_tiny")
    rows = objectives.compare_objectives(config, 2, 0.0)
    assert [(row.measure, row.peer) for row in rows] == [
        (f"{ours}, eve_tiny", peer) for ours in objectives.OURS for peer in objectives.PEERS
    ]

    def expected(side):
        # A step costs three forward passes, minus the gradient of the pixels; padding costs attention here.
        model = config.model.model_copy(update={"objectives": side.objectives})
        return 3 * pretraining_flops(model, side.masking, inputs.REAL_TOKENS) / 1e9 * 2

    for row in rows:
        assert row.ours_gflop == pytest.approx(expected(objectives.OURS[row.measure.rpartition(",")[0]]), rel=0.07)
        assert row.peer_gflop == pytest.approx(expected(objectives.PEERS[row.peer]), rel=0.07)
        assert row.ours_mb > 0
        assert json.loads(json_line(row))["ours_gflop"] == pytest.approx(row.ours_gflop, rel=1e-3)
    full = next(row for row in rows if row.peer == "mlm + itc + itm + mim")
    assert full.ratio > 2
    assert full.peer_mb > full.ours_mb


def test_variants_share_the_backbone_and_each_step_trains_all_parameters_of_its_variant():
    sides = objectives.Objectives(load_config("eve_tiny"), 2)
    models = list(sides.models.values())
    assert len({id(model.backbone) for model in models}) == 1
    for name, model in sides.models.items():
        before = {key: value.clone() for key, value in model.state_dict().items()}
        sides.step(name)
        unchanged = [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
        assert unchanged == [], name


def calls_of_both_engines(rank, world_size):
    rows = calls.compare_calls(calls.step_config("eve_tiny", calls.BATCH), 0.0)
    return [(row.measure, row.dtype, row.ours_calls, row.peer_calls, row.ours_ms, json_line(row)) for row in rows]


def test_a_step_at_zero_1_makes_few_host_calls(run_ranks):
    (rows,) = run_ranks(calls_of_both_engines, 1)
    assert [measure.rpartition(", ")[2] for measure, *_ in rows] == ["forward", "backward", "step", "whole"]
    assert {dtype for _, dtype, *_ in rows} == {"bfloat16"}
    (forward, backward, step, whole), (*of_parts, of_whole) = ([row[side] for row in rows] for side in (2, 3))
    assert whole == forward + backward + step
    assert whole < MOST_CALLS
    assert step < 150, "the number of calls of the update must not grow with the number of parameters"
    assert of_parts[0] == forward, "both engines run the same model"
    assert of_whole == sum(of_parts) > 2 * whole
    assert all(milliseconds > 0 for *_, milliseconds, _ in rows)
    assert json.loads(rows[-1][-1])["ours_calls"] == whole


@pytest.mark.timeout(240)
def test_command_runs_quickly_and_prints_json(tmp_path):
    results = tmp_path / "results.csv"
    command = [sys.executable, "launcher/benchmark.py", "routing", "data", "--quick", "--json", "--results", results]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {row["measure"] for row in rows} >= {"routing", "routing with router", "data"}
    compared = [row for row in rows if "peer" in row]
    assert {row["peer"] for row in compared} >= {"deepspeed", "torch", "webdataset", "earlier versions"}
    assert len(results.read_text().splitlines()) == len(compared) + 1
    about = {row["what"]: row for row in rows if "peer" not in row}
    assert about["simplejpeg, resized by torch"]["images_s"] > about["Pillow, resized by Pillow"]["images_s"]
    assert about["simplejpeg, resized by torch"]["mean"] == about["Pillow, resized by torch"]["mean"] < 0.02
    assert about["shorter side 256"]["gradient_energy_0.2"] < about["shorter side 256"]["gradient_energy_0.6"] < 1
    worker = about["simplejpeg"]
    assert worker["pixel_bytes"] == pytest.approx(3 * 224 * 224, rel=1e-3)
    assert worker["pixel_bytes_as_floats"] == pytest.approx(4 * worker["pixel_bytes"], rel=1e-3)
    assert min(worker["pss_mb"], worker["first_batch_s"], worker["first_batch_resumed_s"]) > 0
    assert "absent: tutel for routing" in done.stderr
