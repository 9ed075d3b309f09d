"""Reports: records of a run, contents of figures, tables, and the files of a complete report."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config
from torch import nn

from eve_ds import ops
from eve_ds.cli.report import main
from eve_ds.config import load_config
from eve_ds.data.batch import Sample
from eve_ds.data.collate import Collator
from eve_ds.data.importers import GeneratedScenes
from eve_ds.data.shard_writer import WriterOptions, write_shards
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.evaluation.scenes import evaluation_config
from eve_ds.model.eve import EVE
from eve_ds.objectives.registry import OBJECTIVES
from eve_ds.report.curves import running_mean
from eve_ds.report.experts import expert_use, shares
from eve_ds.report.reconstruction import (
    MASKED_GRAY,
    Example,
    Word,
    note_on,
    plot_reconstructions,
    reconstruct,
    unpatchify,
)
from eve_ds.report.records import ReportError, column, read_records, throughput, with_current_names
from eve_ds.report.run_report import Exported, write_report
from eve_ds.report.tables import Table, evaluation_tables, loss_table, percent_lower, seeds_table
from eve_ds.training.metrics import MetricsWriter
from eve_ds.views import IMAGE, TEXT

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = {
    **{name: {"right": 0.75, "wrong": 0.25} for name in ("color", "shape", "size", "position")},
    "hidden_words": {"right": 0.8, "wrong": 0.3},
    "masked_image": {name: {"right": 0.65, "wrong": 0.25} for name in ("color", "shape", "size", "position")},
    "pixel_loss": {"right": 0.18, "wrong": 0.2},
    "binding": {
        name: {"target": 0.5, "distractor": 0.25}
        for name in ("position_to_color", "position_to_shape", "color_to_shape", "shape_to_color")
    },
}


def record(kind, step, **numbers):
    return {"kind": kind, "step": step, "seconds": step / 2, "samples": 8 * step, **numbers}


def write_records(folder, records, end="\n"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + end)
    return folder


# ------------------------------------------------------------------------------------------------------- records


def test_records_of_a_resumed_run_form_one_history(tmp_path):
    before = [record("train", step, loss=1.0) for step in (10, 20, 30)] + [record("eval", 30), record("train", 40)]
    after = [record("train", step, loss=0.5) for step in (30, 40, 50)] + [record("eval", 50)]
    history = read_records(write_records(tmp_path, before + after))
    assert [(item["kind"], item["step"]) for item in history] == [
        *[("train", step) for step in (10, 20, 30, 40, 50)],
        ("eval", 50),
    ]
    assert [item["loss"] for item in history[:5]] == [1.0, 1.0, 0.5, 0.5, 0.5]


def test_all_records_of_one_step_are_kept(tmp_path):
    records = [record("event", 5, message="a"), record("event", 5, message="b"), record("train", 5), record("eval", 5)]
    assert read_records(write_records(tmp_path, records)) == records


def test_incomplete_last_line_is_ignored(tmp_path):
    write_records(tmp_path, [record("train", 1), record("train", 2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert [item["step"] for item in read_records(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "metrics.jsonl does not exist: .* is not the output folder of a run that has started training"),
        ("", "metrics.jsonl has no complete record"),
        ("{]\n", r"metrics.jsonl:1 is not JSON"),
        ('{"step": 1}\n', r"metrics.jsonl:1 is not a record with kind, step, seconds and samples"),
    ],
)
def test_invalid_history_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ReportError, match=message):
        read_records(tmp_path)


def test_throughput_of_the_whole_run():
    records = [record("train", 10, peak_memory_bytes=7), record("train", 20, peak_memory_bytes=5), record("eval", 20)]
    expected = {"train_seconds": 10.0, "steps": 20, "samples_per_second": 16.0, "peak_memory_bytes": 7}
    assert throughput(records) == expected
    with pytest.raises(ReportError, match="no training record"):
        throughput(records[2:])


def test_missing_and_null_values_are_nan():
    assert np.isnan(column([{"a": None}, {}], "a")).all()


@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_running_mean_ignores_nan(window):
    values = np.random.default_rng(0).normal(size=12)
    values[[3, 7]] = np.nan
    around = [values[max(i - window, 0) : i + window + 1] for i in range(12)]
    expected = [np.nan if np.isnan(part).all() else np.nanmean(part) for part in around]
    np.testing.assert_allclose(running_mean(values, window), expected)


# ------------------------------------------------------------------------------------------------ reconstructions


@pytest.fixture(scope="module")
def parts():
    config = tiny_config("model.num_hidden_layers=2", "model.moe_layers=[0, 1]")
    tokenizer = load_tokenizer(config.data.tokenizer)
    return (
        config,
        tokenizer,
        Collator(evaluation_config(config), tokenizer, [OBJECTIVES["joint"]], has_images=True, has_captions=True),
    )


def scene_batch(parts, count=3, **changes):
    scenes = [Scenes("easy", split="val")[index] for index in range(count)]
    samples = [Sample(f"s{i}", 0, scene.image, scene.caption) for i, scene in enumerate(scenes)]
    samples = [replace(sample, **changes) if i == 1 else sample for i, sample in enumerate(samples)]
    return scenes, parts[2](samples)


class Oracle(nn.Module):
    """Model that predicts the true pixels, and for every word `answer` or, if that is None, the true word."""

    def __init__(self, batch, answer=None, normalized=False):
        super().__init__()
        patches = ops.patchify(batch.normalized_pixels, 8)
        index = batch.masked_patch_ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        self.pixels = patches.gather(1, index)
        if normalized:
            mean, variance = self.pixels.mean(-1, keepdim=True), self.pixels.var(-1, keepdim=True)
            self.pixels = (self.pixels - mean) / (variance + 1e-6).sqrt()
        said = batch.token_labels if answer is None else torch.full_like(batch.token_labels, answer)
        self.logits = nn.functional.one_hot(said, 256).float()
        self.shown = []

    def predict(self, **shown):
        self.shown.append(shown)
        return SimpleNamespace(
            pixel_predictions=self.pixels, token_hidden=self.logits, token_logits=lambda: self.logits, moe={}
        )


def test_unpatchify_is_the_inverse_of_patchify():
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(unpatchify(ops.patchify(images, 8), 8, 24), images)


@pytest.mark.parametrize("target", ["raw", "normalized"])
def test_reconstruction_of_a_perfect_model_is_the_original(parts, target):
    scenes, batch = scene_batch(parts)
    config = parts[0].model.model_copy(update={"pixel_target": target})
    examples = reconstruct(Oracle(batch, normalized=target == "normalized"), batch, parts[1], config)
    for scene, example, hidden in zip(scenes, examples, batch.masked_patch_ids, strict=True):
        original = torch.from_numpy(scene.image) / 255
        torch.testing.assert_close(example.original, original, atol=1e-5, rtol=0)
        torch.testing.assert_close(example.reconstructed, original, atol=1e-5, rtol=0)
        gray = torch.zeros(8, 8, dtype=torch.bool).flatten().scatter(0, hidden, True).view(8, 8)
        gray = gray.repeat_interleave(8, 0).repeat_interleave(8, 1)
        torch.testing.assert_close(example.masked[~gray], original[~gray], atol=1e-5, rtol=0)
        torch.testing.assert_close(example.masked[gray], torch.full((48 * 64, 3), MASKED_GRAY), atol=1e-5, rtol=0)


def test_patches_and_words_are_predicted_in_the_views_of_training(parts):
    _, batch = scene_batch(parts)
    model, config = Oracle(batch), parts[0].model
    reconstruct(model, batch, parts[1], config)
    pixels, words = model.shown
    assert pixels["input_ids"] is batch.input_ids
    assert pixels["visible_patch_ids"] is batch.visible_patch_ids
    assert words["input_ids"] is batch.masked_input_ids
    assert words["visible_patch_ids"] is None
    assert "given the whole caption" in note_on(config)
    model.shown.clear()
    joint = config.model_copy(update={"objectives": ["joint"]})
    reconstruct(model, batch, parts[1], joint)
    for shown in model.shown:
        assert shown["input_ids"] is batch.masked_input_ids
        assert shown["visible_patch_ids"] is batch.visible_patch_ids
    assert note_on(joint).endswith("both were predicted at once from the visible parts.")


def test_masked_patches_without_a_prediction_are_refused(parts):
    _, batch = scene_batch(parts)
    part = replace(batch, masked_patch_ids=batch.masked_patch_ids[:, ::2])
    with pytest.raises(ValueError, match=r"patches to predict \(24\) must be all masked patches \(48\)"):
        reconstruct(Oracle(batch), part, parts[1], parts[0].model)


def test_words_of_an_example_are_those_of_the_caption_with_predictions(parts):
    scenes, batch = scene_batch(parts)
    tokenizer = parts[1]
    wrong = tokenizer.convert_tokens_to_ids("ring")
    right = reconstruct(Oracle(batch), batch, tokenizer, parts[0].model)
    mistaken = reconstruct(Oracle(batch, wrong), batch, tokenizer, parts[0].model)
    for scene, good, bad in zip(scenes, right, mistaken, strict=True):
        assert [word.text for word in good.words] == scene.caption.split()
        assert [word.text for word in bad.words] == scene.caption.split()
        assert all(word.prediction in (None, word.text) for word in good.words)
        assert [word.prediction is None for word in good.words] == [word.prediction is None for word in bad.words]
        assert {word.prediction for word in bad.words} == {None, "ring"}
    masked = sum(word.prediction is not None for example in right for word in example.words)
    assert masked == batch.token_labels.numel()


def test_samples_without_a_caption_or_an_image_show_the_other_part(parts):
    scenes, batch = scene_batch(parts, caption=None)
    examples = reconstruct(Oracle(batch), batch, parts[1], parts[0].model)
    assert [len(example.words) for example in examples] == [len(scenes[0].caption.split()), 0, 5 + 1]
    scenes, batch = scene_batch(parts, image=None)
    examples = reconstruct(Oracle(batch), batch, parts[1], parts[0].model)
    assert [" ".join(word.text for word in example.words) for example in examples] == [
        scenes[0].caption,
        scenes[2].caption,
    ]


# -------------------------------------------------------------------------------------------------------- experts


def test_expert_use_adds_up_batches(parts):
    torch.manual_seed(0)
    model = EVE(parts[0].model).eval()
    _, batch = scene_batch(parts, 5)
    once, twice = expert_use(model, [batch]), expert_use(model, iter([batch, batch]))
    assert len(once) == 2
    for single, double in zip(once, twice, strict=True):
        assert torch.equal(double.routes, 2 * single.routes)
        assert double.entropy_sum == pytest.approx(2 * float(single.entropy_sum))
        assert single.tokens[IMAGE] == 5 * (1 + 16) + 5 * (1 + 64)  # image view and language view
        assert single.tokens[TEXT] == 2 * batch.attention_mask.sum()
        torch.testing.assert_close(shares(single).sum(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match="at least one batch"):
        expert_use(model, [])


# --------------------------------------------------------------------------------------------------------- tables


def test_markdown_of_a_table():
    table = Table("Title", ("a", "b"), [("x", "1"), ("y", "2")])
    assert table.to_markdown() == "**Title**\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n"


def test_tables_of_an_evaluation():
    words, masked, pixels, binding = evaluation_tables(EVALUATION)
    assert words.title == "Masked words predicted correctly, given the whole image"
    assert words.rows[0] == ("color", "0.750", "0.250", "+0.500")
    assert words.rows[-1] == ("all words of hidden captions", "0.800", "0.300", "+0.500")
    assert masked.title == "Masked words predicted correctly, given a masked image"
    assert masked.rows[0] == ("color", "0.650", "0.250", "+0.400")
    assert len(masked.rows) == 4
    assert pixels.rows == [("squared error", "0.1800", "0.2000", "10.0 %")]
    assert binding.rows[0] == ("position -> color", "0.500", "0.250", "+0.250")
    hard = {name: value for name, value in EVALUATION.items() if name != "binding"}
    assert len(evaluation_tables(hard)) == 3
    earlier = {name: value for name, value in EVALUATION.items() if name not in ("masked_image", "hidden_words")}
    words, _, _ = evaluation_tables(earlier)
    assert words.title == "Masked words predicted correctly, given a masked image"
    assert len(words.rows) == 4
    assert [table.title for table in evaluation_tables({"pixel_loss": EVALUATION["pixel_loss"]})] == [pixels.title]
    assert percent_lower({"right": 0.22, "wrong": 0.2}) == "-10.0 %"


def test_seeds_table_has_one_column_per_seed():
    costs = {"train_seconds": 9.0, "steps": 1200, "samples_per_second": 8.0, "peak_memory_bytes": 2**30}
    entries = [
        {"seed": seed, **EVALUATION, **costs, "export_max_abs_diff": diff} for seed, diff in ((0, 1e-7), (4, None))
    ]
    table = seeds_table(entries)
    rows = {row[0].strip(): row[1:] for row in reversed(table.rows)}  # the first of two rows with the same name
    assert table.columns == ("", "seed 0", "seed 4")
    assert rows["color"] == ("0.750 / 0.250",) * 2
    assert [row[1] for row in table.rows if row[0].strip() == "color"] == ["0.750 / 0.250", "0.650 / 0.250"]
    assert rows["lower by"] == ("10.0 %",) * 2
    assert rows["position -> color"] == ("0.500 / 0.250",) * 2
    assert rows["peak memory of a rank"] == ("1,024 MiB",) * 2
    assert rows["export: largest difference"] == ("1.0e-07", "not checked")
    assert all(len(row) == 3 for row in table.rows)


def test_loss_table_omits_terms_without_values():
    table = loss_table([record("train", 10, loss=3.0, mlm=2.0), record("train", 20, loss=1.0, mlm=0.5)])
    assert table.columns == ("term", "steps to 10", "steps 11 to 20", "change")
    assert table.rows == [("loss", "3.0000", "1.0000", "-2.0000"), ("mlm", "2.0000", "0.5000", "-1.5000")]


# --------------------------------------------------------------------------------------------------- whole reports


def write_run(folder, config, steps=30):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    writer = MetricsWriter(folder)
    for step in range(10, steps + 1, 10):
        writer.write(
            "train",
            **{"step": step, "seconds": step / 2, "samples": 8 * step, "loss": 9 / step, "mim": 1 / step},
            **{"mlm": 8 / step, "load_balancing": 1.0, "lr": 1e-3, "peak_memory_bytes": 2**20},
            **({"skipped/unreadable image": 3} if step == steps else {}),
        )
        writer.write("eval", step=step, seconds=step / 2, samples=8 * step, **EVALUATION)
    writer.write("event", step=steps, seconds=1.0, samples=1, event="nonfinite", message="something happened")
    writer.close()
    return folder


def is_drawn(path):
    """Whether the figure has a reasonable size and more than one color."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return min(pixels.shape[:2]) > 200 and pixels.std() > 10


