"""Every layout on two gloo ranks against the plain network on one: the same losses, weights and momentum."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from base.errors import ModelError
from model import alexnet
from model.alexnet import AlexNet
from model.parallel.layouts import Layout, automatic, bytes_sent
from model.parallel.ranks import Ranks, reduces
from model.training import recipe
from model.training.ema import Ema
from model.training.evaluation import evaluate

BATCH, SIZE, CLASSES, STEPS, HIDDEN = 8, 67, 5, 4, 32
RATES = (0.02, 0.02, 0.01, 0.03)

# a layout for each step; if it changes, the run is saved and resumed in between
CASES: dict[str, dict[str, Any]] = {
    "paper-data": {"layouts": ["data"] * 4},
    "paper-hybrid": {"layouts": ["hybrid"] * 4},
    "paper-towers": {"layouts": ["towers"] * 4},
    "owt-hybrid": {"layouts": ["hybrid"] * 4, "variant": "owt"},
    "owt-towers": {"layouts": ["towers"] * 4, "variant": "owt"},
    "bn-towers": {"layouts": ["towers"] * 4, "variant": "bn"},
    "paper-hybrid-accumulate": {"layouts": ["hybrid"] * 4, "accumulate": 2},
    "paper-towers-accumulate": {"layouts": ["towers"] * 4, "accumulate": 2},
    "paper-change": {"layouts": ["hybrid", "towers", "data", "hybrid"]},
    "paper-lars": {"layouts": ["data", "towers", "hybrid", "hybrid"], "optimizer": "lars", "scale": 100.0},
    "bf16-data": {"layouts": ["data"] * 4, "amp": torch.bfloat16},
    "bf16-compressed": {"layouts": ["data"] * 4, "amp": torch.bfloat16, "compress": True},
    "bf16-hybrid": {"layouts": ["hybrid"] * 4, "amp": torch.bfloat16},
    "bf16-towers": {"layouts": ["towers"] * 4, "amp": torch.bfloat16},
}

# layout, optimiser, and the ranks on which a gradient overflows (with "data" ranks have the same gradients)
OVERFLOWS = [
    ("hybrid", "sgd", (1,)),
    ("hybrid", "sgd", (0, 1)),
    ("towers", "lars", (0,)),
    ("hybrid", "lars", ()),
    ("data", "lars", (0, 1)),
    ("data", "lars", ()),
]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    images = 50 * torch.randn(BATCH, 3, SIZE, SIZE, generator=random, dtype=torch.float64)
    labels = torch.randint(CLASSES, (BATCH,), generator=random)
    return images.contiguous(memory_format=torch.channels_last), labels


def build(
    ranks: Ranks, kind: str, variant: str, optimizer: str, dtype: torch.dtype
) -> tuple[Layout, torch.optim.SGD]:
    network = AlexNet(CLASSES, variant, image_size=SIZE)
    recipe.initialise(network, "torch", seed=3)
    network = network.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layout = Layout(network, kind, ranks, BATCH)
    update = recipe.build_optimizer(network, RATES[0], kind=optimizer, sum_of_slices=layout.sum_of_slices)
    return layout, update


def train(
    ranks: Ranks,
    layouts: list[str],
    variant: str = "paper",
    accumulate: int = 1,
    optimizer: str = "sgd",
    scale: float = 1.0,
    amp: torch.dtype | None = None,
    compress: bool = False,
) -> dict[str, Any]:
    """A step in each layout as in train.py; returns the last checkpoint, the losses and an evaluation."""
    dtype = torch.float64 if amp is None else torch.float32
    losses: list[float] = []
    saved: dict[str, Any] = {}
    kind = None
    for step, (wanted, rate) in enumerate(zip(layouts, RATES, strict=True)):
        if wanted != kind:
            kind = wanted
            layout, update = build(ranks, kind, variant, optimizer, dtype)
            if saved:
                layout.load_state_dict(saved["model"])
                layout.load_optimizer_state_dict(update, saved["optimizer"])
            ema = Ema(layout.network, 0.9)
            if saved:
                ema.load_state_dict(saved["ema"], layout.part)
            parallel = layout.distribute(accumulate == 1, compress)
        recipe.set_lr(update, rate * scale)
        images, labels = (x[layout.first_row : layout.first_row + layout.batch] for x in batch(step))
        update.zero_grad(set_to_none=True)
        part, total = layout.batch // accumulate, torch.zeros(())
        for i in range(accumulate):
            rows = slice(i * part, (i + 1) * part)
            layout.network.set_position(1234 + step, layout.first_row + rows.start)
            with reduces(parallel, last=i == accumulate - 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=amp is not None):
                    logits = parallel(images[rows].to(dtype))
                loss = F.cross_entropy(logits.to(dtype), labels[rows]) / accumulate
                loss.backward()
            total = total + loss.detach()
        update.step()
        ema.update(layout.network)
        losses.append(ranks.sum(total / ranks.world_size).item())
        saved = {"model": layout.state_dict(), "optimizer": layout.optimizer_state_dict(update)}
        saved["ema"] = ema.state_dict(layout.whole)
    images, labels = (x.chunk(ranks.world_size)[ranks.rank] for x in batch(99))
    metrics = evaluate(layout.plain_network(layout.network).to(torch.float64), [(images, labels)], ranks)
    return {**saved, "losses": losses, "metrics": metrics}


def overflow(ranks: Ranks, kind: str, optimizer: str, on: tuple[int, ...]) -> tuple[bool, float]:
    """Let a gradient overflow on the ranks `on`; returns whether any weight changed, and the new loss scale."""
    layout, update = build(ranks, kind, "paper", optimizer, torch.float32)
    scaler = layout.grad_scaler(update, enabled=True)
    before = [p.detach().clone() for p in layout.network.parameters()]
    for p in layout.network.parameters():
        p.grad = torch.ones_like(p)
    if ranks.rank in on:
        gradient = layout.network.get_parameter("classifier.fc6.weight").grad
        assert gradient is not None
        gradient[0, 0] = torch.inf
    scaler.scale(torch.ones(()))
    scaler.step(update)
    scaler.update()
    changed = any(not torch.equal(p, q) for p, q in zip(before, layout.network.parameters(), strict=True))
    return ranks.any(changed), scaler.get_scale()


def work(rank: int, out: str) -> None:
    alexnet.HIDDEN = HIDDEN
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank, 2)
    results: dict[str, Any] = {name: train(ranks, **case) for name, case in CASES.items()}
    results["overflow"] = {case: overflow(ranks, *case) for case in OVERFLOWS}
    sizes = {
        kind: sum(
            p.numel() for p in build(ranks, kind, "paper", "sgd", torch.float32)[0].network.parameters()
        )
        for kind in ("data", "hybrid", "towers")
    }
    torch.save({**results, "sizes": sizes}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The result of each case on each of two ranks."""
    out = tmp_path_factory.mktemp("layouts")
    mp.spawn(work, (str(out),), nprocs=2)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alexnet, "HIDDEN", HIDDEN)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_steps_of_one(name: str, on_two: list[dict[str, Any]], small: None) -> None:
    case: dict[str, Any] = {**CASES[name], "layouts": ["data"] * STEPS, "accumulate": 1, "compress": False}
    one, two = train(Ranks(), **case), on_two[0][name]
    # in float64 the tolerance only covers rounding; in bfloat16 the order of sums matters
    close: dict[str, Any] = (
        {"rtol": 1e-9, "atol": 1e-10} if "amp" not in case else {"rtol": 0.02, "atol": 2e-3}
    )
    torch.testing.assert_close(two["losses"], one["losses"], **close)
    assert two["model"].keys() == one["model"].keys()
    torch.testing.assert_close(two["model"], one["model"], **close)
    assert two["ema"]["steps"] == one["ema"]["steps"] == STEPS
    torch.testing.assert_close(two["ema"]["model"], one["ema"]["model"], **close)
    if "amp" not in case:
        for index, entry in one["optimizer"]["state"].items():
            theirs = two["optimizer"]["state"][index]["momentum_buffer"]
            torch.testing.assert_close(theirs, entry["momentum_buffer"], rtol=1e-8, atol=1e-9)
        assert two["optimizer"]["param_groups"] == one["optimizer"]["param_groups"]
    assert two["metrics"]["count"] == one["metrics"]["count"] == BATCH
    assert two["metrics"]["loss"] == pytest.approx(
        one["metrics"]["loss"], rel=1e-5 if "amp" not in case else 0.02
    )
    # the network has changed, so that the comparison is meaningful
    start = build(Ranks(), "data", case.get("variant", "paper"), "sgd", torch.float64)[0].state_dict()
    moved = [not torch.allclose(start[k], one["model"][k].double()) for k in start if k.endswith("weight")]
    assert all(moved)


