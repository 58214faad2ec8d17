"""Filters, order and pages of SageMaker's List operations."""

from __future__ import annotations

from typing import Any

from moto.sagemaker.exceptions import ValidationError

_SORTED_BY = {"Status": "{}Status", "Name": "{}Name", "FinalObjectiveMetricValue": "Objective"}


def page(rows: list[dict[str, Any]], request: dict[str, Any], result: str, kind: str) -> dict[str, Any]:
    """Return the rows that a request asks for, under `result`, and the NextToken.

    Raises:
        ValidationError: a token that was not given out.
    """
    name, status = f"{kind}Name", f"{kind}Status"
    selected = [
        row
        for row in rows
        if request.get("NameContains", "").lower() in row[name].lower()
        and request.get("StatusEquals") in (None, row[status])
        and _lies_within(row, request, "CreationTime")
        and _lies_within(row, request, "LastModifiedTime")
    ]
    by = _SORTED_BY.get(request.get("SortBy", "CreationTime"), "CreationTime").format(kind)
    selected.sort(key=lambda row: row[by], reverse=request.get("SortOrder") != "Ascending")
    try:
        first = int(request.get("NextToken") or 0)
    except ValueError:
        raise ValidationError(message="Invalid pagination token") from None
    after = first + (request.get("MaxResults") or 10)
    return {result: selected[first:after], **({"NextToken": str(after)} if after < len(selected) else {})}


def _lies_within(row: dict[str, Any], request: dict[str, Any], moment: str) -> bool:
    after, before = request.get(f"{moment}After"), request.get(f"{moment}Before")
    if after is None and before is None:
        return True
    value = row[moment].replace(tzinfo=None)
    return (after is None or value > after.replace(tzinfo=None)) and (
        before is None or value < before.replace(tzinfo=None)
    )
