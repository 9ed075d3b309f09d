"""Memory and traffic that the planner counts, against the tensors of real engines and the calls of real collectives.

One start of four ranks trains every case for two steps of two micro-steps with `eve_ds.training.pretrain`.
"""

import dataclasses
import importlib.util
import pathlib
from contextlib import ExitStack

import pytest
from tiny import tiny_tree

from eve_ds.config import parse_config
from eve_ds.planner.plan import Planner
from eve_ds.planner.shape import Shape

RANKS, MICRO_STEPS, MICRO_BATCH = 4, 2, 2
SMALLEST = 64
"""Bytes of the smallest call that is compared. Agreements of the ranks and sums for norms are smaller."""
TOLERANCE = 0.01
"""Relative. The flat buffers of ZeRO are padded, by up to 30 elements in 200,000 here."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One topology."""

    stage: int
    ep_size: int
    tp_size: int = 1
    split_experts: bool = False
    precision: str = "bf16"
    checkpointing: bool = False

    def config(self):
        """Captions of scenes are longer than `text_length`, so that all samples have the same number of tokens."""
        parallel = {"ep_size": self.ep_size, "tp_size": self.tp_size, "split_experts": self.split_experts}
        return parse_config(
            {
                "model": tiny_tree(hidden_size=64, intermediate_size=128, text_length=5, moe={"num_experts": 8}),
                "data": {"sources": [{"kind": "scenes"}], "num_workers": 0},
                "parallel": parallel,
                "optimizer": {"clip_grad_norm": 1.0 if self.stage else 0.0, "warmup_steps": 1},
                "train": {
                    "train_batch_size": RANKS // self.tp_size * MICRO_STEPS * MICRO_BATCH,
                    "gradient_accumulation_steps": MICRO_STEPS,
                    "max_steps": 2,
                    "precision": self.precision,
                    "activation_checkpointing": self.checkpointing,
                },
            }
        )

    def shape(self):
        return Shape(
            RANKS,
            2,
            self.ep_size,
            self.tp_size,
            self.split_experts,
            self.stage,
            micro_batch=MICRO_BATCH,
            accumulation_steps=MICRO_STEPS,
            checkpointing=self.checkpointing,
            precision=self.precision,
        )

    def runs(self):
        """Whether tensor parallelism is installed, if the case needs it."""
        return self.tp_size == 1 or importlib.util.find_spec("megatron") is not None


CASES = [
    Case(0, 1),
    Case(0, 2),
    Case(1, 1),
    Case(1, 2, precision="fp32"),
    Case(1, 4, checkpointing=True),
    Case(2, 2),
    Case(2, 4),
    Case(3, 2),
    Case(3, 4),
    Case(1, 1, tp_size=2),
    Case(1, 2, tp_size=2, checkpointing=True, split_experts=True),
    Case(2, 2, tp_size=2),
]


def measure(rank, world_size, described, folder):
    """Results of :func:`measure_case` for each case."""
    return [measure_case(Case(**fields), f"{folder}/{number}") for number, fields in enumerate(described)]


def measure_case(case, folder):
    """Bytes by term after the first micro-step and at the end; kind, group and bytes of the last step's collectives."""
    from unittest import mock

    from collectives import recorded_collectives

    from eve_ds.training import pretrain as pretraining
    from eve_ds.training import start

    results = {}
    initialize = start.initialize_engine
    config = case.config()
    train = config.train.model_copy(update={"output_dir": pathlib.Path(folder)})
    with ExitStack() as stack:
        calls = stack.enter_context(recorded_collectives())
        stack.enter_context(
            mock.patch.object(
                start, "initialize_engine", lambda *arguments: watched(initialize(*arguments), calls, results)
            )
        )
        stack.enter_context(mock.patch.object(pretraining, "evaluate_scenes", return_value={}))
        settings = {"zero_optimization": {"stage": case.stage}}
        pretraining.pretrain(config.model_copy(update={"train": train}), settings)
    return results


def watched(engine, calls, results):
    """The engine, whose methods fill the results."""
    from engine_bytes import engine_bytes

    backward, step, destroy, ends = engine.backward, engine.step, engine.destroy, [0]

    def measured_backward(loss):
        backward(loss)
        if len(ends) == MICRO_STEPS + 1:
            results["backward"] = engine_bytes(engine)

    def measured_step():
        step()
        ends.append(len(calls))
        last = calls[ends[-1 - MICRO_STEPS] :] if len(ends) > MICRO_STEPS else []
        results["collectives"] = [(call.kind, call.ranks, call.num_bytes) for call in last]

    def measured_destroy():
        results["end"] = engine_bytes(engine)
        destroy()

    engine.backward, engine.step, engine.destroy = measured_backward, measured_step, measured_destroy
    return engine


@pytest.fixture(scope="module")
def measured():
    """Results of the one start, for all tests."""
    return {}


def cases_of(measured, run_ranks, tmp_path):
    """Each case with the results of its ranks and what the planner counts."""
    cases = [case for case in CASES if case.runs()]
    if not measured:
        described = [dataclasses.asdict(case) for case in cases]
        measured["ranks"] = run_ranks(measure, RANKS, described, str(tmp_path), timeout=240)
    options = [Planner(case.config()).option(case.shape()) for case in cases]
    return [
        (case, [of_rank[number] for of_rank in measured["ranks"]], option)
        for number, (case, option) in enumerate(zip(cases, options, strict=True))
    ]


def test_memory_is_that_of_the_engines_tensors(measured, run_ranks, tmp_path):
    for case, ranks, option in cases_of(measured, run_ranks, tmp_path):
        planned = option.memory
        # ZeRO 3 has one of the two buffers, and the gathered weights, after a backward pass too.
        kept = (planned.buckets // 2 if case.stage == 3 else 0) + planned.gathered
        for term in ("weights", "masters", "moments"):
            for found in ranks:
                assert found["end"][term] == pytest.approx(getattr(planned, term), rel=TOLERANCE), (case, term)
        largest = max(sum(found["backward"].values()) for found in ranks)
        assert largest == pytest.approx(planned.persistent + planned.gradients + kept, rel=TOLERANCE), case


def by_kind_and_ranks(collectives):
    """(kind, number of ranks) -> bytes of (kind, number of ranks, bytes)."""
    sums = {}
    for kind, ranks, size in collectives:
        sums[kind, ranks] = sums.get((kind, ranks), 0) + size
    return sums


def test_traffic_is_that_of_the_recorded_collectives(measured, run_ranks, tmp_path):
    for case, ranks, option in cases_of(measured, run_ranks, tmp_path):
        planned = by_kind_and_ranks([(one.kind, one.ranks, one.num_bytes) for one in option.collectives])
        recorded = [call for found in ranks for call in found["collectives"] if call[-1] >= SMALLEST]
        # Ranks send different numbers of rows to experts, so all ranks together are compared.
        sums = by_kind_and_ranks([(kind, len(group), size / RANKS) for kind, group, size in recorded])
        assert sums == pytest.approx(planned, rel=TOLERANCE), case
