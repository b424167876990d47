"""cluster.yaml is a cluster that Ray accepts, that EC2 can start, and that keeps no secret."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmray.engine.cluster import SERVING

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture
def config() -> dict[str, Any]:
    """The file as `ray up` completes it."""
    from ray.autoscaler._private.util import prepare_config

    prepared: dict[str, Any] = prepare_config(yaml.safe_load(TEXT))
    return prepared


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account with the two instance profiles that the file asks for, and nothing real."""
    import boto3
    from moto import mock_aws

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair it makes to ~/.ssh
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        iam = boto3.client("iam", region_name="us-east-1")
        for name in ("mmray-head", "mmray-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
            iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        yield


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(config)


def test_the_head_drives_and_two_kinds_of_workers_come_and_go(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0, "work on the head can stall the whole cluster"
    assert any("GPU" not in kind["resources"] for kind in types.values())
    assert any(kind["resources"].get("GPU") for kind in types.values())
    for kind in types.values():
        assert 0 <= kind["min_workers"] < kind["max_workers"] <= config["max_workers"]
    # With no CPU at the start, a command would find nothing to run on.
    assert sum(kind["min_workers"] * kind["resources"]["CPU"] for kind in types.values()) > 0


def test_every_node_type_starts_with_the_resources_it_promises(
    config: dict[str, Any], aws: None
) -> None:
    """What `ray up` and the autoscaler do, up to the answer of EC2."""
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        provider.create_node(copy.deepcopy(kind["node_config"]), {"ray-node-name": name}, 1)

    ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
    started = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert len(started) == len(config["available_node_types"])
    assert all("IamInstanceProfile" in instance for instance in started)
    for kind in config["available_node_types"].values():
        machine = kind["node_config"]["InstanceType"]
        (found,) = ec2.describe_instance_types(InstanceTypes=[machine])["InstanceTypes"]
        if kind["resources"]["CPU"]:
            assert kind["resources"]["CPU"] == found["VCpuInfo"]["DefaultVCpus"], machine
        gpus = sum(gpu["Count"] for gpu in found.get("GpuInfo", {}).get("Gpus", []))
        assert kind["resources"].get("GPU", 0) == gpus, machine


def test_nodes_run_the_pinned_packages_with_the_token_on(config: dict[str, Any]) -> None:
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    assert any("constraints.txt" in command for command in config["setup_commands"])
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert f":{pinned['ray']}-" in config["docker"]["image"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = config[commands][-1]
        assert "RAY_AUTH_MODE=token" in start
        for name in (
            "ENABLE_HA_PROXY",
            "THROUGHPUT_OPTIMIZED",
            "REPLICA_GRPC_MAX_MESSAGE_LENGTH",
            "HTTP_PROXY_CALLBACK_IMPORT_PATH",
            "HAPROXY_LOG_TARGET",
        ):
            assert f"RAY_SERVE_{name}={SERVING[f'RAY_SERVE_{name}']}" in start
        (code,) = re.findall(r"PYTHONPATH=(\S+)", start)
        assert config["file_mounts"][f"{code}/mmray"] == "mmray"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_the_file_holds_no_credentials() -> None:
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{12,}", TEXT)
    assert not re.search(r"(?i)secret|password|aws_access|ssh_private_key", TEXT)
    assert not re.search(r"\b[0-9a-f]{32,}\b", TEXT), "a token?"
