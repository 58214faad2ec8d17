"""The study: a trial is handed out once, nothing is lost with a killed process, the same seed gives the same trials."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from stocktake.config import FinetuneConfig
from stocktake.errors import StocktakeError
from stocktake.locks import FileLock
from stocktake.tuning.space import Space, parse_space
from stocktake.tuning.storage import open_storage
from stocktake.tuning.study import (
    OBJECTIVES,
    PRUNERS,
    best_trial,
    create_study,
    failure_kind,
    failure_streak,
    finish,
    load_study,
    make_pruner,
    make_sampler,
    objectives_of,
    pareto_front,
    requeue_unfinished,
    take_trial,
    trials_table,
)

SPACE = parse_space(
    {
        "lr": {"log_uniform": [1e-4, 1e-2]},
        "epochs": {"integer": [2, 8]},
        "backbone": {
            "categorical": {"resnet18": {"weight_decay": {"uniform": [0.0, 0.2]}}, "resnet34": {}, "resnet50": None}
        },
    },
    FinetuneConfig(),
    "test",
)
KINDS = ("journal", "sqlite")
FORK = multiprocessing.get_context("fork")  # quick, and every process opens its storage after it


def place(kind: str, folder: Path) -> str:
    return str(folder / "study.journal") if kind == "journal" else f"sqlite:///{folder}/study.db"


def value_of(settings: dict[str, Any]) -> float:
    """A made-up macro-F1 of settings."""
    return 0.5 - abs(settings["lr"] - 2e-3) * 20 - settings.get("weight_decay", 0.1)


def take(study: optuna.Study, folder: Path, *, budget: int = 99, sampler: str = "random", seed: int = 0) -> Any:
    return take_trial(study, SPACE, sampler=sampler, seed=seed, budget=budget, lock=FileLock(folder / "trials.lock"))


def work(where: str, folder: Path, sampler: str, budget: int, sender: Connection | None = None) -> list[int]:
    """A worker: takes trials until there is none; the numbers it had."""
    study = load_study(open_storage(where), "s")
    numbers = []
    while (trial := take(study, folder, sampler=sampler, budget=budget)) is not None:
        numbers.append(trial.number)
        finish(study, trial, TrialState.COMPLETE, [value_of(SPACE.suggest(trial))])
    if sender is not None:
        sender.send(numbers)
    return numbers


def in_processes(count: int, task: Callable[..., object], *arguments: Any) -> list[Any]:
    """What `task(*arguments, sender)` sends, from processes side by side."""
    pipes = [FORK.Pipe(duplex=False) for _ in range(count)]
    workers = [FORK.Process(target=task, args=(*arguments, sender)) for _, sender in pipes]
    for worker in workers:
        worker.start()
    answers = []
    for worker, (receiver, _) in zip(workers, pipes, strict=True):
        assert receiver.poll(60), "a worker sent nothing"
        answers.append(receiver.recv())
        worker.join(20)
        assert worker.exitcode == 0
    return answers


def killed_in(task: Callable[..., object], *arguments: Any) -> Any:
    """What `task(*arguments, sender)` sends before its process is killed."""
    receiver, sender = FORK.Pipe(duplex=False)
    worker = FORK.Process(target=task, args=(*arguments, sender))
    worker.start()
    assert receiver.poll(60)
    answer = receiver.recv()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL
    return answer


# Trials ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_workers_never_get_the_same_trial_and_share_the_budget(kind: str, tmp_path: Path) -> None:
    where = place(kind, tmp_path)
    study = create_study(open_storage(where), "s")
    queued = {"lr": 5e-3, "epochs": 3, "backbone": "resnet34"}
    study.enqueue_trial(queued)
    answers = in_processes(3, work, where, tmp_path, "random", 9)
    assert sorted(number for numbers in answers for number in numbers) == list(range(9))
    trials = load_study(open_storage(where), "s").trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 9
    assert trials[0].params == queued

    alone = tmp_path / "alone"
    study = create_study(open_storage(alone / "study.journal"), "s")
    study.enqueue_trial(queued)
    work(str(alone / "study.journal"), alone, "random", 9)
    study = load_study(open_storage(alone / "study.journal"), "s")
    assert [trial.params for trial in trials] == [trial.params for trial in study.trials]


def test_tpe_with_one_worker_is_repeatable(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        create_study(open_storage(folder / "j"), "s")
        assert work(str(folder / "j"), folder, "tpe", 14) == list(range(14))
        found.append([trial.params for trial in load_study(open_storage(folder / "j"), "s").trials])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_tpe_never_get_the_same_trial(kind: str, tmp_path: Path) -> None:
    where = place(kind, tmp_path)
    create_study(open_storage(where), "s")
    answers = in_processes(2, work, where, tmp_path, "tpe", 9)
    assert sorted(number for numbers in answers for number in numbers) == list(range(9))


def test_another_seed_draws_other_trials() -> None:
    drawn = []
    for seed in (0, 1):
        study = optuna.create_study(sampler=make_sampler("random", seed, 0))
        drawn.append([SPACE.suggest(study.ask()) for _ in range(5)])
    assert drawn[0] != drawn[1]
    assert len({settings["lr"] for settings in drawn[0] + drawn[1]}) == 10


def test_tpe_searches(tmp_path: Path) -> None:
    """Its later trials are better than its first ones, drawn at random."""
    study = create_study(open_storage(tmp_path / "j"), "s")
    values = []
    while (trial := take(study, tmp_path, sampler="tpe", budget=40)) is not None:
        values.append(value_of(SPACE.suggest(trial)))
        finish(study, trial, TrialState.COMPLETE, [values[-1]])
    assert sorted(values[-15:])[7] > sorted(values[:10])[7]


def test_the_budget_counts_what_was_taken_however_it_ended(tmp_path: Path) -> None:
    study = create_study(open_storage(tmp_path / "j"), "s")
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    for state in states:
        finish(study, take(study, tmp_path, budget=5), state, [0.5])
    running = take(study, tmp_path, budget=5)
    study.enqueue_trial({"lr": 1e-3, "epochs": 2, "backbone": "resnet50"})
    assert take(study, tmp_path, budget=4) is None  # one waits, but four are taken
    waited = take(study, tmp_path, budget=5)
    assert (running.number, waited.number, SPACE.suggest(waited)["lr"]) == (3, 4, 1e-3)
    assert take(study, tmp_path, budget=5) is None
    assert requeue_unfinished(study) == [3, 4]
    assert [take(study, tmp_path, budget=5).number for _ in range(2)] == [3, 4]
    assert take(study, tmp_path, budget=5) is None
    assert len(study.trials) == 5


def test_a_sampler_that_is_none_takes_no_trial(tmp_path: Path) -> None:
    study = create_study(open_storage(tmp_path / "j"), "s")
    with pytest.raises(StocktakeError, match="there is no sampler grid: take one of tpe, random"):
        take(study, tmp_path, sampler="grid")
    assert study.trials == []


# After a kill ---------------------------------------------------------------------------------------------------------


def report_and_hang(where: str, folder: Path, sender: Connection) -> None:
    study = load_study(open_storage(where), "s")
    trial = take(study, folder, sampler="tpe")
    trial.report(0.2, 1)
    trial.report(0.3, 2)
    trial.set_user_attr("run", "abc")
    sender.send((trial.number, trial.params))
    time.sleep(60)


def requeue_and_take(where: str, folder: Path, sender: Connection) -> None:
    study = load_study(open_storage(where), "s")
    requeued = requeue_unfinished(study)
    waiting = [trial.state.name for trial in study.trials]
    trial = take(study, folder, sampler="random", seed=77)
    frozen = study.trials[trial.number]
    sender.send((requeued, waiting, trial.number, SPACE.suggest(trial), trial.params, frozen.intermediate_values))
    finish(study, trial, TrialState.COMPLETE, [0.4])


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_workers_trial_is_handed_out_again_as_it_was(kind: str, tmp_path: Path) -> None:
    where = place(kind, tmp_path)
    study = create_study(open_storage(where), "s")
    finish(study, take(study, tmp_path), TrialState.COMPLETE, [0.1])
    number, params = killed_in(report_and_hang, where, tmp_path)
    (answer,) = in_processes(1, requeue_and_take, where, tmp_path)
    assert answer[:3] == ([1], ["COMPLETE", "WAITING"], number)
    assert answer[4] == params
    assert answer[5] == {1: 0.2, 2: 0.3}
    assert {f"{value}" for value in answer[3].values()} == {f"{value}" for value in params.values()}
    trials = load_study(open_storage(where), "s").trials
    assert [trial.number for trial in trials] == [0, 1]
    assert (trials[1].state, trials[1].values, trials[1].user_attrs["run"]) == (TrialState.COMPLETE, [0.4], "abc")


def hold_and_hang(where: str, folder: Path, sender: Connection) -> None:
    storage: Any = open_storage(where)
    with FileLock(folder / "trials.lock"):
        storage._backend._lock.acquire()
        sender.send("held")
        time.sleep(60)


def test_a_lock_that_a_killed_process_held_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Optuna's own locks would, for half a minute."""
    study = create_study(open_storage(tmp_path / "j"), "s")
    killed_in(hold_and_hang, str(tmp_path / "j"), tmp_path)
    began = time.monotonic()
    assert take(study, tmp_path).number == 0
    assert time.monotonic() - began < 5