def test_report_of_a_run_on_scenes(tmp_path, parts):
    config, tokenizer, _ = parts
    run = write_run(tmp_path / "run", config)
    torch.manual_seed(0)
    exported = Exported(EVE(config.model).eval(), config, tokenizer)
    report, *pictures = write_report(run, tmp_path / "report", exported, EVALUATION)
    assert [path.name for path in pictures] == ["curves.png", "reconstructions.png", "experts.png"]
    assert all(is_drawn(path) for path in pictures)
    text = report.read_text()
    assert all(f"]({path.name})" in text for path in pictures)
    assert "| samples skipped: unreadable image | 3 |" in text
    assert "- step 30: something happened" in text
    assert "| color | 0.750 | 0.250 | +0.500 |" in text
    assert "| samples/s | 16.0 |" in text
    # The grid contains the first validation scene with its colors.
    grid = np.asarray(Image.open(pictures[1]).convert("RGB")).reshape(-1, 3)
    color = Scenes("easy", split="val")[0].image[0, 0]
    assert (np.abs(grid.astype(int) - color).max(axis=1) <= 2).sum() > 1000


def test_report_without_a_model_covers_training_only(tmp_path, parts):
    run = write_run(tmp_path / "run", parts[0])
    written = write_report(run, tmp_path / "report")
    assert [path.name for path in written] == ["report.md", "curves.png"]
    assert "| color | 0.750 | 0.250 | +0.500 |" in written[0].read_text()  # from the last evaluation of the run


