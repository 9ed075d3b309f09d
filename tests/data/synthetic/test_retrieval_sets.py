import re

import pytest
from scene_reader import stand, where

from eve_ds.config import ConfigError
from eve_ds.data.synthetic.retrieval_sets import retrieval_set
from eve_ds.data.synthetic.scenes import split_of


@pytest.mark.parametrize(("level", "split"), [("easy", "test"), ("hard", "val")])
def test_every_caption_is_true_of_one_image_only(level, split):
    def says(caption, scene):
        things = [f"{item.size} {item.color} {item.shape}" for item in scene.objects]
        if level == "easy":
            there = {f"a {thing} {where(item)}" for thing, item in zip(things, scene.objects, strict=True)}
            return set(caption.split(" and ")) == there
        first, *clauses = re.split(r" (?=left of|right of|above|below)", caption.replace(" and ", " "))
        firsts = [item for thing, item in zip(things, scene.objects, strict=True) if f"a {thing}" == first]
        parts = [clause.split(" a ") for clause in clauses]
        return any(
            all(
                any(
                    said == thing and stand(base, held, item) for thing, item in zip(things, scene.objects, strict=True)
                )
                for held, said in parts
            )
            for base in firsts
        )

    scenes = retrieval_set(level, 150, seed=1, split=split)
    assert len({scene.caption for scene in scenes}) == 150
    for wanted, scene in enumerate(scenes):
        assert split_of(scene.objects) == split
        assert len(scene.objects) >= 2
        assert [index for index, other in enumerate(scenes) if says(scene.caption, other)] == [wanted]


def test_too_large_set_is_refused():
    with pytest.raises(ConfigError, match="retrieval set of 2600 scenes: split 'val' of level 'easy' gave only 2"):
        retrieval_set("easy", 2600, split="val")
