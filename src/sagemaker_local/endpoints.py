"""Endpoints that answer: real servers behind every variant, weights, updates that keep the old until the new is up."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, cast

from moto.core.responses import ActionResult
from moto.core.utils import utcnow
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.models import FakeEndpoint, FakeEndpointConfig, Model, SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse

from sagemaker_local.cloudwatch import LogStream
from sagemaker_local.context import EmulatorContext
from sagemaker_local.jobs import Operations, check_role
from sagemaker_local.model_servers import ModelServer, ModelServerError, model_data
from sagemaker_local.service_model import require
from sagemaker_local.storage import Storage

_IN_PROGRESS = ("Creating", "Updating", "Deleting")


class Endpoint(FakeEndpoint):
    """moto's endpoint with servers behind its variants."""

    failure_reason: str | None  # type: ignore[assignment]

    def __init__(
        self,
        context: EmulatorContext,
        backend: SageMakerModelBackend,
        name: str,
        config: str,
        tags: list[dict[str, str]] | None,
    ) -> None:
        super().__init__(
            backend.account_id,
            backend.region_name,
            endpoint_name=name,
            endpoint_config_name=config,
            production_variants=[],
            data_capture_config={},
            tags=tags or [],
        )
        self._context, self._backend = context, backend
        self._guard = threading.Lock()
        self._servers: dict[str, ModelServer] = {}
        self.endpoint_status = "Creating"
        threading.Thread(target=self._converge, args=(config, False), daemon=True).start()

    @property
    def response_object(self) -> dict[str, Any]:
        described = {
            "EndpointName": self.endpoint_name,
            "EndpointArn": self.arn,
            "EndpointConfigName": self.endpoint_config_name,
            "ProductionVariants": self.production_variants or None,
            "EndpointStatus": self.endpoint_status,
            "FailureReason": self.failure_reason,
            "CreationTime": self.creation_time,
            "LastModifiedTime": self.last_modified_time,
        }
        return {name: value for name, value in described.items() if value is not None}

    def check_idle(self) -> None:
        """Raise ValidationError while it is being created, updated or deleted."""
        if self.endpoint_status in _IN_PROGRESS:
            raise ValidationError(message=f'Cannot update in-progress endpoint "{self.arn}".')

    def go_over(self, config: str, keeps_weights: bool) -> None:
        """Go over to another configuration: its servers come up first, then the old ones go."""
        self.check_idle()
        self._backend.describe_endpoint_config(config)
        self.endpoint_status, self.failure_reason = "Updating", None
        self.last_modified_time = utcnow()
        threading.Thread(target=self._converge, args=(config, keeps_weights), daemon=True).start()

    def update_weights(self, desired: list[dict[str, Any]]) -> None:
        """Set weights and instance counts of variants.

        Raises:
            ValidationError: there is no such variant.
        """
        self.check_idle()
        variants = {variant["VariantName"]: variant for variant in self.production_variants}
        for change in desired:
            if change["VariantName"] not in variants:
                raise ValidationError(
                    message=f'The variant name(s) "{change["VariantName"]}" is/are not present within endpoint '
                    f'configuration "{self.endpoint_config_name}".'
                )
        for change in desired:
            for name in ("Weight", "InstanceCount"):
                value = change.get(f"Desired{name}")
                if value is not None:
                    variants[change["VariantName"]] |= {f"Desired{name}": value, f"Current{name}": value}
        self.last_modified_time = utcnow()

    def pick_variant(self, target: str | None) -> tuple[str, ModelServer, bool]:
        """Return the variant that a request goes to, by name or by weights: its name, server, and if it is serverless.

        Raises:
            KeyError: there is none of that name, or all weights are zero.
        """
        with self._guard:
            variants = {variant["VariantName"]: variant for variant in self.production_variants}
            if target is None:
                weights = [variant["CurrentWeight"] for variant in variants.values()]
                if not sum(weights):
                    raise KeyError("any variant: all weights are zero")
                target = random.choices(list(variants), weights)[0]  # noqa: S311 - no secret
            return target, self._servers[target], "CurrentServerlessConfig" in variants[target]

    def close(self) -> None:
        """End its servers."""
        self.endpoint_status = "Deleting"
        with self._guard:
            servers, self._servers = list(self._servers.values()), {}
        for server in servers:
            server.close()

    def _converge(self, config_name: str, keeps_weights: bool) -> None:
        """Start the servers of a configuration, then let them take the place of those that run."""
        had_servers = bool(self._servers)
        config = self._backend.describe_endpoint_config(config_name)
        started: dict[str, ModelServer] = {}
        reason, name = "", ""
        try:
            for variant in config["ProductionVariants"]:
                name = variant["VariantName"]
                started[name] = self._start(variant)
            for name in started:
                started[name].wait_ready()
        except ModelServerError as error:
            reason = f"The container for production variant {name} {error}. See the endpoint's CloudWatch logs."
        except Exception as error:  # any error must end the creation
            reason = f"InternalServerError: {type(error).__name__}: {error}"
        if reason:
            for server in started.values():
                server.close()
            self.failure_reason = reason
            self.endpoint_status = "InService" if had_servers else "Failed"
            self.last_modified_time = utcnow()
            return
        before = {variant["VariantName"]: variant for variant in self.production_variants} if keeps_weights else {}
        with self._guard:
            replaced, self._servers = self._servers, started
            self.production_variants = [
                _describe(variant, before.get(variant["VariantName"], {}), started)
                for variant in config["ProductionVariants"]
            ]
            self.endpoint_config_name = config_name
        self.endpoint_status, self.last_modified_time = "InService", utcnow()
        for server in replaced.values():
            server.close_later()

    def _start(self, variant: dict[str, Any]) -> ModelServer:
        stream = f"{variant['VariantName']}/i-{time.time_ns():017x}"
        log = LogStream(self._backend, f"/aws/sagemaker/Endpoints/{self.endpoint_name}", stream)
        return ModelServer(self._context, self._backend, variant["ModelName"], log)