def test_report_of_a_run_on_shards_shows_its_data(tmp_path, parts):
    write_shards(GeneratedScenes(80), tmp_path / "shards", WriterOptions(samples_per_shard=40))
    source = {"kind": "shards", "shards": str(tmp_path / "shards")}
    config = load_config("eve_tiny", [f"data.sources={json.dumps([source])}", "data.num_workers=2"])
    run = write_run(tmp_path / "run", config)
    torch.manual_seed(0)
    _, _, grid, _ = write_report(run, tmp_path / "report", Exported(EVE(config.model).eval(), config, parts[1]))
    assert is_drawn(grid)


def test_loss_terms_of_earlier_runs_get_the_names_of_this_version(tmp_path):
    folder = write_records(tmp_path, [record("train", 10, loss=3.0, pixel=1.0, text=2.0)])
    assert read_records(folder)[0] == record("train", 10, loss=3.0, mim=1.0, mlm=2.0)


def in_former_spelling(evaluation):
    """The evaluation as versions with British keys wrote it."""
    return json.loads(json.dumps(evaluation).replace("color", "colour"))  # codespell:ignore colour


def test_evaluations_of_earlier_runs_are_read_with_the_keys_of_this_version(tmp_path):
    former = in_former_spelling(EVALUATION)
    assert former["binding"].keys() != EVALUATION["binding"].keys()
    assert with_current_names(former) == EVALUATION
    folder = write_records(tmp_path, [record("eval", 10, **former)])
    assert read_records(folder) == [record("eval", 10, **EVALUATION)]


