"""A program that uses the unmodified SageMaker SDK: trainer, tuner, endpoint, transformer. Prints JSON at its end.

Its arguments: a folder with source/ and data/, the URI of a tuning job's program, of a model, of objects to transform.
"""

import json
import os
import sys
from pathlib import Path

import boto3
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.parameter import CategoricalParameter, ContinuousParameter
from sagemaker.core.resources import Endpoint, EndpointConfig, Model
from sagemaker.core.shapes import ContainerDefinition, MetricDefinition, ProductionVariant
from sagemaker.core.transformer import Transformer
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, InputData, OutputDataConfig, SourceCode
from sagemaker.train.distributed import Torchrun
from sagemaker.train.tuner import HyperparameterTuner

BUCKET, ROLE = os.environ["SAGEMAKER_LOCAL_BUCKET"], os.environ["SAGEMAKER_LOCAL_ROLE"]
OUTPUT = f"s3://{BUCKET}/by-sdk"


def session() -> Session:
    return Session(boto_session=boto3.Session(), default_bucket=BUCKET)


def train(folder: Path) -> str:
    """Torchrun on two hosts, not waited for: the job's name."""
    trainer = ModelTrainer(
        training_image="1.dkr.ecr/any:1",
        source_code=SourceCode(source_dir=str(folder / "source"), entry_script="train.py"),
        compute=Compute(instance_type="ml.m5.xlarge", instance_count=2),
        distributed=Torchrun(process_count_per_node=1),
        hyperparameters={"lr": 0.5},
        role=ROLE,
        base_job_name="by-sdk",
        sagemaker_session=session(),
        output_data_config=OutputDataConfig(s3_output_path=OUTPUT),
    ).with_metric_definitions([MetricDefinition(name="world", regex="world=([0-9]+)")])
    data = InputData(channel_name="train", data_source=str(folder / "data"))
    trainer.train(input_data_config=[data], wait=False, logs=False)
    return trainer._latest_training_job.training_job_name


def tune(program: str) -> tuple[str, str]:
    """Two trials: names of the tuning job and of its best training job."""
    trainer = ModelTrainer(
        training_image="1.dkr.ecr/program:1",
        compute=Compute(instance_type="ml.m5.xlarge", instance_count=1),
        hyperparameters={"epochs": 2},
        role=ROLE,
        base_job_name="tuned-by-sdk",
        sagemaker_session=session(),
        output_data_config=OutputDataConfig(s3_output_path=OUTPUT),
    )
    tuner = HyperparameterTuner(
        model_trainer=trainer,
        objective_metric_name="f1",
        hyperparameter_ranges={"lr": ContinuousParameter(0.1, 1.0), "kind": CategoricalParameter(["a", "b"])},
        metric_definitions=[{"Name": "f1", "Regex": "f1=([0-9.]+)"}],
        max_jobs=2,
        max_parallel_jobs=2,
        strategy="Random",
    )
    tuner.tune(inputs=[InputData(channel_name="program", data_source=program)], wait=False)
    tuner.latest_tuning_job.wait(poll=1)
    return tuner.latest_tuning_job.hyper_parameter_tuning_job_name, tuner.best_training_job()


def deploy(model: str) -> str:
    """An endpoint's answer to `hello`."""
    container = ContainerDefinition(
        image="1.dkr.ecr/model-program:1", model_data_url=model, environment={"VOICE": "sdk"}
    )
    Model.create(model_name="by-sdk", execution_role_arn=ROLE, primary_container=container)
    variant = ProductionVariant(
        variant_name="only",
        model_name="by-sdk",
        instance_type="ml.c7i.large",
        initial_instance_count=1,
        initial_variant_weight=1,
    )
    EndpointConfig.create(endpoint_config_name="by-sdk", production_variants=[variant])
    endpoint = Endpoint.create(endpoint_name="by-sdk", endpoint_config_name="by-sdk")
    endpoint.wait_for_status("InService", poll=1)
    assert Endpoint.get("by-sdk").endpoint_status == "InService"
    answer = endpoint.invoke(body=b"hello", content_type="text/plain").body.read().decode()
    endpoint.delete()
    return answer


def transform(objects: str) -> None:
    """A batch transform with the model of `deploy`, into OUTPUT."""
    transformer = Transformer("by-sdk", 1, "ml.m5.xlarge", output_path=OUTPUT, sagemaker_session=session())
    transformer.transform(objects, content_type="text/plain", wait=False, logs=False)
    transformer.latest_transform_job.wait(poll=1)


if __name__ == "__main__":
    folder, program, model, objects = sys.argv[1:]
    results = {"train": train(Path(folder)), "deploy": deploy(model), "tune": tune(program)}
    transform(objects)
    print(json.dumps(results))
