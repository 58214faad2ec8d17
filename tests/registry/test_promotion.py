"""Runs that become versions, aliases that move, the history, and rollbacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry import promotion
from stocktake.registry.model_card_data import publish_card, try_to_publish_card
from stocktake.registry.promotion import (
    FORCED,
    HISTORY_TAG,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    Event,
    challenge,
    earlier_champion,
    history,
    note_challenger,
    refuse,
)
from stocktake.registry.promotion_lock import promotion_lock
from stocktake.registry.registration import register_run
from stocktake.registry.versions import ModelRegistry, version_label
from stocktake.tracking.runs import start_run
from versioned_model import RUNS, crowned, lock_names, make_run, registry, rolled_back, three

__all__ = ["registry", "three"]


# Runs become versions -------------------------------------------------------------------------------------------------


def test_a_run_is_registered_by_id_name_and_folder_and_stays_one_version(
    registry: ModelRegistry, model_folder: Path
) -> None:
    run, other = make_run(model_folder, "wide"), make_run(model_folder, "deep")
    first = register_run(registry, str(run.run_id), RUNS)
    assert (first.label, first.uri, first.aliases, first.run_id) == (
        "stocktake/1",
        "models:/stocktake/1",
        ("candidate",),
        run.run_id,
    )
    assert (
        first.tags.items() >= {"stage": "wide", "task": "1-3", "data.fingerprint": "f1", "val/macro_f1": "0.3"}.items()
    )
    assert register_run(registry, "deep", RUNS).aliases == ("candidate",)
    assert registry.version("1").aliases == ()
    for asked in ("wide", str(run.folder), run.folder.name):
        assert register_run(registry, asked, RUNS).number == 1
    assert registry.version("candidate").number == 1
    assert [version.number for version in registry.versions()] == [1, 2]
    assert version_label("models:/stocktake@candidate", TrackingConfig()) == "stocktake/1"
    assert version_label("models:/stocktake/latest", TrackingConfig()) == "stocktake/2"
    for address in (
        f"runs:/{other.run_id}/model",
        "models:/stocktake@nobody",
        str(model_folder),
        "models:/other/latest",
    ):
        assert version_label(address, TrackingConfig()) is None


def test_a_run_that_cannot_be_registered_is_named_with_the_way_out(registry: ModelRegistry, model_folder: Path) -> None:
    with pytest.raises(StocktakeError, match=r"no experiment 'stocktake': --tracking.experiment can be 'Default'"):
        register_run(registry, "frozen", RUNS)
    with start_run(
        TrackingConfig(system_metrics=False), workspace=Path("workspace"), name="ladder", tags={"stage": "ladder"}
    ) as run:
        with run.child("best", {"stage": "best"}) as child:
            child.log_model(model_folder)
        run.flush()
        with pytest.raises(StocktakeError, match="has not finished"):
            register_run(registry, str(run.folder), RUNS)
        with pytest.raises(StocktakeError, match="is RUNNING: register one that has finished"):
            register_run(registry, str(run.run_id), RUNS)
    with pytest.raises(StocktakeError, match=rf"ladder has no model .* child runs are {child.run_id} \(best\)"):
        register_run(registry, "ladder", RUNS)
    with pytest.raises(StocktakeError, match=rf"no run folder and no run 'lader' .*{run.run_id} \(ladder\)"):
        register_run(registry, "lader", RUNS)
    with pytest.raises(StocktakeError, match="there is no run 0000"):
        register_run(registry, "0" * 32, RUNS)
    twice = [make_run(model_folder, "twice").run_id for _ in range(2)]
    with pytest.raises(StocktakeError, match=rf"several runs are named twice.*{twice[1]}.*{twice[0]}"):
        register_run(registry, "twice", RUNS)
    with start_run(
        TrackingConfig(system_metrics=False, offline=True), workspace=Path("workspace"), name="later", tags={}
    ) as later:
        later.log_model(model_folder)
    with pytest.raises(StocktakeError, match="`stocktake sync --workspace workspace` uploads it"):
        register_run(registry, later.folder.name, RUNS)


def test_a_version_that_is_not_there_is_named_with_those_that_are(three: ModelRegistry) -> None:
    for asked in ("9", "champion", "²"):
        with pytest.raises(StocktakeError, match=rf"no version {asked}: --version can be 1, 2, 3, or candidate \(3\)"):
            three.version(asked)
    with (
        pytest.raises(StocktakeError, match=r"no registered model 'other' .*--model_name can be stocktake"),
        ModelRegistry(TrackingConfig(model_name="other")).opened() as other,
    ):
        other.versions()
    with (
        pytest.raises(StocktakeError, match=r"--tracking\.offline"),
        ModelRegistry(TrackingConfig(offline=True)).opened(),
    ):
        pass


# History --------------------------------------------------------------------------------------------------------------


def test_promotions_move_the_aliases_and_are_remembered(three: ModelRegistry) -> None:
    with promotion_lock(three.client, three.name):
        challenge(three, three.version("1"))
        refuse(three, three.version("1"), None, None, {"failed": ["gain"]})
    assert three.aliases() == {"candidate": 3, "challenger": 1}
    event = crowned(three, 1, forced=True, reason="  we must  ", figures={"gain": 0.1})
    assert (event.action, event.why, event.before, event.after, event.figures) == (
        FORCED,
        "we must",
        None,
        1,
        {"gain": 0.1},
    )
    assert "@" in event.by
    assert event.at.endswith("Z")
    assert three.aliases() == {"candidate": 3, "champion": 1}
    with pytest.raises(StocktakeError, match="stocktake/1 is the champion already"):
        challenge(three, three.version("1"))
    challenge(three, three.version("3"))
    note_challenger(three, three.version("3"), None)
    crowned(three, 2)
    assert three.aliases() == {"candidate": 3, "champion": 2}
    events = history(three.versions())
    assert [(one.number, one.action, one.version, one.before, one.after) for one in events] == [
        (1, REFUSED, 1, None, None),
        (2, FORCED, 1, None, 1),
        (3, "challenger", 3, 1, 1),
        (4, PROMOTED, 2, 1, 2),
    ]
    kept = json.loads(three.version("1").tags[HISTORY_TAG])
    assert [one["n"] for one in kept] == [1, 2]
    assert kept[1].keys() == {"n", "action", "at", "by", "why", "from", "to", "version", "figures"}


def test_rollbacks_go_further_and_further_back(three: ModelRegistry) -> None:
    with pytest.raises(StocktakeError, match="no champion to roll back from"):
        rolled_back(three)
    crowned(three, 1)
    with pytest.raises(StocktakeError, match="stocktake/1 is the first champion"):
        rolled_back(three)
    crowned(three, 2)
    crowned(three, 3)
    assert rolled_back(three, "wrong counts") == 2
    assert three.aliases() == {"candidate": 3, "champion": 2}
    assert rolled_back(three) == 1
    with pytest.raises(StocktakeError, match="first champion"):
        rolled_back(three)
    crowned(three, 3)
    assert rolled_back(three) == 1
    events = [one for one in history(three.versions()) if one.action == ROLLED_BACK]
    assert [(one.version, one.before, one.after, one.why) for one in events] == [
        (3, 3, 2, "wrong counts"),
        (2, 2, 1, None),
        (3, 3, 1, None),
    ]


def test_a_rollback_passes_over_what_was_deleted_and_what_was_moved_by_hand(three: ModelRegistry) -> None:
    crowned(three, 1)
    crowned(three, 2)
    crowned(three, 3)
    three.client.delete_model_version(three.name, "2")
    assert rolled_back(three) == 1
    three.client.set_registered_model_alias(three.name, "champion", "3")  # by other hands
    assert rolled_back(three) == 1


def event(number: int, action: str, before: int | None, after: int | None) -> Event:
    return Event(number, action, "2026-01-01T00:00:00Z", "a@b", None, before, after, after or 0)


def test_who_was_the_champion_before() -> None:
    events = [event(1, PROMOTED, None, 1), event(2, PROMOTED, 1, 2), event(3, PROMOTED, 2, 1)]
    assert earlier_champion(events, 1, {1, 2}) == 2
    events.append(event(4, ROLLED_BACK, 1, 2))
    assert earlier_champion(events, 2, {1, 2}) == 1
    events.append(event(5, ROLLED_BACK, 2, 1))
    assert earlier_champion(events, 1, {1, 2}) is None
    by_hand = [event(1, PROMOTED, None, 1), event(2, PROMOTED, 7, 3)]
    assert earlier_champion(by_hand, 3, {1, 3, 7}) == 7
    assert earlier_champion(by_hand, 3, {1, 3}) == 1
    assert earlier_champion([], 5, {4, 5}) is None


def test_the_history_has_a_bound_and_refusals_go_first(three: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "_HISTORY_LENGTH", 1000)
    crowned(three, 1, reason="r" * 5000)
    assert len(str(history(three.versions())[0].why)) == 500
    for _ in range(4):
        refuse(three, three.version("1"), None, None, {})
    tag = three.version("1").tags[HISTORY_TAG]
    assert len(tag) <= 1000
    kept = [one["action"] for one in json.loads(tag)]
    assert kept in ([PROMOTED, REFUSED], [PROMOTED, REFUSED, REFUSED])
    three.set_tag(three.version("2"), HISTORY_TAG, "{not json")
    assert [one.number for one in history(three.versions())][0 :: len(kept) - 1] == [1, 5]


# A server -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_of_it_over_http(server: Any, model_folder: Path) -> None:
    tracking = TrackingConfig(uri=server.uri, system_metrics=False)
    runs = [make_run(model_folder, name, server.uri) for name in ("one", "two")]
    with ModelRegistry(tracking).opened() as registry:
        for run in runs:
            register_run(registry, str(run.folder), RUNS)
        assert version_label("models:/stocktake@candidate", tracking) == "stocktake/2"
        crowned(registry, 1)
        with (
            promotion_lock(registry.client, registry.name),
            pytest.raises(StocktakeError, match="process"),
        ):
            crowned(registry, 2)
        crowned(registry, 2)
        assert rolled_back(registry) == 1
        assert registry.aliases() == {"candidate": 2, "champion": 1}
        assert len(history(registry.versions())) == 3
        assert lock_names(registry) == []
        page = publish_card(registry, registry.version("1"), Path("workspace"))
        assert "rolled back" in page.read_text()
        there = {file.path for file in registry.client.list_artifacts(str(runs[0].run_id), "model-card")}
        assert there == {"model-card/card.html", "model-card/card.md"}
        version = registry.version("1")
        server.kill()
        assert try_to_publish_card(registry, version, Path("workspace")) is None
    with pytest.raises(StocktakeError, match="does not answer"), ModelRegistry(tracking).opened():
        pass
