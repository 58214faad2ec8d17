"""The ranges of a tuning job, in Optuna's terms."""

from __future__ import annotations

from typing import Any

from moto.sagemaker.exceptions import ValidationError


def distributions_of(ranges: dict[str, Any]) -> dict[str, Any]:
    """Optuna's, of a request's ParameterRanges.

    Raises:
        ValidationError: a range that is none.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    try:
        for one in ranges.get("IntegerParameterRanges", []):
            found[one["Name"]] = IntDistribution(int(one["MinValue"]), int(one["MaxValue"]), log=_is_log(one))
        for one in ranges.get("ContinuousParameterRanges", []):
            found[one["Name"]] = FloatDistribution(float(one["MinValue"]), float(one["MaxValue"]), log=_is_log(one))
    except ValueError as error:
        raise ValidationError(message=f"Invalid range of hyperparameter {one['Name']}: {error}") from None
    for one in ranges.get("CategoricalParameterRanges", []):
        found[one["Name"]] = CategoricalDistribution(one["Values"])
    return found


def _is_log(one: dict[str, str]) -> bool:
    """Whether a range's scale is logarithmic; Auto is, where it spans two orders of magnitude or more."""
    low, high = float(one["MinValue"]), float(one["MaxValue"])
    scale = one.get("ScalingType", "Auto")
    if scale == "ReverseLogarithmic":
        raise ValidationError(message=f"ScalingType ReverseLogarithmic of {one['Name']} is not here.")
    return scale == "Logarithmic" or (scale == "Auto" and low > 0 and high / low >= 100)