def test_a_random_trial_whose_worker_was_killed_while_drawing_is_what_it_would_have_been(tmp_path: Path) -> None:
    whole = create_study(open_storage(tmp_path / "whole"), "s")
    expected = take(whole, tmp_path, seed=5).params
    study = create_study(open_storage(tmp_path / "halved"), "s")
    study.sampler = make_sampler("random", 5, 0)
    SPACE.dimensions[0].suggest(study.ask())  # and no further
    assert len(study.trials[0].params) == 1
    assert requeue_unfinished(study) == [0]
    trial = take(load_study(open_storage(tmp_path / "halved"), "s"), tmp_path, seed=5)
    assert (trial.number, trial.params) == (0, expected)


def test_a_journal_cut_anywhere_in_its_last_line_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j"
    study = create_study(open_storage(path), "s")
    finish(study, take(study, tmp_path), TrialState.COMPLETE, [0.5])
    whole = path.read_bytes()
    study.set_user_attr("last", "x" * 50)
    line = path.read_bytes()[len(whole) :]
    for cut in (1, 5, len(line) // 2, len(line) - 2, len(line) - 1):
        for tail in (line[:cut], line[:cut] + b"\0" * 9):
            path.write_bytes(whole + tail)
            study = load_study(open_storage(path), "s")
            assert path.read_bytes() == whole
            study.set_user_attr("after", cut)
            again = load_study(open_storage(path), "s")
            assert again.user_attrs == {"after": cut}
            assert len(again.trials) == 1


def test_a_line_torn_while_others_are_at_work_is_cut_before_they_write(tmp_path: Path) -> None:
    path = tmp_path / "j"
    study = create_study(open_storage(path), "s")
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"' + b"x" * 10_000)  # killed in mid-write
    assert take(study, tmp_path).number == 0
    assert take(load_study(open_storage(path), "s"), tmp_path).number == 1
    lines = path.read_bytes().splitlines()
    assert all("op_code" in json.loads(line) for line in lines)


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b"a: 1\nb: 2\n", b"\x89PNG\r\n\x1a\n\0\0", b'{"op": 1}\n', b'{"op_code":0}\n{}\n']
)
def test_a_file_that_is_no_journal_is_named_and_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    with pytest.raises(StocktakeError, match=r"space.yaml is (no journal|damaged).*name another file"):
        open_storage(path)
    assert path.read_bytes() == content


