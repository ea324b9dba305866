"""The plan of random decisions: pure, unbiased, and the same for every number of ranks."""

import itertools
import pickle
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import DataError
from pipeline.load.feed import EvalFeed, TrainFeed
from pipeline.load.plan import Plan, rank_slice
from pipeline.shards import ShardReader


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 3000), batch=st.integers(1, 64), seed=st.integers(0, 2**63), epoch=st.integers(0, 99)
)
def test_an_epoch_visits_no_sample_twice_and_leaves_out_less_than_a_batch(
    count: int, batch: int, seed: int, epoch: int
) -> None:
    batch = min(batch, count)
    plan = Plan(count, batch, seed)
    seen = np.concatenate([plan.samples(epoch, step) for step in range(plan.steps_per_epoch)])
    assert len(set(seen.tolist())) == len(seen) > count - batch
    assert seen.max() < count


def test_every_draw_is_a_pure_function_of_its_place() -> None:
    one, other = Plan(1000, 32, seed=3), pickle.loads(pickle.dumps(Plan(1000, 32, seed=3)))
    for epoch, step in [(4, 7), (0, 0), (4, 6), (0, 0)]:  # whatever was asked before
        assert np.array_equal(one.samples(epoch, step), other.samples(epoch, step))
        for a, b in zip(one.views(epoch, step), Plan(1000, 32, seed=3).views(epoch, step), strict=True):
            assert np.array_equal(a, b)
        assert one.dropout_key(epoch, step) == other.dropout_key(epoch, step)


def test_seeds_epochs_and_steps_differ() -> None:
    base = Plan(1000, 32, seed=3)
    assert not np.array_equal(base.order(0), base.order(1))
    assert not np.array_equal(base.order(0), Plan(1000, 32, seed=4).order(0))
    keys = {base.dropout_key(e, s) for e in range(50) for s in range(31)}
    assert len(keys) == 50 * 31
    colors = {base.views(e, s).color.tobytes() for e in range(20) for s in range(31)}
    assert len(colors) == 20 * 31


def test_all_2048_views_of_the_paper_appear_alike() -> None:
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
def test_switching_one_augmentation_off_leaves_the_others_as_they_were(augment: str) -> None:
    full, part = Plan(100, 10).views(2, 3), Plan(100, 10, augment=augment).views(2, 3)
    assert np.array_equal(part.anchor, full.anchor) == (augment == "crop")
    assert np.array_equal(part.flip, full.flip) == (augment == "flip")
    assert augment == "crop" or (part.anchor == 16).all()
    assert np.array_equal(part.color, full.color)
    assert not Plan(100, 10, color_std=0).views(2, 3).color.any()


@given(total=st.integers(0, 10_000), world=st.integers(1, 64))
def test_the_shares_of_all_ranks_tile_the_whole(total: int, world: int) -> None:
    shares = [range(total)[rank_slice(total, rank, world)] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Records:
    """Stands in for a ShardReader: record i is its own number, in one byte or two."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    manifest = SimpleNamespace(encoding="jpeg")

    def prefetch(self, indices: list[int]) -> None:
        pass

    def stored_bytes(self, index: int) -> int:
        return len(self.read(index)[0]) + 3

    def read(self, index: int) -> tuple[np.ndarray, int]:
        return np.frombuffer(index.to_bytes(1 + index // 256, "little"), np.uint8), index


def reader(records: Records) -> ShardReader:
    return cast(ShardReader, records)


def stream(plan: Plan, world: int, first: int, last: int) -> list[bytes]:
    """(sample, label, crop, flip, colour) of every position of the global batches, all ranks together."""
    basis = np.eye(3, dtype=np.float32)
    feeds = [TrainFeed(reader(Records(plan.count)), plan, basis, r, world, first, last) for r in range(world)]
    steps = []
    for iteration in range(last - first):
        parts = [feed(SimpleNamespace(iteration=iteration)) for feed in feeds]
        steps.append(b"".join(np.concatenate([part[i] for part in parts]).tobytes() for i in range(5)))
    with pytest.raises(StopIteration):
        feeds[-1](SimpleNamespace(iteration=last - first))
    return steps


@settings(max_examples=40, deadline=None)
@given(parts=st.integers(1, 8), more=st.integers(0, 40), seed=st.integers(0, 2**63), stop=st.integers(0, 12))
def test_the_stream_is_that_of_one_rank_for_any_ranks_also_after_resuming(
    parts: int, more: int, seed: int, stop: int
) -> None:
    batch = 4 * parts
    plan = Plan(batch + more, batch, seed)
    whole = stream(plan, 1, 0, 12)
    assert len(set(whole)) == 12
    for before, after in ((2, 2), (4, 4), (1, 4), (4, 2), (2, 1)):
        assert stream(plan, before, 0, stop) + stream(plan, after, stop, 12) == whole


@settings(max_examples=100, deadline=None)
@given(count=st.integers(0, 500), batch=st.integers(1, 70), world=st.integers(1, 9))
def test_evaluation_feeds_every_image_once_for_any_batch_and_ranks(
    count: int, batch: int, world: int
) -> None:
    seen = []
    for rank in range(world):
        feed = EvalFeed(reader(Records(count)), batch, 256, 224, rank, world)
        for iteration in itertools.count():
            try:
                records, labels, *_ = feed(SimpleNamespace(iteration=iteration))
            except StopIteration:
                break
            assert 0 < len(records) == len(labels) <= batch
            seen += [int.from_bytes(record.tobytes(), "little") for record in records]
    assert sorted(seen) == list(range(count))


def test_one_long_record_does_not_make_the_others_as_long() -> None:
    """Records of a batch are one array as long as that is mostly records."""
    for last, together in ((20, True), (5000, False)):
        lengths = [10, 12, 11, last]

        class Uneven(Records):
            def read(self, index: int) -> tuple[np.ndarray, int]:
                return np.full(lengths[index], index + 1, np.uint8), index  # noqa: B023

        records, *_ = EvalFeed(reader(Uneven(4)), 4, 256, 224, 0, 1)(SimpleNamespace(iteration=0))
        assert isinstance(records, np.ndarray) == together
        for index, record in enumerate(records):
            assert record[: lengths[index]].tolist() == [index + 1] * lengths[index]
            assert not record[lengths[index] :].any()


def test_bad_plans_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match="--global-batch 5 or less"):
        Plan(5, 6)
    with pytest.raises(DataError, match="does not fit"):
        Plan(5, 1, size=32, crop=33)
    with pytest.raises(DataError, match="augment"):
        Plan(5, 1, augment="some")
    with pytest.raises(IndexError):
        Plan(10, 3).samples(0, 3)