def _describe(variant: dict[str, Any], before: dict[str, Any], servers: dict[str, ModelServer]) -> dict[str, Any]:
    """Return a variant of a configuration as in DescribeEndpoint's answer."""
    name = variant["VariantName"]
    image = servers[name].image
    described: dict[str, Any] = {"VariantName": name}
    described |= {"DeployedImages": [{"SpecifiedImage": image, "ResolvedImage": image}]} if image else {}
    values = {"Weight": variant.get("InitialVariantWeight", 1.0), "InstanceCount": variant.get("InitialInstanceCount")}
    values = {member: before.get(f"Current{member}", value) for member, value in values.items()}
    values["ServerlessConfig"] = variant.get("ServerlessConfig")
    for member, value in values.items():
        if value is not None:
            described |= {f"Current{member}": value, f"Desired{member}": value}
    return described


def operations() -> Operations:
    """Return this module's operations of SageMaker's API; moto's own, held against AWS's rules, among them."""
    moto_create_model, moto_create_config = SageMakerResponse.create_model, SageMakerResponse.create_endpoint_config

    def create_model(response: SageMakerResponse) -> ActionResult:
        request, backend = response.params, response.sagemaker_backend
        name = request["ModelName"]
        if name in backend._models:
            raise ValidationError(message=f'Cannot create already existing model "{backend._models[name].arn}".')
        require(request, "ExecutionRoleArn")
        check_role(backend, request["ExecutionRoleArn"])
        containers = request.get("Containers") or [request.get("PrimaryContainer")]
        if len(containers) != 1 or containers[0] is None:
            raise ValidationError(message="A model needs one container; pipelines of several are not emulated.")
        uri, _ = model_data(containers[0])
        if uri is not None and not Storage(backend).keys(uri):
            raise ValidationError(message=f"Could not find model data at {uri}.")
        return moto_create_model(response)

    def create_endpoint_config(response: SageMakerResponse) -> ActionResult:
        request, configs = response.params, response.sagemaker_backend.endpoint_configs
        name = request["EndpointConfigName"]
        if name in configs:
            arn = configs[name].endpoint_config_arn
            raise ValidationError(message=f'Cannot create already existing endpoint configuration "{arn}".')
        require(request, "ProductionVariants")
        return moto_create_config(response)

    def update_endpoint(response: SageMakerResponse) -> ActionResult:
        endpoint = _find(response)
        endpoint.go_over(response.params["EndpointConfigName"], bool(response.params.get("RetainAllVariantProperties")))
        return ActionResult({"EndpointArn": endpoint.arn})

    def update_endpoint_weights_and_capacities(response: SageMakerResponse) -> ActionResult:
        endpoint = _find(response)
        endpoint.update_weights(response.params["DesiredWeightsAndCapacities"])
        return ActionResult({"EndpointArn": endpoint.arn})

    own = (create_model, create_endpoint_config, update_endpoint, update_endpoint_weights_and_capacities)
    return {function.__name__: function for function in own}


def install(context: EmulatorContext) -> None:
    """Put creation and deletion into moto's backend, where stacks use them as well as the API does."""

    def create_endpoint(
        backend: SageMakerModelBackend, endpoint_name: str, endpoint_config_name: str, tags: list[dict[str, str]]
    ) -> FakeEndpoint:
        existing = backend.endpoints.get(endpoint_name)
        if existing is not None and existing.endpoint_status != "Deleting":  # a stack replaces one without waiting
            arn = existing.arn
            raise ValidationError(message=f'Cannot create already existing endpoint "{arn}".')
        backend.describe_endpoint_config(endpoint_config_name)
        endpoint = Endpoint(context, backend, endpoint_name, endpoint_config_name, tags)  # type: ignore[abstract]
        backend.endpoints[endpoint_name] = endpoint
        return endpoint

    def delete_endpoint(backend: SageMakerModelBackend, endpoint_name: str) -> None:
        backend.describe_endpoint(endpoint_name)
        endpoint = cast("Endpoint", backend.endpoints[endpoint_name])
        endpoint.check_idle()
        endpoint.endpoint_status = "Deleting"

        def end() -> None:
            endpoint.close()
            if backend.endpoints.get(endpoint_name) is endpoint:
                del backend.endpoints[endpoint_name]

        threading.Thread(target=end, daemon=True).start()

    for owner, name, function in (
        (SageMakerModelBackend, "create_endpoint", create_endpoint),
        (SageMakerModelBackend, "delete_endpoint", delete_endpoint),
        # moto's list of instance types is older than the service model's, which is checked before.
        (FakeEndpointConfig, "validate_instance_type", lambda _config, _type: None),
        # A stack's own names, where moto makes them up.
        (FakeEndpoint, "cloudformation_name_type", staticmethod(lambda: "EndpointName")),
        (FakeEndpointConfig, "cloudformation_name_type", staticmethod(lambda: "EndpointConfigName")),
        (Model, "cloudformation_name_type", staticmethod(lambda: "ModelName")),
    ):
        setattr(owner, name, function)


def _find(response: SageMakerResponse) -> Endpoint:
    """Raise ValidationError if there is no such endpoint."""
    name = response.params["EndpointName"]
    response.sagemaker_backend.describe_endpoint(name)
    return cast("Endpoint", response.sagemaker_backend.endpoints[name])
