"""A task that is defined in this file alone is trained, saved, evaluated and asked by generic code."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from eve_ds.config import ConfigError, parse_config
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.model.moe import MoE
from eve_ds.objectives.router import router_losses
from eve_ds.tasks.classification import ClassificationTask
from eve_ds.tasks.examples import Example, SceneExamples
from eve_ds.tasks.features.class_token import Classifier
from eve_ds.tasks.finetune_config import task_config
from eve_ds.tasks.load_examples import load_examples
from eve_ds.tasks.registry import TASKS, named_task, new_task, task_class

# --- the new task -----------------------------------------------------------------------------------------------------


class SceneSizes(SceneExamples):
    task = "crowd"

    def __init__(self, config, split, num_examples):
        super().__init__(config, split, num_examples)
        self._scenes = Scenes(config.level, config.seed, split)

    def make(self, index):
        scene = self._scenes[index]
        return Example(str(index), (scene.image,), "is it crowded?", label=len(scene.objects) > 2)


def read_lines(source):
    """Lines `IMAGE yes` and `IMAGE no`."""
    for line in source.files[0].read_text().splitlines():
        name, answer = line.split()
        yield Example(name, (source.images / name,), "is it crowded?", label=answer == "yes")


class Crowd(ClassificationTask):
    """Whether an image has more than two objects."""

    name = "crowd"
    recipe = scenes_recipe = "tasks/scenes_vqa"
    readers: ClassVar = {"lines": read_lines}
    answers = ("no", "yes")

    @classmethod
    def check(cls, config):
        if config.task.blind:
            raise ConfigError("task.blind (True) leaves nothing to count: set it to false")

    @classmethod
    def scene_examples(cls, config, source, section):
        return SceneSizes.of(source, section)

    def model(self, moe_cls=MoE):
        return Classifier(self.config, moe_cls, 1, 2)

    def draw_head(self, model):
        torch.nn.init.zeros_(model.head[-1].weight)

    def targets(self, examples):
        return torch.tensor([int(example.label) for example in examples])

    def losses(self, output, batch):
        entropy = F.cross_entropy(output.logits.float(), batch.targets)
        return {"entropy": entropy, "unused": output.logits.sum()} | router_losses(output.moe, output.num_tokens)

    def term_weights(self):
        return {"entropy": 2.0, "unused": 0.0}

    def record(self, logits):
        return {"answer": self.answers[int(logits.argmax())]}

    def metrics(self, examples, predictions):
        right = [predictions[e.key]["answer"] == self.answers[int(e.label)] for e in examples]
        return {"accuracy": sum(right) / len(right), "num_examples": len(right)}


# --- generic code -----------------------------------------------------------------------------------------------------


def trained_and_asked(rank, world_size, tree, folder):
    """Metrics of fine-tuning, metrics of a second evaluation, losses, and answers of the saved model."""
    import json

    from PIL import Image

    from eve_ds.evaluation.ask import ask
    from eve_ds.evaluation.predictions import evaluate
    from eve_ds.tasks.batches import TaskCollator
    from eve_ds.tasks.saved import load_task_model
    from eve_ds.training.finetune import finetune

    TASKS[Crowd.name] = Crowd
    out = Path(folder, "run")
    summary = finetune(parse_config(tree | {"train": {**tree["train"], "output_dir": out}}))
    loaded = load_task_model(summary.model)
    examples = load_examples(loaded.config, "val")
    collate = TaskCollator(loaded.config, loaded.tokenizer)
    again = evaluate(
        loaded.task, loaded.model, examples, collate, out=Path(folder, "again"), weights=loaded.sha256, batch_size=5
    )
    image = Path(folder, "image.png")
    Image.fromarray(examples[0].images[0]).save(image)
    answers = ask(loaded, [image], ["is it crowded?"])
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["loss"], r["entropy"]) for r in records if r["kind"] == "train"]
    return summary.metrics, again, losses, [tuple(answer) for answer in answers]


def test_a_new_task_is_trained_saved_evaluated_and_asked(run_ranks, task_tree, tmp_path):
    tree = task_tree("crowd", train={"num_examples": 40}, val={"num_examples": 12})
    ((metrics, again, losses, answers),) = run_ranks(trained_and_asked, 1, tree, str(tmp_path))
    assert metrics == again
    assert metrics["num_examples"] == 12
    assert len(losses) == 3
    assert losses[0][1] == pytest.approx(0.693, abs=1e-3), "the head was drawn by the task"
    balance = losses[0][0] - 2 * losses[0][1]
    assert 0 < balance < 0.01, "twice the task's term, and the routers' terms with their weights"
    assert {answer for _, answer, _ in answers} == {"yes", "no"}
    assert sum(score for _, _, score in answers) == pytest.approx(1.0)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(TASKS, Crowd.name, Crowd)


@pytest.mark.usefixtures("registered")
def test_a_task_without_scenes_asks_for_files(monkeypatch):
    monkeypatch.setattr(Crowd, "scenes_recipe", None)
    with pytest.raises(ConfigError, match="task 'crowd' has no generated examples: name annotation files with --data"):
        task_config("crowd", init=None, model="eve_tiny")


@pytest.mark.usefixtures("registered")
def test_a_new_task_reads_its_own_format_and_checks_its_own_settings(task_tree, tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "labels.txt").write_text("a.png yes\nb.png no\n")
    source = {"format": "lines", "annotations": [str(tmp_path / "labels.txt")]}
    config = parse_config(task_tree("crowd", val=source))
    assert [(e.key, e.images[0].name, e.label) for e in load_examples(config, "val")] == [
        ("a.png", "a.png", True),
        ("b.png", "b.png", False),
    ]
    with pytest.raises(ConfigError, match=r"is of format nlvr, which has no examples of task 'crowd': .* format lines"):
        load_examples(parse_config(task_tree("crowd", val=source | {"format": "nlvr"})), "val")
    with pytest.raises(ConfigError, match=r"task\.blind \(True\) leaves nothing to count"):
        task_class(parse_config(task_tree("crowd", blind=True)))


@pytest.mark.usefixtures("registered")
def test_a_new_task_names_its_recipe():
    with pytest.raises(ConfigError, match="recipe tasks/scenes_vqa is for the task 'vqa', not 'crowd'"):
        task_config("crowd", init=None, model="eve_tiny")


def test_defaults_of_a_task_refuse_unsupported_uses(task_tree, tmp_path):
    with pytest.raises(ConfigError, match=r"--csv out\.csv: task 'crowd' has no published form of predictions"):
        Crowd.write_csv({}, Path("out.csv"))
    with pytest.raises(ConfigError, match="task 'crowd' needs a new head: fine-tune the model first"):
        Crowd.zero_shot_settings(parse_config(task_tree("crowd")).model, None, 0)


@pytest.mark.parametrize(("name", "hint"), [("vqq", "did you mean 'vqa'"), ("??", "known: nlvr, retrieval, vqa")])
def test_an_unknown_task_is_refused_with_the_nearest_name(task_tree, name, hint):
    config = parse_config(task_tree(name))
    for refused in (lambda: named_task(name), lambda: new_task(config, []), lambda: load_examples(config, "val")):
        with pytest.raises(ConfigError, match=rf"task\.name \('{name}'\) is no task; {hint}".replace("?", r"\?")):
            refused()
    with pytest.raises(ConfigError, match="is no task"):
        task_config(name, init=None, model="eve_tiny")
