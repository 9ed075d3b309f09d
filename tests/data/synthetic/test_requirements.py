import pytest
from scene_reader import matching, one, stand

from eve_ds.data.synthetic.probes import binding_probes
from eve_ds.data.synthetic.questions import Questions
from eve_ds.data.synthetic.requirements import Requirement, draw_relation, scene_with
from eve_ds.data.synthetic.retrieval_sets import retrieval_set
from eve_ds.data.synthetic.scenes import Scenes, SplitMix64, split_of
from eve_ds.data.synthetic.statements import Statements


def test_captions_of_all_tasks_name_objects_in_random_order():
    """Only training captions may be in reading order; here the place in a caption must not depend on the image."""
    easy = Scenes("easy", split="val")
    shown = {
        "probes": [probe.scene for probe in binding_probes(easy, 400)][::4],
        "questions": [Questions("easy", split="val")[index].scene for index in range(800)],
        "statements": [Statements("easy", split="val")[index].left for index in range(800)],
        "retrieval": retrieval_set("easy", 400, split="val"),
    }
    for name, scenes in shown.items():
        pairs = [scene.objects for scene in scenes if len(scene.objects) == 2]
        in_order = sum((first.row, first.column) < (second.row, second.column) for first, second in pairs)
        assert len(pairs) > 300
        assert abs(in_order / len(pairs) - 0.5) < 2.5 / len(pairs) ** 0.5, name  # five standard deviations


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_scene_meets_its_requirement(level):
    """Two named objects stand in the given relation; no further object matches either description."""
    scenes = Scenes(level, split="val")
    for index in range(40):
        rng = SplitMix64(index)
        first, relation, second = draw_relation(scenes, rng)
        most = max(scenes.level.num_objects)
        scene = scene_with(scenes, Requirement((first, second), (first, second), relation, most), rng)
        named = [one(matching(scene, str(said))) for said in (first, second)]
        assert stand(named[0], relation, named[1])
        assert len(scene.objects) == most
        assert split_of(scene.objects) == "val"
