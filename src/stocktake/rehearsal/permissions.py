"""IAM's simulator, which the SageMaker SDK asks about a role before it submits anything."""

from __future__ import annotations

from moto.core.responses import ActionResult
from moto.iam.responses import IamResponse


def install() -> None:
    """Let every role do everything: policies are AWS's to judge, nobody is kept out of a rehearsal."""

    def simulate_principal_policy(response: IamResponse) -> ActionResult:
        actions = response.params["ActionNames"]
        allowed = [{"EvalActionName": one, "EvalResourceName": "*", "EvalDecision": "allowed"} for one in actions]
        return ActionResult({"EvaluationResults": allowed, "IsTruncated": False})

    setattr(IamResponse, simulate_principal_policy.__name__, simulate_principal_policy)
