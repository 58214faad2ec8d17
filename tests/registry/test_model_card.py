"""Model cards: what they say, that nothing in them is markup of somebody else's, and that they fit every store."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from registry_store import promoted
from stocktake.registry.model_card import (
    CONFUSION,
    RELIABILITY,
    ModelCardData,
    as_description,
    as_html,
    as_markdown,
)
from stocktake.registry.model_card_data import gather_card_data, publish_card, read_json, try_to_publish_card
from stocktake.registry.promotion import Event
from stocktake.registry.versions import ModelRegistry, Version

PNG = b"\x89PNG\r\n\x1a\nnot really"
HOSTILE = '<script>alert(1)</script> | [x](javascript:alert(2)) ![y](http://evil.example/z.png) `code` **bold** & "q"'
VERSION = Version("stocktake", 3, ("champion",), "r" * 32, "models:/m-1", {}, 1_795_000_000_000)
CHECK = {"passed": True, "photos": 64, "engines": {"onnxruntime 1.32 f32": {"largest_difference": 2e-7}}}
CARD = ModelCardData(
    VERSION,
    run_id="r" * 32,
    run_name="finetune",
    experiment="stocktake",
    metrics={
        "test/macro_f1": 0.512,
        "test/macro_f1_low": 0.47,
        "test/macro_f1_high": 0.55,
        "val/macro_f1": 0.53,
        "test/n": 863,
        "val/n": 850,
        "test/ece": 0.02,
        "test/ece_uncalibrated": 0.11,
        "test/loss": 1.2,
        "test/loss_uncalibrated": 1.4,
        "test/set_coverage": 0.91,
        "test/set_size": 2.345,
    },
    tags={
        "stage": "finetune",
        "task": "1-5",
        "data.root": "../bins",
        "data.fingerprint": "f00d",
        "git.commit": "c0ffee",
        "git.dirty": "true",
    },
    params={"backbone": "resnet18", "image_size": "224", "split.by": "group", "root": "../bins"},
    counts={"train/1": 1200, "val/1": 100, "test/1": 101, "train/2": 2000, "val/2": 200, "test/2": 202},
    per_class=[{"label": "1", "n": "101", "recall": "0.75", "precision": "0.5", "f1": "0.6", "share_predicted": "0.2"}],
    confusion={"labels": [1, 2], "matrix": [[90, 11], [20, 182]]},
    images={CONFUSION: PNG, RELIABILITY: PNG},
    exported={"labels": [1, 2], "calibration": {"set_level": 0.9}, "check": CHECK, "precision": "bf16"},
    size_mb=44.75,
    serving={"latency_ms": 2.31, "engine": "openvino 2026.4 bf16", "by": "ann@desk"},
    events=[
        Event(
            "2026-11-03T12:00:00Z",
            "forced",
            version=3,
            before=2,
            after=3,
            by="ann@desk",
            reason="no time",
            figures={"gain": 0.05, "gain_low": -0.01, "gain_high": 0.1, "n": 863, "failed": ["gain over the champion"]},
        )
    ],
)


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_card_says_what_a_reader_asks() -> None:
    card = as_markdown(CARD)
    titles = re.findall(r"(?m)^## (.*)$", card)
    assert titles == [
        "What it is, and what it is for",
        "Figures",
        "Data",
        "How often each quantity is counted right (test)",
        "Confusion matrix (test)",
        "Calibration (test)",
        "Limits",
        "Serving",
        "Lineage",
        "History of promotions",
        "Settings",
    ]
    for line in (
        "| macro-F1 | 0.530 | 0.512 [0.470, 0.550] |",
        "| all | 3,200 | 300 | 303 |",
        "| 1 | 101 | 0.750 | 0.500 | 0.600 | 0.200 |",
        "| 2 | 20 | 182 |",
        "| calibration error (ECE) | 0.110 | 0.020 |",
        "hold the recorded one for 0.910 of the bins, asked for 90%; 2.35 quantities each",
        "- latency: 2.3 ms a photo (median), openvino 2026.4 bf16, measured by ann@desk",
        "- size: 44.8 MB",
        "- export check: passed on 64 photos against the checkpoint (onnxruntime 1.32 f32 within 2e-07)",
        "| code | `c0ffee`, with uncommitted changes |",
        "| 2026-11-03 12:00:00 | stocktake/3 forced | 2 → 3 | ann@desk | no time |",
        r"gain +0.050 \[-0.010, +0.100\] on 863 bins; failed: gain over the champion",
    ):
        assert line in card, line
    assert "rendered" not in card
    assert "rendered bins" in as_markdown(dataclasses.replace(CARD, params={"root": "None"}))


def test_the_page_stands_alone() -> None:
    page = Tags(as_html(CARD))
    names = [tag for tag, _ in page.seen]
    assert "script" not in names
    assert "link" not in names
    images = [attributes["src"] or "" for tag, attributes in page.seen if tag == "img"]
    assert len(images) == 2
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert "http" not in as_html(CARD).replace("http-equiv", "")
    assert names.count("h1") == 1
    assert names.count("table") == 7, "the confusion matrix is an image here"
    assert Tags(as_html(dataclasses.replace(CARD, images={}))).seen.count(("table", {})) == 8


def hostile_card() -> ModelCardData:
    """Whatever a run, a file or a person can put into a card, as an attack."""
    tags = dict.fromkeys(("stage", "task", "data.root", "data.fingerprint", "git.commit", "stocktake.version"), HOSTILE)
    event = dataclasses.replace(
        CARD.events[0], action=HOSTILE, at=HOSTILE, by=HOSTILE, reason=HOSTILE, figures={"failed": [HOSTILE]}
    )
    columns = ("label", "n", "recall", "precision", "f1", "share_predicted")
    check = {"passed": True, "photos": HOSTILE, "engines": {HOSTILE: {}}}
    return dataclasses.replace(
        CARD,
        version=dataclasses.replace(VERSION, name=HOSTILE, source=HOSTILE, aliases=(HOSTILE,)),
        run_name=HOSTILE,
        run_id=HOSTILE,
        experiment=HOSTILE,
        tags=tags,
        params={
            HOSTILE: HOSTILE,
            **dict.fromkeys(("backbone", "image_size", "split.fractions", "split.seed"), HOSTILE),
        },
        counts={f"train/{HOSTILE}": 1},
        per_class=[dict.fromkeys(columns, HOSTILE)],
        confusion={"labels": [HOSTILE, 2], "matrix": [[HOSTILE, 1], [2, 3]]},
        exported={"labels": [HOSTILE, 2], "check": check, "precision": HOSTILE},
        serving={"latency_ms": 1.0, "engine": HOSTILE, "by": HOSTILE},
        events=[event],
    )


def test_no_field_injects_markup_into_the_page() -> None:
    page = Tags(as_html(hostile_card()))
    harmless = {tag for tag, _ in Tags(as_html(CARD)).seen}
    assert {tag for tag, _ in page.seen} <= harmless
    assert all((attributes["src"] or "").startswith("data:") for tag, attributes in page.seen if tag == "img")
    assert page.text.count("<script>alert(1)</script>") > 30


def test_no_field_injects_markup_into_the_markdown() -> None:
    """The description is shown by MLflow's UI, whose Markdown has HTML, links, images and tables."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    harmless = {tag for tag, _ in Tags(parser.render(as_markdown(CARD))).seen}
    for text in (as_markdown(hostile_card()), as_description(hostile_card())):
        page = Tags(parser.render(text))
        assert {tag for tag, _ in page.seen} <= harmless
        assert "<script>alert(1)</script>" in page.text
    rows = [line for line in as_markdown(hostile_card()).splitlines() if "→" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [7]


def test_the_description_fits_every_store_and_says_where_the_rest_is() -> None:
    assert as_description(CARD).count("## ") == 6
    long = dataclasses.replace(CARD, events=[dataclasses.replace(CARD.events[0], reason="w" * 500)] * 30)
    huge = dataclasses.replace(CARD, tags={**CARD.tags, "stage": "s" * 9000})
    for card in (CARD, long, huge):
        text = as_description(card)
        assert len(text) <= 5000
        assert text.startswith("# Model card: stocktake/3")
        assert f"model-card/card.html` of the run `{'r' * 32}`" in text
    assert "## Figures" in as_description(long)
    assert "## History" not in as_description(long)


def test_what_is_missing_is_left_out() -> None:
    bare = ModelCardData(VERSION)
    card = as_markdown(bare)
    assert "export check: none was made" in card
    assert "The run has no figures." in card
    assert "| run | gone |" in card
    assert "Confusion" not in card
    assert "Calibration" not in card
    assert Tags(as_html(bare)).text
    assert [read_json(text) for text in (b"", b"[1]", b"[" * 100_000, b'{"a": 1}')] == [{}, {}, {}, {"a": 1}]


def test_a_card_is_attached_to_its_version_and_its_run(three: ModelRegistry, tmp_path: Path) -> None:
    promoted(three, 1, reason="first", figures={"latency_ms": 3.0, "engine": "openvino", "size_mb": 1.0})
    page = publish_card(three, three.version("1"), tmp_path / "ws")
    assert page == tmp_path / "ws" / "registry" / "stocktake-1" / "card.html"
    assert "3.0 ms a photo" in page.read_text()
    version = three.client.get_model_version("stocktake", "1")
    assert version.description.startswith("# Model card: stocktake/1")
    assert "champion" in version.description
    assert "| first |" in version.description
    for name in ("card.md", "card.html"):
        kept = Path(three.client.download_artifacts(version.run_id, f"model-card/{name}", str(tmp_path)))
        assert kept.read_text() == (page.parent / name).read_text()
    assert gather_card_data(three, three.version("1")).metrics["test/n"] == 18


def test_a_card_of_a_deleted_run_has_no_figures(three: ModelRegistry, tmp_path: Path) -> None:
    version = three.version("1")
    three.client.delete_run(version.run_id)
    assert "The run has no figures" in publish_card(three, version, tmp_path / "ws").read_text()


def test_a_card_that_cannot_be_written_is_a_warning(
    three: ModelRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert try_to_publish_card(three, three.version("1"), tmp_path / "file") is None
    assert "warning: no model card of stocktake/1: " in capsys.readouterr().err
