from __future__ import annotations

import numpy as np
import pytest
import torch

from stocktake.training.data import BinsDataModule, EpochSampler, PhotoDataset


def data_module(prepared, *, augment: str = "full", workers: int = 0, seed: int = 0, batch_size: int = 8):
    return BinsDataModule(
        prepared.manifest, prepared.photos, batch_size=batch_size, augment=augment, workers=workers, seed=seed
    )


def dataset(prepared, augment: str, seed: int = 0) -> PhotoDataset:
    return PhotoDataset(prepared.photos, prepared.manifest.split("train"), prepared.manifest.labels, augment, seed)


def epoch_of(loader, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    loader.batch_sampler.sampler.set_epoch(epoch)
    photos, targets = zip(*loader, strict=True)
    return torch.cat(photos), torch.cat(targets)


def test_targets_are_places_among_the_labels(tiny_bench) -> None:
    train = tiny_bench.manifest.split("train")
    for labels, less in (((0, 1, 2), 1), ((1, 2, 3), 0)):
        bins = train.assign(quantity=train["quantity"] - less)
        photos = PhotoDataset(tiny_bench.photos, bins, labels, "none", 0)
        assert [photos[0, row][1] for row in range(len(train))] == (train["quantity"] - 1).tolist()


@pytest.mark.slow
def test_workers_do_not_change_what_is_seen(tiny_bench) -> None:
    here = data_module(tiny_bench, workers=0).train_dataloader()
    there = data_module(tiny_bench, workers=2).train_dataloader()
    for epoch in (0, 1):
        for one, other in zip(epoch_of(here, epoch), epoch_of(there, epoch), strict=True):
            assert torch.equal(one, other)


def test_augmentation_is_a_function_of_seed_epoch_and_row(tiny_bench) -> None:
    photos = dataset(tiny_bench, "full")
    first, _ = photos[0, 3]
    torch.rand(17)
    again, _ = dataset(tiny_bench, "full")[0, 3]
    assert torch.equal(first, again)
    others = [photos[1, 3][0], dataset(tiny_bench, "full", seed=1)[0, 3][0]]
    assert not any(torch.equal(first, other) for other in others)
    train = tiny_bench.manifest.split("train")
    plain = tiny_bench.photos[train["hash"][3]]
    assert np.abs(first.numpy().astype(int) - plain).mean() > 1, "it is augmented"
    assert first.shape == (32, 32, 3)
    assert first.dtype == torch.uint8
    assert first.is_contiguous()


def test_augmenting_leaves_the_callers_random_stream_alone(tiny_bench) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    _ = dataset(tiny_bench, "full")[0, 0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_policies(tiny_bench) -> None:
    train = tiny_bench.manifest.split("train")
    plain = torch.from_numpy(tiny_bench.photos.read(train["hash"].tolist()))
    none, flip = dataset(tiny_bench, "none"), dataset(tiny_bench, "flip")
    flipped = 0
    for row in range(len(train)):
        assert torch.equal(none[5, row][0], plain[row])
        assert none[5, row][1] == train["quantity"][row] - 1
        seen = flip[5, row][0]
        is_flipped = torch.equal(seen, plain[row].flip(1))
        assert is_flipped or torch.equal(seen, plain[row])
        flipped += is_flipped
    assert 0.25 * len(train) < flipped < 0.75 * len(train)


def test_the_order_is_shuffled_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[tuple[int, int]]:
        sampler = EpochSampler(50, seed, shuffle)
        sampler.set_epoch(epoch)
        assert len(sampler) == 50
        return list(sampler)

    assert order(0, 2) == order(0, 2)
    assert {epoch for epoch, _ in order(0, 2)} == {2}
    rows = [[row for _, row in one] for one in (order(0, 2), order(0, 3), order(1, 2))]
    assert all(sorted(one) == list(range(50)) for one in rows)
    assert rows[0] != rows[1]
    assert rows[0] != rows[2]
    assert [row for _, row in order(0, 2, shuffle=False)] == list(range(50))


def test_train_is_shuffled_and_the_last_short_batch_is_dropped(tiny_bench) -> None:
    train = tiny_bench.manifest.split("train")
    assert len(train) % 8 != 0, "or the test shows nothing"
    loader = data_module(tiny_bench, augment="none").train_dataloader()
    photos, targets = epoch_of(loader, 0)
    assert len(photos) == len(train) // 8 * 8
    assert targets.tolist() != (train["quantity"] - 1).tolist()[: len(targets)]
    assert not torch.equal(targets, epoch_of(loader, 1)[1])


def test_a_split_smaller_than_a_batch_is_one_batch(few_bins) -> None:
    batches = list(data_module(few_bins, batch_size=500).train_dataloader())
    assert [len(targets) for _, targets in batches] == [len(few_bins.manifest.split("train"))]


def test_val_is_complete_in_order_and_not_augmented(tiny_bench) -> None:
    val = tiny_bench.manifest.split("val")
    photos, targets = epoch_of(data_module(tiny_bench).val_dataloader(), 3)
    assert targets.tolist() == (val["quantity"] - 1).tolist()
    assert torch.equal(photos, torch.from_numpy(tiny_bench.photos.read(val["hash"].tolist())))
