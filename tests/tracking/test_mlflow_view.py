"""The leaderboard view in MLflow's own pages, seen in a browser: it fails when MLflow changes how a view is saved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from stocktake.config.runs import TrackingConfig
from stocktake.tracking.leaderboard import read_leaderboard
from stocktake.tracking.runs import start_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.mark.slow
def test_the_link_opens_the_leaderboard(server: Any) -> None:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        is_ci = os.environ.get("CI") == "true"
        (pytest.fail if is_ci else pytest.skip)(f"none of {', '.join(BROWSERS)} is installed")
    tracking = TrackingConfig(uri=server.uri, system_metrics=False)
    for name, score in (("worst", 0.1), ("best", 0.9), ("middle", 0.5)):
        with start_run(tracking, workspace=Path("workspace"), name=name, tags={"stage": name, "task": "1-5"}) as run:
            run.log_metrics({"val/macro_f1": score, "test/rmse": 1.0, "train/loss": 2.0})
    frame, link = read_leaderboard(tracking)
    assert list(frame["run"]) == ["best", "middle", "worst"]

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 2400, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(str(link))
        cells = page.get_by_role("gridcell")
        cells.get_by_text("middle").first.wait_for()
        headers = " ".join(page.get_by_role("columnheader").all_inner_texts())
        tops = {name: cells.get_by_text(name).first.bounding_box()["y"] for name in ("best", "middle", "worst")}
        browser.close()
    assert "val/macro_f1" in headers
    assert "test/rmse" in headers
    assert "stage" in headers
    assert "train/loss" not in headers
    assert tops["best"] < tops["middle"] < tops["worst"]
