"""The model as a Spark function: how a million photos are scored."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest

from stocktake.models.export import export_model
from stocktake.serving.predictor import Predictor
from stocktake.serving.pyfunc import save_pyfunc
from tiny_bins import draw_bin, tiny_model

pytestmark = pytest.mark.skipif(
    shutil.which("java") is None and os.environ.get("CI") != "true", reason="Spark needs Java (make system)"
)


@pytest.fixture(scope="module")
def spark() -> Iterator:
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.memory", "512m").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()
    del os.environ["PYSPARK_PYTHON"]


@pytest.mark.slow
def test_a_frame_of_photos_is_counted_by_several_processes(spark, few_bins, tmp_path: Path) -> None:
    export_model(tiny_model("pca_svm", few_bins), tmp_path / "counter")
    model = save_pyfunc(tmp_path / "counter", tmp_path / "model", draw_bin(1, 0))
    photos = [draw_bin(quantity, seed) for seed in range(20) for quantity in (1, 2, 3)]
    frame = spark.createDataFrame([(i, bytearray(photo)) for i, photo in enumerate(photos)], "id int, photo binary")
    count = mlflow.pyfunc.spark_udf(spark, str(model), env_manager="local")
    rows = frame.repartition(4).select("id", count("photo").alias("count")).select("id", "count.*").collect()
    expected = Predictor(tmp_path / "counter").predict(photos)
    assert sorted(row.id for row in rows) == list(range(60))
    for row in rows:
        assert row.quantity == expected[row.id].quantity
        np.testing.assert_allclose(row.probabilities, list(expected[row.id].probabilities.values()), atol=1e-5)
        assert row.likely_quantities == list(expected[row.id].likely_quantities)
        assert row.model_version == expected[row.id].model_version