def test_reports_of_earlier_and_of_current_runs_are_the_same(report, tmp_path, parts):
    for name, spelled in (("current", lambda found: found), ("former", in_former_spelling)):
        run = write_run(tmp_path / name / "run", parts[0])
        lines = [spelled(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
        write_records(run, lines)
        (run / "evaluation.json").write_text(json.dumps(spelled(EVALUATION)))
        assert report(run, "--evaluation", run / "evaluation.json")[0] == 0
    current, former = (tmp_path / name / "run" / "report" / "report.md" for name in ("current", "former"))
    assert former.read_text() == current.read_text()


def test_curves_skip_values_that_are_not_finite(tmp_path):
    records = [record("train", step, loss=1.0, mim=math.nan if step == 2 else 0.5, lr=1.0) for step in range(1, 60)]
    for item in records:
        item |= {"peak_memory_bytes": 1}
    written = write_report(write_records(tmp_path / "run", records), tmp_path / "report")
    assert is_drawn(written[1])


# ----------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def report(capsys):
    def run(*arguments):
        return main(list(map(str, arguments))), capsys.readouterr()

    return run


def test_command_line_writes_into_the_run_folder(report, tmp_path, parts):
    run = write_run(tmp_path / "run", parts[0])
    code, output = report(run)
    assert code == 0
    assert output.out.split() == [str(run / "report" / name) for name in ("report.md", "curves.png")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "report: nowhere/metrics.jsonl does not exist: nowhere is not the output folder of a run"),
        (["nowhere", "--model", "elsewhere"], "report: elsewhere is not an export, it lacks"),
        (["nowhere", "--evaluation", "missing.json"], "report: --evaluation missing.json cannot be read: No such file"),
        (["nowhere", "--evaluation", "broken.json"], "report: --evaluation broken.json is not JSON"),
        (
            ["nowhere", "--evaluation", "other.json"],
            "report: --evaluation other.json is not a result of `evaluate.py scenes",
        ),
    ],
)
def test_command_line_reports_an_error_in_one_line(report, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("other.json").write_text("{}")
    code, output = report(*arguments)
    assert code == 2
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1


def test_a_picture_shows_words_that_look_like_formulas_or_controls(tmp_path):
    texts = ("$\\frac$", "$", "a\nb", "\x1b[2J", "{", "")
    words = tuple(Word(text, guess) for text in texts for guess in (None, "$x^$"))
    image = torch.zeros(8, 8, 3)
    path = plot_reconstructions([Example(image, image, image, words)], tmp_path / "a.png", "title", "note")
    with Image.open(path) as picture:
        picture.verify()
