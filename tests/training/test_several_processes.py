"""Two processes train what one would: the same curve, the same decisions, exact figures, checkpoints for either."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from process_pair import ByRank, ProcessGroup
from stocktake import distributed
from stocktake.errors import StocktakeError
from stocktake.models.network import create_network
from stocktake.models.precision import Precision
from stocktake.stages.prepare import PreparedData
from stocktake.training.checkpoints import BEST, LAST
from stocktake.training.data import BatchSampler, BinsDataModule, EpochSampler, collate
from stocktake.training.module import NetworkModule
from tiny_bins import TINY_BACKBONE, TINY_SIZE
from tiny_training import assert_same_curve, config, train

pytestmark = pytest.mark.usefixtures("one_thread")


# The shares -----------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(0, 60),
    batch_size=st.integers(1, 20),
    size=st.integers(1, 6),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_every_row_is_in_one_share_once(rows: int, batch_size: int, size: int, drop_last: bool, shuffle: bool) -> None:
    order = EpochSampler(rows, 3, shuffle)
    order.set_epoch(2)
    whole = list(BatchSampler(order, batch_size, drop_last=drop_last, shared=True))
    rows_of_all = list(chain.from_iterable(whole))
    assert [len(batch) for batch in whole[:-1]] == [batch_size] * len(whole[:-1])
    assert rows_of_all == list(order)[: len(rows_of_all)]
    assert len(rows_of_all) == (rows // batch_size * batch_size if drop_last else rows)

    for shared in (True, False):
        shares = [
            BatchSampler(order, batch_size, drop_last=drop_last, shared=shared, rank=rank, size=size)
            for rank in range(size)
        ]
        batches = [list(share) for share in shares]
        assert {len(share) for share in shares} == {len(own) for own in batches}, "all take as many steps"
        assert len({len(own) for own in batches}) == 1
        dealt = sorted(row for own in batches for batch in own for row in batch)
        assert dealt == sorted(rows_of_all), "every row once"
        if shared:
            for step, batch in enumerate(whole):
                assert sorted(chain.from_iterable(own[step] for own in batches)) == sorted(batch)
                assert max(len(own[step]) for own in batches) - min(len(own[step]) for own in batches) <= 1
        else:
            assert [batch for batch in (own[i] for i in range(len(batches[0])) for own in batches) if batch] == whole


def test_a_batch_of_nothing_is_a_batch() -> None:
    photos, targets = collate([])
    assert (len(photos), photos.dtype, len(targets), targets.dtype) == (0, torch.uint8, 0, torch.long)


# The same maths -------------------------------------------------------------------------------------------------------

BRANCHES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "schedule": "cosine"},
    "weighed": {
        "class_weight": "balanced",
        "label_smoothing": 0.1,
        "ordinal_smoothing": 0.1,
        "accumulate": 2,
        "gradient_clip": 0.1,
    },
    "frozen": {"epochs": 4, "freeze_epochs": 2, "schedule": "constant"},
    "one short batch": {"batch_size": 1000},
}


@pytest.mark.slow
@pytest.mark.parametrize("branch", BRANCHES)
def test_two_processes_learn_what_one_does(
    branch: str, pair: ProcessGroup, tiny_bench: PreparedData, tmp_path: Path
) -> None:
    given = config(**BRANCHES[branch])
    alone = train(tiny_bench, given, tmp_path / "alone", batchnorm=False)
    first, second = pair.run(train, tiny_bench, given, tmp_path / "pair", None, "fp32", False)
    assert_same_curve(alone[0], first[0])
    assert alone[0][0]["train/loss"] != alone[0][-1]["train/loss"]
    assert second[0] == [], "only the first process is told"
    assert first[1] == second[1]
    assert first[1].best_epoch == alone[1].best_epoch
    for name, value in alone[2].items():
        assert torch.equal(first[2][name], second[2][name]), name
        torch.testing.assert_close(first[2][name], value, atol=1e-4, rtol=1e-3)
    assert {path.name for path in (tmp_path / "pair").iterdir()} == {BEST, LAST}
    saved = torch.load(tmp_path / "pair" / LAST, weights_only=True)
    assert set(saved["state_dict"]) == set(torch.load(tmp_path / "alone" / LAST, weights_only=True)["state_dict"])


def test_on_a_cpu_each_process_normalises_its_share(pair: ProcessGroup, few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=1, batch_size=4)
    alone = train(few_bins, given, tmp_path / "alone")
    first, second = pair.run(train, few_bins, given, tmp_path / "pair")
    assert alone[0][0]["train/loss"] != pytest.approx(first[0][0]["train/loss"], abs=1e-4), "another training"
    for name, value in first[2].items():
        assert torch.equal(value, second[2][name]), name


def test_bf16_in_two_processes(pair: ProcessGroup, few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=1, batch_size=4)
    form: Precision = "bf16"
    alone = train(few_bins, given, tmp_path / "alone", precision=form, batchnorm=False)
    first, _ = pair.run(train, few_bins, given, tmp_path / "pair", None, form, False)
    assert first[0][0]["train/loss"] == pytest.approx(alone[0][0]["train/loss"], rel=0.05)
    assert {value.dtype for value in first[2].values()} <= {torch.float32, torch.int64}


# Exact figures --------------------------------------------------------------------------------------------------------


def validate(prepared: PreparedData, batch_size: int) -> tuple[dict[str, float], int]:
    """The figures of val in an untrained network, and how many photos this process looked at."""
    world = distributed.world()
    data = BinsDataModule(
        prepared.manifest,
        prepared.photos,
        batch_size=batch_size,
        augment="none",
        workers=0,
        seed=0,
        rank=world.rank,
        size=world.size,
    )
    model = create_network(prepared.manifest.labels, TINY_SIZE, TINY_BACKBONE, "none", seed=0).eval()
    module = NetworkModule(model, config(), [1, 1, 1])
    seen = 0
    with torch.no_grad():
        for index, batch in enumerate(data.val_dataloader()):
            module.validation_step(batch, index)
            seen += len(batch[1])
    return module._figures(module.val_loss, module.val_confusion), seen


@pytest.mark.parametrize("photos", [1, 2, 3, 5, 8, 13])
def test_figures_are_those_of_one_process_to_the_last_digit(
    photos: int, pair: ProcessGroup, tiny_bench: PreparedData
) -> None:
    bins = tiny_bench.manifest.bins
    val = bins[bins["split"] == "val"].iloc[:photos]
    kept = bins[(bins["split"] != "val") | bins["id"].isin(val["id"])].reset_index(drop=True)
    prepared = replace(tiny_bench, manifest=replace(tiny_bench.manifest, bins=kept))
    for batch_size in (2, 4):
        alone, seen = validate(prepared, batch_size)
        assert seen == photos
        told = pair.run(validate, prepared, batch_size)
        assert sum(count for _, count in told) == photos, "no photo is looked at twice"
        if photos <= batch_size:
            assert told[1][1] == 0, "the second process has none at all"
        loss = alone.pop("loss")
        for figures, _ in told:
            assert figures.pop("loss") == pytest.approx(loss, rel=1e-6)
            assert figures == pytest.approx(alone, abs=0, rel=0, nan_ok=True)


# Decisions and checkpoints --------------------------------------------------------------------------------------------


def test_both_stop_when_the_first_is_told_to(pair: ProcessGroup, few_bins: PreparedData, tmp_path: Path) -> None:
    first, second = pair.run(train, few_bins, config(epochs=6, batch_size=4), tmp_path, 2)
    assert [one["epoch"] for one in first[0]] == [1, 2]
    assert first[1].epochs == second[1].epochs == 2


def test_both_stop_early_at_the_same_epoch(pair: ProcessGroup, few_bins: PreparedData, tmp_path: Path) -> None:
    given = config(epochs=20, batch_size=4, lr=1e-12, patience=2, schedule="constant")
    first, second = pair.run(train, few_bins, given, tmp_path)
    scores = [one["val/macro_f1"] for one in first[0]]
    assert len(scores) == scores.index(max(scores)) + 3 < 20
    assert first[1] == second[1]
    assert first[1].epochs == len(scores)


@pytest.mark.slow
@pytest.mark.parametrize("begun_by", ["one", "two"])
def test_another_number_of_processes_goes_on(
    begun_by: str, pair: ProcessGroup, few_bins: PreparedData, tmp_path: Path
) -> None:
    given = config(epochs=4, batch_size=4)
    whole = train(few_bins, given, tmp_path / "whole", batchnorm=False)
    if begun_by == "two":
        pair.run(train, few_bins, given, tmp_path / "begun", 2, "fp32", False)
        gone_on = train(few_bins, given, tmp_path / "begun", batchnorm=False)
    else:
        train(few_bins, given, tmp_path / "begun", stop_at=2, batchnorm=False)
        # another machine sees no file of the first one's
        places = ByRank(tmp_path / "begun", tmp_path / "elsewhere")
        with_workspace = replace(given, workspace=str(tmp_path / "workspace"))
        gone_on, other = pair.run(train, few_bins, with_workspace, places, None, "fp32", False)
        assert not (tmp_path / "elsewhere").exists()
        assert list((tmp_path / "workspace").iterdir()) == []
        for name, value in gone_on[2].items():
            assert torch.equal(value, other[2][name]), name
    assert_same_curve(gone_on[0], whole[0][2:])
    assert gone_on[1].best_epoch == whole[1].best_epoch


def test_what_goes_wrong_in_all_is_told_by_all(pair: ProcessGroup, few_bins: PreparedData, tmp_path: Path) -> None:
    for settings, said in (
        (config(batch_size=7), "--batch_size 7 is the batch of all processes together, and 2 cannot share it"),
        (config(batch_size=2), "--batch_size 2 .* give a multiple of 2, from 4"),
        (config(batch_size=4, lr=100.0, optimizer="sgd", gradient_clip=0, epochs=8), "lower --lr"),
    ):
        with pytest.raises(StocktakeError, match=said):
            pair.run(train, few_bins, settings, tmp_path / said[:12], None, "fp32", False)
    assert [pid for pid, _ in pair.run(_who)] == [pid for pid, _ in pair.run(_who)], "they are well"


def _who() -> tuple[int, int]:
    return os.getpid(), distributed.gather(distributed.world().rank)[-1]


def test_dropout_draws_for_each_process(pair: ProcessGroup, few_bins: PreparedData) -> None:
    drawn = pair.run(_draw, few_bins)
    assert not torch.equal(*drawn)
    assert all(torch.equal(one, other) for one, other in zip(drawn, pair.run(_draw, few_bins), strict=True))


def _draw(prepared: PreparedData) -> torch.Tensor:
    module = NetworkModule(
        create_network(prepared.manifest.labels, TINY_SIZE, TINY_BACKBONE, "none", seed=0), config(), [1, 1, 1]
    )
    module._trainer = type("Trainer", (), {"current_epoch": 0, "global_rank": distributed.world().rank})()  # type: ignore[assignment]
    module.on_train_batch_start(None, 3)
    return torch.rand(4)


def test_shares_of_the_epochs_of_a_bench(few_bins: PreparedData) -> None:
    """The photos of a global batch are the same, augmented the same, for any number of processes."""

    def epoch(rank: int, size: int) -> list[np.ndarray[Any, Any]]:
        data = BinsDataModule(
            few_bins.manifest,
            few_bins.photos,
            batch_size=6,
            augment="full",
            workers=0,
            seed=0,
            rank=rank,
            size=size,
        )
        return [photos.numpy() for photos, _ in data.train_dataloader()]

    whole = epoch(0, 1)
    for size in (2, 3):
        shares = [epoch(rank, size) for rank in range(size)]
        for step, batch in enumerate(whole):
            for rank in range(size):
                assert np.array_equal(shares[rank][step], batch[rank::size])