def test_a_journal_that_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(StocktakeError, match=r"cannot be used: Is a directory; name another file"):
        open_storage(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StocktakeError, match=r"file/j cannot be used: (Not a directory|File exists)"):
        open_storage(tmp_path / "file" / "j")
    open_storage(tmp_path / "new" / "folder" / "j")


# Databases ------------------------------------------------------------------------------------------------------------


def open_and_answer(where: str, sender: Connection) -> None:
    try:
        sender.send(optuna.get_all_study_names(open_storage(where)))
    except Exception as error:
        sender.send(repr(error))


def test_a_new_database_may_be_opened_by_several_at_once(tmp_path: Path) -> None:
    assert in_processes(4, open_and_answer, place("sqlite", tmp_path)) == [[]] * 4


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////dev/null/s.db", "storage sqlite:////dev/null/s.db cannot be used: "),
        ("sqlite:////proc/s.db", "storage sqlite:////proc/s.db cannot be used: "),
        ("sqlite:study.db", "sqlite:study.db keeps nothing: give the database a file"),
        ("sqlite://", "keeps nothing"),
        ("sqlite:///:memory:", "keeps nothing"),
        ("nosuchdb://u:pa55word@host/s", "storage nosuchdb://host/s cannot be used: "),
        ("mysql+nosuchdriver://u:pa55word@host/s", "storage mysql+nosuchdriver://host/s cannot be used: "),
        ("postgresql://u:pa55word@host:5432/s", "storage postgresql://host:5432/s cannot be used: "),
        ("postgresql://u:pa55word@host:port/s", "storage postgresql://... cannot be used: "),
        ("postgresql://u:pa55word@[::1]:5432/s", "storage postgresql://[::1]:5432/s cannot be used: "),
        ("postgresql://u:[pa55word@host/s", "storage postgresql://host/s cannot be used: "),
        ("postgresql://host/s?user=u&password=pa55word", "storage postgresql://host/s cannot be used: "),
        ("postgresql://u:pa55word/@host/s", "storage postgresql://... cannot be used: "),
        ("postgresql://u:?pa55word@host/s", "storage postgresql://... cannot be used: "),
        ("postgresql://u:#pa55word@host/s", "storage postgresql://... cannot be used: "),
        ("postgresql://u:pa55word/x", "storage postgresql://... cannot be used: "),
        ("postgresql://u:a@pa55word@host/s", "storage postgresql://host/s cannot be used: "),
        ("redis://:pa55word@host", "storage redis://host cannot be used: "),
    ],
)
def test_an_unusable_url_is_one_line_without_its_password(url: str, said: str) -> None:
    with pytest.raises(StocktakeError) as caught:
        open_storage(url)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert "pa55word" not in message


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(StocktakeError, match=r"its driver is not installed \(No module named 'pymssql'\)"):
        open_storage("mssql+pymssql://u:p@host/s")


