"""From runs to a champion and back, by the commands, over one ladder on the tiny root."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from safetensors.torch import save_file

from stocktake.commands import promote as promote_module
from stocktake.commands.ladder import ladder
from stocktake.config.runs import TrackingConfig
from stocktake.config.training import HeadConfig, LadderConfig, PcaSvmConfig
from stocktake.models.backbones import create_backbone
from stocktake.registry.gate_inputs import ENGINE_TAG
from stocktake.registry.split_uses import SplitUse
from tiny_bins import PLAIN_BACKBONE

pytestmark = pytest.mark.slow


@dataclass
class Shop:
    """A store of its own over the runs of the ladder: what is promoted in it is promoted nowhere else."""

    folder: Path
    uri: str
    runs: dict[str, Any]
    """Of the ladder, by stage."""
    command: Callable[..., Any]

    @property
    def client(self) -> Any:
        return mlflow.MlflowClient(self.uri, self.uri)

    def run(self, *words: str) -> Any:
        """A command of the registry."""
        return self.command(*words, "--tracking.uri", self.uri)

    def aliases(self) -> dict[str, int]:
        return {alias: int(n) for alias, n in self.client.get_registered_model("stocktake").aliases.items()}

    def history(self) -> list[dict[str, Any]]:
        return list(json.loads(self.run("registry", "--format", "json").out)["history"])


@pytest.fixture(scope="module")
def laddered(
    tiny_settings: dict[str, Any], empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder with the store and the files of a ladder of majority, classical and frozen."""
    folder = tmp_path_factory.mktemp("laddered")
    before = Path.cwd()
    patch = pytest.MonkeyPatch()
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        patch.delenv(name, raising=False)
    patch.chdir(folder)
    shutil.copy(empty_store, folder / "mlflow.db")
    config = LadderConfig(
        **{**tiny_settings, "tracking": TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", system_metrics=False)},
        workspace="workspace",
        backbone=PLAIN_BACKBONE,
        weights=str(folder / "blind.safetensors"),
        precision="fp32",
        stages=("majority", "classical", "frozen"),
        classical=PcaSvmConfig(pixels=16, components=20),
        head=HeadConfig(class_weight="none"),
    )
    # all features are 0: the frozen stage learns nothing but how often a quantity is
    backbone, _ = create_backbone(PLAIN_BACKBONE, config.image_size)
    save_file({name: tensor * 0 for name, tensor in backbone.state_dict().items()}, folder / "blind.safetensors")
    ladder(config)
    assert (folder / "workspace" / "registry" / "stocktake-1" / "card.html").is_file()
    patch.undo()
    assert Path.cwd() == before
    yield folder


@pytest.fixture
def shop(laddered: Path, sqlite_store: str, tmp_path: Path, stocktake: Callable[..., Any]) -> Shop:
    shutil.copy(laddered / "mlflow.db", tmp_path / "mlflow.db")
    client = mlflow.MlflowClient(sqlite_store, sqlite_store)
    experiment = client.get_experiment_by_name("stocktake").experiment_id
    runs = {run.data.tags["stage"]: run for run in client.search_runs([experiment])}
    return Shop(tmp_path, sqlite_store, runs, stocktake)


def verdicts(out: str) -> list[str]:
    """The table's first words, rule by rule."""
    return [line.split("  ")[0].strip() for line in out.splitlines() if line.startswith(("passed ", "FAILED "))]


def test_the_best_of_a_ladder_becomes_the_first_champion(shop: Shop) -> None:
    assert shop.aliases() == {"candidate": 1}
    ended = shop.run("promote", "--reason", "first light")
    assert (ended.code, ended.err) == (0, "")
    assert verdicts(ended.out) == ["passed"] * 7
    assert "champion: stocktake/1; models:/stocktake@champion" in ended.out
    assert shop.aliases() == {"candidate": 1, "champion": 1}
    (event,) = shop.history()
    assert (event["action"], event["before"], event["after"], event["reason"]) == ("promoted", None, 1, "first light")
    figures = event["figures"]
    run = shop.runs["classical"]
    assert figures["frozen baseline: macro_f1"] == pytest.approx(run.data.metrics["test/macro_f1"], abs=1e-6)
    assert figures["frozen baseline: gain_bound"] > 0
    assert (figures["use"], figures["without_gain"], figures["metric"]) == (1, 0, "macro_f1")
    assert "use 1 of these test bins" in ended.out
    assert "fewer than 30 test bins" in ended.out
    assert figures["majority baseline: n"] == run.data.metrics["test/n"]
    assert figures["data.fingerprint"] == run.data.tags["data.fingerprint"]
    assert figures["git.commit"] == run.data.tags["git.commit"]
    assert figures["latency_ms"] > 0
    card = (shop.folder / "workspace" / "registry" / "stocktake-1" / "card.md").read_text()
    assert "first light" in card
    assert "ms a photo (median)" in card
    assert "export check: passed" in card
    assert "use 1 of these test bins" in card
    assert "card.html" in " ".join(file.path for file in shop.client.list_artifacts(run.info.run_id, "model-card"))
    assert shop.client.get_model_version("stocktake", "1").description.startswith("# Model card: stocktake/1")

    ended = shop.run("registry")
    assert ended.code == 0
    for text in ("candidate", "champion", "classical", "1-3", "passed", "first light", "none → 1"):
        assert text in ended.out
    (row,) = json.loads(shop.run("registry", "--format", "json").out)["versions"]
    assert row["export_check"] is True
    assert row["test/macro_f1_low"] <= row["test/macro_f1"] <= row["test/macro_f1_high"]
    assert shop.run("promote").err == ("stocktake: stocktake/1 is the champion already: choose another --version\n")


def test_a_baseline_passes_by_force_alone_and_is_beaten_and_gone_back_to(shop: Shop) -> None:
    ended = shop.run("register", "--run", shop.runs["frozen"].info.run_id)
    assert (ended.code, ended.err) == (0, "")
    assert "candidate: stocktake/2 (frozen), models:/stocktake@candidate" in ended.out
    ended = shop.run("promote")
    assert ended.code == 2
    assert "the version is a frozen baseline itself" in ended.err
    assert "It stays the challenger" in ended.err
    assert ended.err.count("\n") == 1
    assert shop.aliases() == {"candidate": 2, "challenger": 2}
    assert "--force needs --reason" in shop.run("promote", "--force").err
    ended = shop.run("promote", "--force", "--reason", "a start")
    assert (ended.code, ended.err) == (0, "")
    assert "by force: 1 of 5 rules missed" in ended.out
    assert shop.aliases() == {"candidate": 2, "champion": 2}

    ended = shop.run("promote", "--version", "1")
    assert (ended.code, ended.err) == (0, "")
    assert verdicts(ended.out) == ["passed"] * 6
    assert "champion: stocktake/1, it was stocktake/2" in ended.out
    ended = shop.run("rollback", "--reason", "too good to be true")
    assert (ended.code, ended.err) == (0, "")
    assert "champion: stocktake/2, it was stocktake/1" in ended.out
    assert shop.aliases() == {"candidate": 2, "champion": 2}
    ended = shop.run("rollback")
    assert ended.code == 2
    assert "stocktake/2 is the first champion" in ended.err
    assert [
        (event["action"], event["version"], event["before"], event["after"], event["reason"])
        for event in shop.history()
    ] == [
        ("rejected", 2, None, None, None),
        ("forced", 2, None, 2, "a start"),
        ("promoted", 1, 2, 1, None),
        ("rolled back", 1, 1, 2, "too good to be true"),
    ]
    rejected, forced, promoted, _ = shop.history()
    assert rejected["figures"]["failed"] == forced["figures"]["failed"]
    assert promoted["figures"]["gain_bound"] > 0
    assert "failed" not in promoted["figures"]
    card = (shop.folder / "workspace" / "registry" / "stocktake-1" / "card.md").read_text()
    assert "too good to be true" in card


def test_refusals_use_up_the_test_split_and_the_same_comparison_does_not(shop: Shop) -> None:
    shop.run("register", "--run", shop.runs["frozen"].info.run_id)
    shop.run("promote", "--version", "2", "--force", "--reason", "a start")  # no baseline to compare it with: no use
    levels = []
    for words in (("majority",), ("majority",), ("majority", "--gate.metric", "rmse"), ("classical",)):
        shop.run("register", "--run", shop.runs[words[0]].info.run_id)
        assert shop.run("promote", *words[1:]).code == (0 if words == ("classical",) else 2)
        levels.append(shop.history()[-1]["figures"]["level"])
    first = SplitUse(1, 0).level
    assert levels == pytest.approx([first, first, first / 4, first / 9], rel=1e-4)
    assert shop.history()[-1]["figures"]["use"] == 3


def test_predictions_of_the_training_framework_are_not_compared(shop: Shop) -> None:
    shop.client.delete_tag(shop.runs["classical"].info.run_id, ENGINE_TAG)  # as a run of an earlier version
    ended = shop.run("promote")
    assert ended.code == 2
    assert ENGINE_TAG in ended.err
    assert "stocktake evaluate --model models:/stocktake/1" in ended.err
    assert "use" not in shop.history()[-1]["figures"]


def test_each_limit_refuses_by_its_value_and_changes_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.run("register", "--run", shop.runs["frozen"].info.run_id)
    shop.run("promote", "--force", "--reason", "a start")
    strict = ("--gate.min_gain", "0.99", "--gate.max_latency_ms", "0", "--gate.max_size_mb", "0")
    ended = shop.run("promote", "--version", "1", *strict)
    assert ended.code == 2
    assert "refused by 3 of 6 rules: gain over the champion stocktake/2: " in ended.err
    assert re.search(r"\(above 0\.990; missed by 0\.\d{3}\), macro-F1 1\.000 against", ended.err)
    assert re.search(r"latency of one photo: \d+\.\d ms \(below 0\.0 ms; missed by", ended.err)
    assert re.search(r"size of the model: \d+\.\d MB \(below 0\.0 MB; missed by", ended.err)
    assert shop.aliases() == {"candidate": 2, "challenger": 1, "champion": 2}
    assert len(shop.history()[-1]["figures"]["failed"]) == 3

    unchecked = promote_module.ServingStats(1.0, 1.0, "openvino", None)
    monkeypatch.setattr(promote_module, "measure", lambda *_: unchecked)  # as a model of an earlier export
    ended = shop.run("promote", "--version", "1")
    assert ended.code == 2
    assert "refused by 1 of 6 rules: export check: model.json holds no check: export the model anew" in ended.err

    ended = shop.run("promote", "--version", "1", "--to", "challenger", "--reason", "in the shade")
    assert (ended.code, ended.out.splitlines()[0]) == (0, "challenger: stocktake/1")
    assert shop.history()[-1]["action"] == "challenger"
    assert shop.aliases()["champion"] == 2


def said_command(err: str) -> list[str]:
    """The words of the command that a refusal names."""
    found = re.search(r"make it with: stocktake (.*?)\)[.;]", err)
    assert found, err
    return shlex.split(found.group(1))


def test_a_missing_baseline_is_made_by_the_command_that_is_named(shop: Shop) -> None:
    shop.client.delete_run(shop.runs["majority"].info.run_id)
    ended = shop.run("promote")
    assert ended.code == 2
    assert "there is no run of it on task 1-3, data" in ended.err
    words = said_command(ended.err)
    assert words[0] == "majority"
    assert f"  stocktake {shlex.join(words)}" in ended.out
    made = shop.command(*words, "--tracking.system_metrics", "false")
    assert made.code == 0, made.err
    ended = shop.run("promote")
    assert (ended.code, ended.err) == (0, "")


def test_a_champion_of_other_data_is_evaluated_by_the_command_that_is_named(
    shop: Shop, tiny_settings: dict[str, Any], tiny_root: Path
) -> None:
    other = ["classical", "--root", str(tiny_root), "--task", "1-3", "--image_size", "32", "--limit", "80"]
    other += [
        "--split.fractions",
        "[0.6,0.2,0.2]",
        "--split.near_duplicate_distance",
        "0",
        "--tracking.run_name",
        "fewer bins",
    ]
    other += ["--classical.pixels", "2", "--classical.components", "2", "--classical.c", "0.01"]
    made = shop.run(*other, "--tracking.system_metrics", "false")
    assert made.code == 0, made.err
    assert shop.run("register", "--run", "fewer bins").code == 0
    ended = shop.run("promote", "--force", "--reason", "other data")
    assert ended.code == 0, ended.err
    ended = shop.run("promote", "--version", "1")
    assert ended.code == 2
    words = said_command(ended.err)
    assert words[:3] == ["evaluate", "--model", "models:/stocktake/2"]
    on_val = shop.command(*words, "--on", "val", "--tracking.system_metrics", "false")
    assert on_val.code == 0, on_val.err
    assert shop.run("promote", "--version", "1").code == 2, "an evaluation on val is none on test"
    made = shop.command(*words, "--tracking.system_metrics", "false")
    assert made.code == 0, made.err
    ended = shop.run("promote", "--version", "1")
    assert (ended.code, ended.err) == (0, "")
    assert "champion: stocktake/1, it was stocktake/2" in ended.out


def test_what_is_missing_is_said_in_one_line(shop: Shop) -> None:
    for words, said in (
        (("promote", "--version", "7"), "stocktake has no version 7: --version can be 1, or candidate (1)"),
        (("promote", "--model_name", "other"), "there is no registered model 'other'"),
        (("rollback",), "stocktake has no champion to roll back from: `stocktake promote` makes one"),
        (("registry", "--model_name", "other"), "--model_name can be stocktake"),
        (("register",), "--run is missing"),
        (("register", "--run", "nobody"), "no run folder and no run 'nobody'"),
        (("promote", "--gate.max_recall_drop", "2"), "--gate.max_recall_drop 2"),
    ):
        ended = shop.run(*words)
        assert ended.code == 2
        assert said in ended.err
        assert ended.err.count("\n") == 1
    assert shop.aliases() == {"candidate": 1}


def test_the_photo_that_latency_is_measured_with(tmp_path: Path) -> None:
    assert promote_module.example_photo(tmp_path)[:2] == b"\xff\xd8"
    (tmp_path / "input_example.json").write_text('{"columns": ["photo"], "data": [["AAEC"]]}')
    assert promote_module.example_photo(tmp_path) == b"\x00\x01\x02"
    for content in ('{"data": []}', "[" * 100_000):
        (tmp_path / "input_example.json").write_text(content)
        assert promote_module.example_photo(tmp_path)[:2] == b"\xff\xd8"
