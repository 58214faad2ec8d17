"""Aliases that move, the history, rollbacks, and two who promote at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from registry_store import RUNS, make_run, promoted
from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.model_card_data import publish_card, try_to_publish_card
from stocktake.registry.promotion import (
    EVENT_TAG,
    FORCED,
    PREVIOUS_TAG,
    PROMOTED,
    REJECTED,
    ROLLED_BACK,
    ChampionMovedError,
    history,
    record_challenger,
    record_rejection,
    roll_back,
    set_challenger,
    set_champion,
)
from stocktake.registry.registration import register_run
from stocktake.registry.versions import ModelRegistry


def rolled_back(registry: ModelRegistry, reason: str | None = None) -> int:
    """Roll back; return the version that is the champion then."""
    return roll_back(registry, reason)[1].number


def test_promotions_move_the_aliases_and_are_remembered(three: ModelRegistry) -> None:
    set_challenger(three, three.version("1"))
    record_rejection(three, three.version("1"), None, None, {"failed": ["gain"]})
    assert three.aliases() == {"candidate": 3, "challenger": 1}
    event = promoted(three, 1, forced=True, reason="  we must  ", figures={"gain": 0.1})
    assert (event.action, event.reason, event.before, event.after, event.figures) == (
        FORCED,
        "we must",
        None,
        1,
        {"gain": 0.1},
    )
    assert "@" in event.by
    assert event.at.endswith("Z")
    assert three.aliases() == {"candidate": 3, "champion": 1}
    with pytest.raises(StocktakeError, match="stocktake/1"):
        set_challenger(three, three.version("1"))
    set_challenger(three, three.version("3"))
    record_challenger(three, three.version("3"), None)
    promoted(three, 2)
    assert three.aliases() == {"candidate": 3, "champion": 2}
    events = history(three)
    assert [(event.action, event.version, event.before, event.after) for event in events] == [
        (REJECTED, 1, None, None),
        (FORCED, 1, None, 1),
        ("challenger", 3, 1, 1),
        (PROMOTED, 2, 1, 2),
    ]
    assert three.registered().tags[PREVIOUS_TAG] == "1"


def test_rollbacks_go_further_and_further_back(three: ModelRegistry) -> None:
    with pytest.raises(StocktakeError, match="no champion"):
        rolled_back(three)
    promoted(three, 1)
    with pytest.raises(StocktakeError, match="stocktake/1"):
        rolled_back(three)
    promoted(three, 2)
    promoted(three, 3)
    assert rolled_back(three, "wrong counts") == 2
    assert three.aliases() == {"candidate": 3, "champion": 2}
    assert rolled_back(three) == 1
    with pytest.raises(StocktakeError, match="first champion"):
        rolled_back(three)
    promoted(three, 3)
    assert rolled_back(three) == 1
    events = [event for event in history(three) if event.action == ROLLED_BACK]
    assert [(event.version, event.before, event.after, event.reason) for event in events] == [
        (3, 3, 2, "wrong counts"),
        (2, 2, 1, None),
        (3, 3, 1, None),
    ]


def test_going_back_and_forth_between_two_versions_ends(three: ModelRegistry) -> None:
    for number in (1, 2, 1):
        promoted(three, number)
    assert [rolled_back(three), rolled_back(three)] == [2, 1]
    with pytest.raises(StocktakeError, match="first champion"):
        rolled_back(three)


def test_a_rollback_passes_over_a_version_that_was_deleted(three: ModelRegistry) -> None:
    for number in (1, 2, 3):
        promoted(three, number)
    three.client.delete_model_version(three.name, "2")
    assert rolled_back(three) == 1


def test_a_promotion_that_died_before_the_alias_moved_changes_no_rollback(three: ModelRegistry) -> None:
    promoted(three, 1)
    promoted(three, 2)
    three.client.set_registered_model_tag(three.name, PREVIOUS_TAG, "2,1")  # written, and the alias not moved
    assert rolled_back(three) == 1


def test_an_event_fits_into_a_tag_and_one_that_cannot_be_read_is_left_out(three: ModelRegistry) -> None:
    event = promoted(three, 1, reason="r" * 5000, figures={"gain": 1.0, "failed": ["f" * 200] * 40})
    assert len(str(event.reason)) == 500
    assert history(three) == [event]
    assert event.figures == {"gain": 1.0}
    three.client.set_registered_model_tag(three.name, f"{EVENT_TAG}1", "{not json")
    three.client.set_registered_model_tag(three.name, f"{EVENT_TAG}2", '{"other": 1}')
    assert history(three) == [event]


def test_a_champion_that_moved_meanwhile_is_noticed(three: ModelRegistry) -> None:
    promoted(three, 1)
    champion = three.champion()
    three.client.set_registered_model_alias(three.name, "champion", "2")
    with pytest.raises(ChampionMovedError) as moved:
        set_champion(three, three.version("3"), champion)
    assert (moved.value.expected, moved.value.actual) == (1, 2)
    assert three.aliases()["champion"] == 2
    assert len(history(three)) == 1


def test_a_champion_that_moves_right_after_the_writing_is_noticed(
    three: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a server, where nothing holds the other promotion back."""

    def set_and_lose(alias: str, version: Any) -> None:
        three.client.set_registered_model_alias(three.name, alias, str(version.number))
        three.client.set_registered_model_alias(three.name, alias, "2")

    monkeypatch.setattr(three, "set_alias", set_and_lose)
    with pytest.raises(ChampionMovedError):
        set_champion(three, three.version("3"), None)
    assert three.aliases()["champion"] == 2
    assert history(three) == []


RACER = """
import sys
from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.registry.promotion import set_champion
from stocktake.registry.versions import ModelRegistry
with ModelRegistry(TrackingConfig(uri=sys.argv[1])).opened() as registry:
    version, champion = registry.version(sys.argv[2]), registry.champion()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        set_champion(registry, version, champion)
    except StocktakeError as error:
        print(type(error).__name__, flush=True)
    else:
        print("won", flush=True)
"""


@pytest.mark.slow
def test_of_two_processes_one_wins_and_the_other_is_told(three: ModelRegistry, tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RACER, f"sqlite:///{tmp_path}/mlflow.db", number],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in ("1", "2")
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline().strip() == "ready"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        ends = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    assert sorted(ends) == ["ChampionMovedError", "won"]
    assert three.aliases()["champion"] == ends.index("won") + 1
    assert [event.action for event in history(three)] == [PROMOTED]


@pytest.mark.slow
def test_all_of_it_over_http(server: Any, model_folder: Path) -> None:
    tracking = TrackingConfig(uri=server.uri, system_metrics=False)
    runs = [make_run(model_folder, name, tracking) for name in ("one", "two")]
    with ModelRegistry(tracking).opened() as registry:
        for run in runs:
            register_run(registry, str(run.folder), RUNS)
        promoted(registry, 1)
        champion = registry.champion()
        promoted(registry, 2)
        with pytest.raises(ChampionMovedError):
            set_champion(registry, registry.version("1"), champion)
        assert rolled_back(registry) == 1
        assert registry.aliases() == {"candidate": 2, "champion": 1}
        assert len(history(registry)) == 3
        page = publish_card(registry, registry.version("1"), Path("workspace"))
        assert "rolled back" in page.read_text()
        files = {file.path for file in registry.client.list_artifacts(str(runs[0].run_id), "model-card")}
        assert files == {"model-card/card.html", "model-card/card.md"}
        version = registry.version("1")
        server.kill()
        assert try_to_publish_card(registry, version, Path("workspace")) is None
    with pytest.raises(StocktakeError), ModelRegistry(tracking).opened():
        pass
