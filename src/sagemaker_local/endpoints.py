"""Endpoints that answer: real servers behind every variant, weights, updates that keep the old until the new is up."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from moto.core.responses import ActionResult
from moto.core.utils import utcnow
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.models import FakeEndpoint, FakeEndpointConfig, Model, SageMakerModelBackend
from moto.sagemaker.responses import SageMakerResponse

from sagemaker_local import checks
from sagemaker_local.containers import Machine
from sagemaker_local.model_servers import ModelServer, ModelServerError, model_uri
from sagemaker_local.records import LogStream
from sagemaker_local.storage import Storage

_IN_PROGRESS = ("Creating", "Updating", "Deleting")


class Endpoint(FakeEndpoint):
    """moto's endpoint with servers behind its variants."""

    failure_reason: str | None  # type: ignore[assignment]

    def __init__(
        self,
        machine: Machine,
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
        self._machine, self._backend = machine, backend
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
            "DataCaptureConfig": self.data_capture_config or None,
            "EndpointStatus": self.endpoint_status,
            "FailureReason": self.failure_reason,
            "CreationTime": self.creation_time,
            "LastModifiedTime": self.last_modified_time,
        }
        return {name: value for name, value in described.items() if value is not None}

    def check_idle(self) -> None:
        """Raises ValidationError while it is being created, updated or deleted."""
        if self.endpoint_status in _IN_PROGRESS:
            raise ValidationError(message=f'Cannot update in-progress endpoint "{self.arn}".')

    def change(self, config: str, keeps_weights: bool) -> None:
        """To another configuration: its servers come up first, then the old ones go."""
        self.check_idle()
        self._backend.describe_endpoint_config(config)
        self.endpoint_status, self.failure_reason = "Updating", None
        self.last_modified_time = utcnow()
        threading.Thread(target=self._converge, args=(config, keeps_weights), daemon=True).start()

    def weigh(self, wanted: list[dict[str, Any]]) -> None:
        """Set weights and counts of variants.

        Raises:
            ValidationError: a variant that is not there.
        """
        self.check_idle()
        variants = {variant["VariantName"]: variant for variant in self.production_variants}
        for one in wanted:
            if one["VariantName"] not in variants:
                raise ValidationError(
                    message=f'The variant name(s) "{one["VariantName"]}" is/are not present within endpoint '
                    f'configuration "{self.endpoint_config_name}".'
                )
        for one in wanted:
            for name in ("Weight", "InstanceCount"):
                value = one.get(f"Desired{name}")
                if value is not None:
                    variants[one["VariantName"]] |= {f"Desired{name}": value, f"Current{name}": value}
        self.last_modified_time = utcnow()

    def choose(self, target: str | None) -> tuple[str, ModelServer, bool]:
        """The variant that a request goes to, by name or by weights: its name, server, and whether it is serverless.

        Raises:
            KeyError: none of that name, or all weights are zero.
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
        was_there = bool(self._servers)
        config = self._backend.describe_endpoint_config(config_name)
        started: dict[str, ModelServer] = {}
        reason = None
        variant = ""
        try:
            for one in config["ProductionVariants"]:
                variant = one["VariantName"]
                started[variant] = self._start(one)
            for variant in started:
                started[variant].wait_ready()
        except ModelServerError as error:
            reason = str(error)
            if reason.startswith("did"):
                reason = (
                    f"The primary container for production variant {variant} {reason}. Please check CloudWatch logs "
                    "for this endpoint."
                )
        except Exception as error:  # whatever it is must end the creation
            reason = f"InternalServerError: {type(error).__name__}: {error}"
        if reason is not None:
            for server in started.values():
                server.close()
            self.failure_reason = reason
            self.endpoint_status = "InService" if was_there else "Failed"
            self.last_modified_time = utcnow()
            return
        before = {one["VariantName"]: one for one in self.production_variants} if keeps_weights else {}
        with self._guard:
            replaced, self._servers = self._servers, started
            self.production_variants = [
                _describe(one, before.get(one["VariantName"]), started) for one in config["ProductionVariants"]
            ]
            self.endpoint_config_name = config_name
            self.data_capture_config = config.get("DataCaptureConfig") or {}
        self.endpoint_status, self.last_modified_time = "InService", utcnow()
        for server in replaced.values():
            server.close_later()

    def _start(self, variant: dict[str, Any]) -> ModelServer:
        stream = f"{variant['VariantName']}/i-{time.time_ns():017x}"
        log = LogStream(self._backend, f"/aws/sagemaker/Endpoints/{self.endpoint_name}", stream)
        return ModelServer(self._machine, self._backend, variant["ModelName"], log)


def _describe(
    variant: dict[str, Any], before: dict[str, Any] | None, servers: dict[str, ModelServer]
) -> dict[str, Any]:
    """A variant of a configuration as DescribeEndpoint tells it."""
    name = variant["VariantName"]
    image = servers[name].container_spec.get("Image")
    described: dict[str, Any] = {"VariantName": name}
    described |= {"DeployedImages": [{"SpecifiedImage": image, "ResolvedImage": image}]} if image else {}
    values = {"Weight": variant.get("InitialVariantWeight", 1.0), "InstanceCount": variant.get("InitialInstanceCount")}
    values["ServerlessConfig"] = variant.get("ServerlessConfig")
    for part, value in values.items():
        if value is not None:
            kept = (before or {}).get(f"Current{part}", value) if part != "ServerlessConfig" else value
            described |= {f"Current{part}": kept, f"Desired{part}": kept}
    return described


def operations() -> dict[str, Callable[[SageMakerResponse], ActionResult]]:
    """Of SageMaker's API, by moto's names for them; moto's own for the rest, held against AWS's rules."""
    moto_create_model, moto_create_config = SageMakerResponse.create_model, SageMakerResponse.create_endpoint_config

    def create_model(response: SageMakerResponse) -> ActionResult:
        request, backend = response.params, response.sagemaker_backend
        name = request["ModelName"]
        if name in backend._models:
            raise ValidationError(message=f'Cannot create already existing model "{backend._models[name].arn}".')
        checks.require(request, "ExecutionRoleArn")
        checks.check_role(backend, request["ExecutionRoleArn"])
        for spec in [request.get("PrimaryContainer"), *(request.get("Containers") or [])]:
            uri = model_uri(spec) if spec else None
            if uri is not None and not Storage(backend).keys(uri):
                raise ValidationError(message=f"Could not find model data at {uri}.")
        return moto_create_model(response)

    def create_endpoint_config(response: SageMakerResponse) -> ActionResult:
        request, configs = response.params, response.sagemaker_backend.endpoint_configs
        name = request["EndpointConfigName"]
        if name in configs:
            arn = configs[name].endpoint_config_arn
            raise ValidationError(message=f'Cannot create already existing endpoint configuration "{arn}".')
        checks.require(request, "ProductionVariants")
        return moto_create_config(response)

    def update_endpoint(response: SageMakerResponse) -> ActionResult:
        endpoint = _find(response)
        endpoint.change(response.params["EndpointConfigName"], bool(response.params.get("RetainAllVariantProperties")))
        return ActionResult({"EndpointArn": endpoint.arn})

    def update_endpoint_weights_and_capacities(response: SageMakerResponse) -> ActionResult:
        endpoint = _find(response)
        endpoint.weigh(response.params["DesiredWeightsAndCapacities"])
        return ActionResult({"EndpointArn": endpoint.arn})

    own = (create_model, create_endpoint_config, update_endpoint, update_endpoint_weights_and_capacities)
    return {function.__name__: function for function in own}


def install(machine: Machine) -> None:
    """Creation and deletion, in moto's backend, where stacks use them as well as the API does."""

    def create_endpoint(
        backend: SageMakerModelBackend, endpoint_name: str, endpoint_config_name: str, tags: list[dict[str, str]]
    ) -> FakeEndpoint:
        there = backend.endpoints.get(endpoint_name)
        if there is not None and there.endpoint_status != "Deleting":  # a stack replaces one without waiting
            arn = there.arn
            raise ValidationError(message=f'Cannot create already existing endpoint "{arn}".')
        backend.describe_endpoint_config(endpoint_config_name)
        endpoint = Endpoint(machine, backend, endpoint_name, endpoint_config_name, tags)  # type: ignore[abstract]
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
    """Raises ValidationError when there is no such endpoint."""
    name = response.params["EndpointName"]
    response.sagemaker_backend.describe_endpoint(name)
    return cast("Endpoint", response.sagemaker_backend.endpoints[name])
