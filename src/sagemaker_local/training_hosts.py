"""The hosts of a training job: one container each, with the folders and files that SageMaker lays out in /opt/ml."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagemaker_local.container_init import MODEL_FOLDER
from sagemaker_local.storage import FolderMirror, Storage, path_inside

CHECKPOINTS = f"{MODEL_FOLDER}/checkpoints"
"""Where a job finds them, unless it asks for another folder."""
_FOLDERS = ("input/config", "input/data", "model", "output/data", "checkpoints", "code")


@dataclass(frozen=True)
class Host:
    """A machine of a training job, before its container starts."""

    name: str
    folder: Path
    """What the job sees as /opt/ml."""
    checkpoints: FolderMirror | None

    @property
    def failure(self) -> str:
        """What the job wrote into output/failure."""
        path = self.folder / "output" / "failure"
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def prepare_hosts(folder: Path, request: dict[str, Any], storage: Storage) -> list[Host]:
    """Write folders, configuration, channels and checkpoints of every host of a CreateTrainingJob request.

    Raises:
        FileNotFoundError: an object of a channel is gone.
        UnsafePathError: a key or a channel's name leads out of its folder.
    """
    resources = request["ResourceConfig"]
    names = [f"algo-{number}" for number in range(1, resources["InstanceCount"] + 1)]
    channels = request.get("InputDataConfig", [])
    hosts = []
    for index, name in enumerate(names):
        root = folder / name / "ml"
        for part in _FOLDERS:
            (root / part).mkdir(parents=True)
        configurations = {
            "hyperparameters": request.get("HyperParameters") or {},
            "resourceconfig": _resources(name, names, resources["InstanceType"]),
            "inputdataconfig": {channel["ChannelName"]: _channel(channel, request) for channel in channels},
        }
        for file, content in configurations.items():
            (root / "input" / "config" / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
        for channel in channels:
            source = channel["DataSource"]["S3DataSource"]
            objects = storage.objects(source["S3Uri"])
            if source.get("S3DataDistributionType") == "ShardedByS3Key":
                objects = objects[index :: len(names)]
            into = path_inside(root / "input" / "data", channel["ChannelName"])
            into.mkdir(parents=True, exist_ok=True)
            storage.download(objects, into)
        hosts.append(Host(name, root, _checkpoints(root, request.get("CheckpointConfig"), storage)))
    return hosts


def _resources(name: str, names: list[str], instance_type: str) -> dict[str, Any]:
    group = {"instance_group_name": "homogeneousCluster", "instance_type": instance_type, "hosts": names}
    return {
        "current_host": name,
        "current_instance_type": instance_type,
        "current_group_name": "homogeneousCluster",
        "hosts": names,
        "instance_groups": [group],
        "network_interface_name": "lo",  # eth0 on AWS: here all hosts are this machine
    }


def _channel(channel: dict[str, Any], request: dict[str, Any]) -> dict[str, str]:
    source = channel["DataSource"]["S3DataSource"]
    described = {
        "TrainingInputMode": channel.get("InputMode") or request["AlgorithmSpecification"]["TrainingInputMode"],
        "S3DistributionType": source.get("S3DataDistributionType", "FullyReplicated"),
        "RecordWrapperType": channel.get("RecordWrapperType", "None"),
    }
    return described | ({"ContentType": channel["ContentType"]} if channel.get("ContentType") else {})


def _checkpoints(root: Path, config: dict[str, str] | None, storage: Storage) -> FolderMirror | None:
    if config is None:
        return None
    folder = path_inside(root, str(Path(config.get("LocalPath") or CHECKPOINTS).relative_to(MODEL_FOLDER)))
    folder.mkdir(parents=True, exist_ok=True)
    mirror = FolderMirror(storage, folder, config["S3Uri"])
    mirror.restore()
    return mirror