def test_all_ranks_save_the_same(on_two: list[dict[str, Any]]) -> None:
    for name in CASES:
        torch.testing.assert_close(on_two[0][name]["model"], on_two[1][name]["model"], rtol=0, atol=0)


def test_weights_are_held_once(on_two: list[dict[str, Any]], small: None) -> None:
    """The slices are halves of all tensors except fc8's bias, or of the fully connected weights."""
    plain = AlexNet(CLASSES, image_size=SIZE)
    whole, last = sum(p.numel() for p in plain.parameters()), CLASSES
    convolutions = sum(p.numel() for p in plain.features.parameters())
    for ranks in on_two:
        assert ranks["sizes"]["data"] == whole
        assert ranks["sizes"]["towers"] == (whole - last) // 2 + last
        assert ranks["sizes"]["hybrid"] == convolutions + (whole - convolutions - last) // 2 + last


@pytest.mark.parametrize("case", OVERFLOWS, ids=str)
def test_an_overflow_on_any_rank_skips_the_step_of_all(
    case: tuple[str, str, tuple[int, ...]], on_two: list[dict[str, Any]]
) -> None:
    on = case[2]
    assert [ranks["overflow"][case] for ranks in on_two] == [(False, 2.0**15) if on else (True, 2.0**16)] * 2


