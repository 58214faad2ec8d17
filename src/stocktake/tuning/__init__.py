"""A study of a command's settings: the search space, Optuna's study of it, figures of what was found."""
