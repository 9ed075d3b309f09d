"""Learning rate at every step, against values computed by hand."""

import pytest

from eve_ds.config import parse_config
from eve_ds.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("decay", "final", "expected"),
    [
        # Four warm-up steps of twelve, peak 0.8: 0.2, 0.4, 0.6, 0.8, then eight steps of decay.
        ("linear", 0.0, {0: 0.2, 1: 0.4, 3: 0.8, 4: 0.8, 5: 0.7, 8: 0.4, 11: 0.1, 12: 0.0}),
        ("linear", 0.5, {3: 0.8, 4: 0.8, 6: 0.7, 8: 0.6, 12: 0.4, 99: 0.4}),
        # 0.4 (1 + cos(pi t)) at t = 0, 1/4, 1/2, 3/4, 1
        ("cosine", 0.0, {0: 0.2, 4: 0.8, 6: 0.682842712, 8: 0.4, 10: 0.117157288, 12: 0.0}),
        ("cosine", 0.25, {4: 0.8, 8: 0.5, 12: 0.2}),
        ("constant", 0.0, {0: 0.2, 3: 0.8, 4: 0.8, 12: 0.8}),
    ],
)
def test_learning_rate_warms_up_then_decays(decay, final, expected):
    settings = parse_config(
        {
            "optimizer": {"lr": 0.8, "warmup_steps": 4, "decay": decay, "final_lr_share": final},
            "train": {"max_steps": 12},
        }
    )
    for step, lr in expected.items():
        assert learning_rate(settings, step, seconds=1e9) == pytest.approx(lr, abs=1e-9), step


def test_decay_by_seconds_follows_the_time_budget():
    settings = parse_config(
        {
            "optimizer": {"lr": 0.8, "warmup_steps": 4, "decay": "linear", "decay_by": "seconds"},
            "train": {"max_steps": 10**6, "max_seconds": 200.0},
        }
    )
    assert learning_rate(settings, 100, seconds=0.0) == pytest.approx(0.8)
    assert learning_rate(settings, 100, seconds=50.0) == pytest.approx(0.6)
    assert learning_rate(settings, 100, seconds=300.0) == 0.0
    assert learning_rate(settings, 0, seconds=100.0) == pytest.approx(0.8 / 4 * 0.5)


def test_learning_rate_without_warm_up_starts_at_its_peak():
    settings = parse_config({"optimizer": {"lr": 0.8, "warmup_steps": 0}, "train": {"max_steps": 8}})
    assert [learning_rate(settings, step, 0.0) for step in (0, 4)] == pytest.approx([0.8, 0.4])