def test_one_rank_has_the_plain_network_whatever_the_layout(small: None) -> None:
    for kind in ("data", "hybrid", "towers"):
        network = AlexNet(CLASSES, image_size=SIZE)
        layout = Layout(network, kind, Ranks(), BATCH)
        assert layout.distribute() is layout.plain_network(network) is network and not layout.dims


def test_ranks_that_do_not_fit_a_layout_are_refused() -> None:
    with pytest.raises(ModelError, match="for 2 ranks, not 4"):
        Layout(AlexNet(2, image_size=SIZE), "towers", Ranks(0, 4, 0, 4), BATCH)
    with pytest.raises(ModelError, match=r"cannot divide the .* into 3 ranks"):
        Layout(AlexNet(2, image_size=SIZE), "hybrid", Ranks(0, 3, 0, 3), 9)
    with pytest.raises(ModelError, match="this network has none"):
        Layout(AlexNet(2, "cifar-18pct", image_size=24), "hybrid", Ranks(0, 2, 0, 2), BATCH)
    with pytest.raises(ModelError, match="choose one of"):
        Layout(AlexNet(2, image_size=SIZE), "pipeline", Ranks(), BATCH)


@pytest.mark.parametrize(
    ("options", "ranks", "global_batch", "expected"),
    [
        ({}, 1, 128, "data"),
        ({}, 2, 128, "hybrid"),
        ({}, 8, 1024, "hybrid"),
        ({}, 8, 4096, "hybrid"),
        ({}, 8, 4104, "data"),  # with this batch the activations take more bytes than the gradients
        ({"width": 2}, 8, 4104, "hybrid"),
        ({"width": 2, "compress": True}, 8, 4104, "data"),
        ({}, 3, 129, "data"),  # 4096 is not divisible by 3
        ({"variant": "owt"}, 2, 128, "hybrid"),
        ({"variant": "cifar-18pct", "image_size": 32}, 2, 128, "data"),
    ],
)
def test_the_automatic_layout_is_the_one_that_sends_least(
    options: dict[str, Any], ranks: int, global_batch: int, expected: str
) -> None:
    sending = {name: options[name] for name in ("width", "compress") if name in options}
    with torch.device("meta"):
        network = AlexNet(1000, **{name: value for name, value in options.items() if name not in sending})
        assert automatic(network, ranks, global_batch, **sending) == expected


def test_the_bytes_that_ranks_send_are_those_of_the_collectives() -> None:
    """By hand: the paper's 60,965,224 parameters; inputs of fc6 and fc7 and outputs of fc8, each twice."""
    with torch.device("meta"):
        network = AlexNet(1000)
    assert bytes_sent(network, "data", 2, 128) == 60_965_224 * 4
    assert bytes_sent(network, "data", 2, 128, compress=True) == 60_965_224 * 2
    shared = 2_334_080 + 1000  # convolutions, biases of fc8
    hybrid = shared * 4 + 128 * (256 * 6 * 6 + 4096 + 1000) * 2
    assert bytes_sent(network, "hybrid", 2, 128, width=2) == hybrid
    assert bytes_sent(network, "hybrid", 8, 128, width=2) == hybrid * 7 / 4


def test_masks_of_slices_and_parts_are_those_of_the_whole() -> None:
    whole = alexnet.KeyedDropout(0.5, salt=6)
    whole.set_position(99, 0)
    expected = whole.keep(12, 10)
    # two ranks of 6 rows, second micro-batch of 2 of 3 rows each, second half of the units
    part = alexnet.KeyedDropout(0.5, salt=6)
    part.unit_slice, part.parts, part.stride = 1, 2, 6
    for rank in (0, 1):
        part.set_position(99, rank * 6 + 3)
        assert torch.equal(part.keep(6, 5), expected[[3, 4, 5, 9, 10, 11], 5:])
    assert len({tuple(row.tolist()) for row in expected}) > 6
