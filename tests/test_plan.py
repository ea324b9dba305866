"""The plan of random decisions: pure, unbiased, and the same for every number of ranks."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import DataError
from pipeline.plan import Plan, rank_slice


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 3000), batch=st.integers(1, 64), seed=st.integers(0, 2**63), epoch=st.integers(0, 99)
)
def test_an_epoch_visits_no_sample_twice_and_leaves_out_less_than_a_batch(count, batch, seed, epoch):
    batch = min(batch, count)
    plan = Plan(count, batch, seed)
    seen = np.concatenate([plan.samples(epoch, step) for step in range(plan.steps_per_epoch)])
    assert len(set(seen.tolist())) == len(seen) > count - batch
    assert seen.max() < count


def test_every_draw_is_a_pure_function_of_its_place():
    one, other = Plan(1000, 32, seed=3), pickle.loads(pickle.dumps(Plan(1000, 32, seed=3)))
    for epoch, step in [(4, 7), (0, 0), (4, 6), (0, 0)]:  # whatever was asked before
        assert np.array_equal(one.samples(epoch, step), other.samples(epoch, step))
        for a, b in zip(one.views(epoch, step), Plan(1000, 32, seed=3).views(epoch, step), strict=True):
            assert np.array_equal(a, b)
        assert one.dropout_key(epoch, step) == other.dropout_key(epoch, step)


def test_seeds_epochs_and_steps_differ():
    base = Plan(1000, 32, seed=3)
    assert not np.array_equal(base.order(0), base.order(1))
    assert not np.array_equal(base.order(0), Plan(1000, 32, seed=4).order(0))
    keys = {base.dropout_key(e, s) for e in range(50) for s in range(31)}
    assert len(keys) == 50 * 31
    colors = {base.views(e, s).color.tobytes() for e in range(20) for s in range(31)}
    assert len(colors) == 20 * 31


def test_all_2048_views_of_the_paper_appear_alike():
    plan = Plan(4096, 4096, size=256, crop=224)
    views = [plan.views(epoch, 0) for epoch in range(50)]
    code = np.concatenate([v.anchor[:, 0] * 64 + v.anchor[:, 1] * 2 + v.flip for v in views])
    counts = np.bincount(code, minlength=2048)
    assert len(counts) == 2048  # 32 * 32 * 2 (section 4.1)
    expected = len(code) / 2048
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 2047) < 5 * np.sqrt(2 * 2047)
    color = np.concatenate([v.color for v in views])
    assert np.allclose(color.mean(0), 0, atol=0.002) and np.allclose(color.std(0), 0.1, atol=0.002)


@pytest.mark.parametrize("augment", ["crop", "flip", "none"])
def test_switching_one_augmentation_off_leaves_the_others_as_they_were(augment):
    full, part = Plan(100, 10).views(2, 3), Plan(100, 10, augment=augment).views(2, 3)
    assert np.array_equal(part.anchor, full.anchor) == (augment == "crop")
    assert np.array_equal(part.flip, full.flip) == (augment == "flip")
    assert augment == "crop" or (part.anchor == 16).all()
    assert np.array_equal(part.color, full.color)
    assert not Plan(100, 10, color_std=0).views(2, 3).color.any()


@given(total=st.integers(0, 10_000), world=st.integers(1, 64))
def test_the_shares_of_all_ranks_tile_the_whole(total, world):
    shares = [range(total)[rank_slice(total, rank, world)] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_bad_plans_are_refused_in_one_line():
    with pytest.raises(DataError, match="--global-batch 5 or less"):
        Plan(5, 6)
    with pytest.raises(DataError, match="does not fit"):
        Plan(5, 1, size=32, crop=33)
    with pytest.raises(DataError, match="augment"):
        Plan(5, 1, augment="some")
    with pytest.raises(IndexError):
        Plan(10, 3).samples(0, 3)