# Studies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_studies_share_a_storage_under_their_names(kind: str, tmp_path: Path) -> None:
    storage = open_storage(place(kind, tmp_path))
    with pytest.raises(StocktakeError, match="there is no study s; the studies there are: none"):
        load_study(storage, "s")
    create_study(storage, "s")
    both = create_study(storage, "t", OBJECTIVES)
    with pytest.raises(StocktakeError, match="there is a study s already"):
        create_study(storage, "s")
    with pytest.raises(StocktakeError, match="there is no study u; the studies there are: s, t"):
        load_study(storage, "u")
    assert objectives_of(load_study(storage, "s")) == ("val/macro_f1",)
    assert objectives_of(both) == objectives_of(load_study(storage, "t")) == ("val/macro_f1", "latency_ms")
    assert [direction.name for direction in both.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert both.metric_names == [*OBJECTIVES]


@pytest.mark.parametrize("objectives", [(), ("latency_ms",), ("latency_ms", "val/macro_f1"), ("test/macro_f1",)])
def test_other_objectives_are_refused(objectives: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(StocktakeError, match="take val/macro_f1 alone, or val/macro_f1 and latency_ms"):
        create_study(open_storage(tmp_path / "j"), "s", objectives)


def test_optuna_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = create_study(open_storage(tmp_path / "j"), "s", pruner=make_pruner("asha", 8))
        work(str(tmp_path / "j"), tmp_path, "tpe", 9)
        finish(study, take(study, tmp_path), TrialState.FAIL, reason="none")
    assert capfd.readouterr() == ("", "")
    assert not optuna.logging.get_logger("optuna.study").isEnabledFor(logging.INFO)


# Pruners --------------------------------------------------------------------------------------------------------------


def pruned(name: str, storage: BaseStorage) -> list[int]:
    """Trials that are pruned when every second one learns nothing."""
    study = create_study(storage, name, pruner=make_pruner(name, 8))
    numbers = []
    for number in range(12):
        trial = study.ask()
        state = TrialState.COMPLETE
        for epoch in range(1, 8):
            trial.report(epoch / 10 + number / 100 if number % 2 == 0 else 0.01, epoch)
            if trial.should_prune():
                state = TrialState.PRUNED
                numbers.append(number)
                break
        finish(study, trial, state, [0.5])
    return numbers


def test_pruners_end_what_learns_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "j")
    for name in ("asha", "hyperband", "median"):
        numbers = pruned(name, storage)
        assert len(numbers) >= 3
        assert all(number % 2 for number in numbers), f"{name} pruned {numbers}"
    assert pruned("none", storage) == []


def test_a_pruner_that_is_none_or_cannot_be_is_refused() -> None:
    with pytest.raises(StocktakeError, match="there is no pruner best: take one of asha, hyperband, median, none"):
        make_pruner("best", 8)
    for name in PRUNERS:
        assert isinstance(make_pruner(name, 1), optuna.pruners.NopPruner)
        if name == "none":
            assert isinstance(make_pruner(name, 8, OBJECTIVES), optuna.pruners.NopPruner)
        else:
            with pytest.raises(StocktakeError, match=f"the pruner {name} cannot weigh val/macro_f1 against latency_ms"):
                make_pruner(name, 8, OBJECTIVES)


# Ends and failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [OBJECTIVES[:1], OBJECTIVES])
@pytest.mark.parametrize("by_number", [False, True])
def test_a_trial_ends_in_every_state(objectives: tuple[str, ...], by_number: bool, tmp_path: Path) -> None:
    study = create_study(open_storage(tmp_path / "j"), "s", objectives)
    values = [0.5, 12.0][: len(objectives)]

    def end(state: TrialState, values: list[float] | None, **known: str) -> optuna.trial.FrozenTrial:
        trial = take(study, tmp_path)
        finish(study, trial.number if by_number else trial, state, values, **known)
        return study.trials[trial.number]

    assert end(TrialState.COMPLETE, values).values == values
    assert end(TrialState.PRUNED, None).state is TrialState.PRUNED
    assert end(TrialState.PRUNED, values).state is TrialState.PRUNED
    failed = end(TrialState.FAIL, None, reason="no memory for 512", kind="OutOfMemory")
    assert failed.state is TrialState.FAIL
    told = {"failure.reason": "no memory for 512", "failure.kind": "OutOfMemory"}
    assert failed.user_attrs == {**told, "worker": os.getpid()}
    assert end(TrialState.FAIL, values, reason="lr 0.5 is odd").user_attrs["failure.kind"] == "lr # is odd"
    assert end(TrialState.FAIL, None).user_attrs["failure.reason"] == "no reason is known"
    lost = end(TrialState.COMPLETE, [float("nan"), *values[1:]])
    assert (lost.state, lost.user_attrs["failure.reason"]) == (TrialState.FAIL, "val/macro_f1 is nan")


def test_a_pruned_trials_value_is_its_last_one(tmp_path: Path) -> None:
    study = create_study(open_storage(tmp_path / "j"), "s")
    trial = take(study, tmp_path)
    trial.report(0.25, 1)
    finish(study, trial, TrialState.PRUNED)
    assert study.trials[0].values == [0.25]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lr 0.01 must be below 1e-3", "lr 0.02 must be below 5E-4"),
        ("weights /a/b.pth: no such file", "weights /c/d/e.pth: no such file"),
        ("cannot read runs/a1/b.png", "cannot read runs/c3/d.png"),
        ("run 4f3a9c1d failed", "run 00ff12ab failed"),
        ("at 0x7f3a", "at 0x1"),
        ("loss is nan after 3 steps", "loss is inf after -12 steps"),
        ("http://u:p@a/b refused", "http://c refused"),
        ("first 1\nmore", "first 2"),
    ],
)
def test_failures_for_one_cause_are_one_kind(one: str, other: str) -> None:
    assert failure_kind(ValueError(one)) == failure_kind(ValueError(other))
    assert failure_kind(ValueError(one)) != failure_kind(TypeError(one))
    assert failure_kind(ValueError(one)) != failure_kind(ValueError(f"else {other}"))


