"""Leaks between the splits, figures that promise too much, and what would undo the gate."""

from __future__ import annotations

from mutants.mutant import Mutant

STAGES, TABLE = "src/stocktake/stages", "tests/stages/test_splits.py"
FITTED_ON_ALL = 'prepared.manifest.split("train")'

MUTANTS = (
    Mutant(
        "head fitted on train and test",
        f"{STAGES}/linear_probe.py",
        "fit_head(model, features[train], quantities[train],",
        "fit_head(model, features[~val], quantities[~val],",
        (f"{TABLE}::test_a_model_does_not_depend_on_the_test_split",),
    ),
    Mutant(
        "head chosen by test",
        f"{STAGES}/linear_probe.py",
        'split == "train", split == "val"',
        'split == "train", split == "test"',
        (f"{TABLE}::test_a_model_does_not_depend_on_the_test_split",),
    ),
    Mutant(
        "classical fitted on all splits",
        f"{STAGES}/classical.py",
        FITTED_ON_ALL,
        "prepared.manifest.bins",
        (f"{TABLE}::test_a_stage_without_choices_depends_on_train_alone",),
    ),
    Mutant(
        "majority fitted on all splits",
        f"{STAGES}/majority.py",
        FITTED_ON_ALL,
        "prepared.manifest.bins",
        (f"{TABLE}::test_a_stage_without_choices_depends_on_train_alone",),
    ),
    Mutant(
        "early stopping on test",
        "src/stocktake/training/data.py",
        'manifest.split("val")',
        'manifest.split("test")',
        (f"{TABLE}::test_a_model_does_not_depend_on_the_test_split",),
    ),
    Mutant(
        "temperature and conformal threshold fitted on test",
        f"{STAGES}/run.py",
        """prepared.manifest.split("val")["quantity"].to_numpy()
        calibration = fit_calibration(val,""",
        """prepared.manifest.split("test")["quantity"].to_numpy()
        calibration = fit_calibration(test,""",
        (f"{TABLE}::test_temperature_and_set_threshold_are_fitted_on_val",),
    ),
    Mutant(
        "candidate chosen by test",
        "src/stocktake/commands/ladder.py",
        'max(finished, key=lambda result: result.metrics["val/macro_f1"])',
        'max(finished, key=lambda result: result.metrics["test/macro_f1"])',
        ("tests/commands/test_ladder.py::test_the_candidate_is_chosen_by_val",),
    ),
    Mutant(
        "report intervals without groups",
        "src/stocktake/evaluation/evaluation.py",
        """        groups = self.bins["group"].to_numpy()
        intervals, by_mean = (""",
        """        groups = self.bins["id"].to_numpy()
        intervals, by_mean = (""",
        ("tests/evaluation/test_evaluation.py::test_intervals_resample_whole_groups",),
    ),
    Mutant(
        "report coverage without groups",
        "src/stocktake/evaluation/evaluation.py",
        """        groups = self.bins["group"].to_numpy()
        share, interval = coverage(""",
        """        groups = self.bins["id"].to_numpy()
        share, interval = coverage(""",
        ("tests/evaluation/test_evaluation.py::test_intervals_resample_whole_groups",),
    ),
    Mutant(
        "targets are quantity - 1",
        "src/stocktake/training/data.py",
        'np.searchsorted(labels, bins["quantity"].to_numpy())',
        'bins["quantity"].to_numpy() - 1',
        ("tests/training/test_data.py::test_targets_are_places_among_the_labels",),
    ),
    Mutant(
        "gate inequality flipped",
        "src/stocktake/registry/gate.py",
        "bound > limits.min_gain, bound",
        "bound < limits.min_gain, bound",
        ("tests/registry/test_gate.py::test_a_worse_model_is_rejected_by_how_much",),
    ),
    Mutant(
        "temperature forgotten in serving",
        "src/stocktake/serving/predictor.py",
        "(self._calibration.temperature if calibrated else 1.0)",
        "1.0",
        ("tests/serving/test_predictor.py::test_temperature_softens_and_keeps_the_answer",),
    ),
    Mutant(
        "splits re-drawn when a smaller id arrives",
        "src/stocktake/data/splits.py",
        'before = bins["id"].map(split_of)',
        'before = bins["id"].map({})',
        ("tests/data/test_splits.py::test_a_smaller_id_a_lost_member_and_a_bin_between_two_groups_redraw_nothing",),
    ),
    Mutant(
        "DDP counts a photo twice",
        "src/stocktake/training/data.py",
        "yield batches[turn] if turn < len(batches) else []",
        "yield batches[turn % len(batches)]",
        ("tests/training/test_several_processes.py::test_every_row_is_in_one_share_once",),
    ),
)
