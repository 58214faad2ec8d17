"""Floor 3: the search space and the Optuna study."""