def test_failures_for_two_causes_are_two_kinds() -> None:
    kinds = [failure_kind(ValueError(text)) for text in ("lr must be set", "decade must be set", "no/yes is odd", "")]
    assert kinds == [
        "ValueError: lr must be set",
        "ValueError: decade must be set",
        "ValueError: # is odd",
        "ValueError: ",
    ]


def test_a_streak_is_failures_of_one_kind_with_nothing_between(tmp_path: Path) -> None:
    study = create_study(open_storage(tmp_path / "j"), "s")
    first = take(study, tmp_path)  # still running while the others fail

    def fail(reason: str) -> str | None:
        finish(study, take(study, tmp_path), TrialState.FAIL, reason=reason)
        return failure_streak(study)

    assert failure_streak(study) is None
    assert [fail("lr 0.1 is odd"), fail("lr 0.2 is odd"), fail("lr 0.3 is odd")] == [None, None, "lr 0.3 is odd"]
    assert failure_streak(study, length=4) is None
    finish(study, first, TrialState.COMPLETE, [0.5])  # the first by number, the last to end
    assert failure_streak(study) is None
    assert [fail("a"), fail("b"), fail("b"), fail("b")] == [None, None, None, "b"]
    pruned_trial = take(study, tmp_path)
    finish(study, pruned_trial, TrialState.PRUNED)
    assert [fail("b"), fail("b")] == [None, None]


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_a_row_a_trial(kind: str, tmp_path: Path) -> None:
    study = create_study(open_storage(place(kind, tmp_path)), "s")
    empty = trials_table(study)
    assert [*empty.columns] == ["number", "state", "val/macro_f1", "seconds", "reason", "run"]
    assert len(empty) == 0
    done, failed, running = (take(study, tmp_path) for _ in range(3))
    done.set_user_attr("run", "abc")
    finish(study, done, TrialState.COMPLETE, [0.5])
    finish(study, failed, TrialState.FAIL, reason="odd")
    study.enqueue_trial({"lr": 1e-3})
    table = trials_table(study)
    assert table["number"].tolist() == [0, 1, 2, 3]
    assert table["state"].tolist() == ["complete", "fail", "running", "waiting"]
    assert table["val/macro_f1"].tolist()[0] == 0.5
    assert table["val/macro_f1"].isna().tolist() == [False, True, True, True]
    assert table["seconds"].notna().tolist() == [True, True, False, False]
    assert table.loc[0, "lr"] == done.params["lr"]
    assert table.loc[2, "epochs"] == running.params["epochs"]
    assert (table.loc[0, "run"], table.loc[1, "reason"]) == ("abc", "odd")


def test_the_best_trial_and_the_front(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "j")
    one, two = create_study(storage, "one"), create_study(storage, "two", OBJECTIVES)
    assert (best_trial(one), best_trial(two), pareto_front(two)) == (None, None, [])
    for number, macro_f1 in enumerate((0.3, 0.5, 0.5, 0.1)):
        finish(one, take(one, tmp_path), TrialState.COMPLETE, [macro_f1])
        finish(two, take(two, tmp_path), TrialState.COMPLETE, [macro_f1, (9.0, 30.0, 20.0, 10.0)[number]])
    finish(two, take(two, tmp_path), TrialState.FAIL)
    best, best_of_two = best_trial(one), best_trial(two)
    assert best is not None
    assert best_of_two is not None
    assert (best.number, best_of_two.number) == (1, 1)
    assert [trial.number for trial in pareto_front(two)] == [2, 0]
    assert [trial.number for trial in pareto_front(one)] == [1, 2]


def test_a_study_keeps_its_space(tmp_path: Path) -> None:
    create_study(open_storage(tmp_path / "j"), "s").set_user_attr("space", SPACE.to_json())
    kept = Space.from_json(load_study(open_storage(tmp_path / "j"), "s").user_attrs["space"])
    assert SPACE.difference(kept) is None
