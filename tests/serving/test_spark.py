"""The model as a Spark function: how a million photos are scored."""

from __future__ import annotations

import os
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest

from stocktake.models.export import export_model
from stocktake.models.majority import fit_majority
from stocktake.serving.predictor import Predictor, record
from stocktake.serving.pyfunc import save_pyfunc
from tiny_bins import draw_bin


@pytest.fixture(scope="module")
def spark() -> Iterator:
    if shutil.which("java") is None and os.environ.get("CI") != "true":
        pytest.skip("Spark needs Java (make system)")
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.memory", "512m").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()
    del os.environ["PYSPARK_PYTHON"]


@pytest.fixture(scope="module")
def model(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pyfunc(exported_model, tmp_path_factory.mktemp("spark") / "model", draw_bin(1, 0))


@pytest.mark.slow
def test_a_frame_of_photos_is_answered_by_several_processes(spark: Any, exported_model: Path, model: Path) -> None:
    photos = [draw_bin(quantity, seed) for seed in range(20) for quantity in (1, 2, 3)]
    photos[7] = b"no photo"
    frame = spark.createDataFrame([(i, bytearray(photo)) for i, photo in enumerate(photos)], "id int, photo binary")
    predict = mlflow.pyfunc.spark_udf(spark, str(model), env_manager="local")
    rows = frame.repartition(4).select("id", predict("photo").alias("answer")).select("id", "answer.*").collect()
    assert sorted(row.id for row in rows) == list(range(60))
    predictor = Predictor(exported_model)
    outcomes = list(predictor.predict_each(photos))
    for row in rows:
        expected = record(outcomes[row.id], predictor.version)
        assert (row.error, row.quantity) == (expected["error"], expected["quantity"])
        assert row.probabilities == pytest.approx(expected["probabilities"], abs=1e-5)
        assert row.likely_quantities == expected["likely_quantities"]
        assert row.model_version == predictor.version


def test_many_rows_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    """One batch of Spark's has 10,000: at 224 pixels its decoded photos would fill 1.5 GB, those of 600 rows 90 MB."""
    export_model(fit_majority((1, 2, 3), 224, np.array([1, 2, 2, 3])), tmp_path / "exported")
    model = mlflow.pyfunc.load_model(str(save_pyfunc(tmp_path / "exported", tmp_path / "model", draw_bin(1, 0))))

    def peak(rows: int) -> int:
        frame = pd.DataFrame({"photo": [draw_bin(2, 1)] * rows})
        tracemalloc.start()
        assert model.predict(frame)["error"].eq("").all()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(600) < peak(60) + 10_000_000
