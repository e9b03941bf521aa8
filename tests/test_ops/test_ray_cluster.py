from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "ray_cluster.yaml"


def load() -> dict[str, Any]:
    document = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def commands(document: dict[str, Any]) -> list[str]:
    return [c for key, value in document.items() if key.endswith("_commands") for c in value]


def ray_start_arguments(kind: str) -> list[str]:
    command = load()[f"{kind}_start_ray_commands"][-1]
    return shlex.split(command.partition("/ray start ")[2])


def prepared() -> dict[str, Any]:
    """What `ray up` makes of the file before it touches a node."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(load())
    validate_config(config)
    return config


def test_ray_prepares_and_validates_the_cluster_file():
    config = prepared()
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    (node_type,) = config["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])


def test_rays_validation_sees_a_misspelt_key(monkeypatch: pytest.MonkeyPatch):
    from jsonschema import ValidationError

    wrong = {**load(), "max_worker": 3}
    monkeypatch.setitem(globals(), "load", lambda: wrong)
    with pytest.raises(ValidationError, match="max_worker"):
        prepared()


def test_head_and_workers_get_their_own_extra_of_the_package():
    config = prepared()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert {"cpu", "gpu"} <= set(extras)
    assert any("icestream[cpu]" in c for c in config["head_setup_commands"])
    assert any("icestream[gpu]" in c for c in config["worker_setup_commands"])
    assert not any("icestream[gpu]" in c for c in config["head_setup_commands"])


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_start_knows_every_option(kind: str):
    from ray.scripts.scripts import start

    arguments = [a.replace("$RAY_HEAD_IP", "10.0.0.1") for a in ray_start_arguments(kind)]
    parsed = start.make_context("start", arguments).params
    assert parsed["metrics_export_port"] == 8090
    assert parsed["head"] == (kind == "head")
    assert parsed["num_gpus"] == (0 if kind == "head" else None)


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_token_authentication_is_set_wherever_ray_starts(kind: str):
    document = load()
    command = document[f"{kind}_start_ray_commands"][-1]
    assert "export RAY_AUTH_MODE=token" in command
    assert command.index("RAY_AUTH_MODE") < command.index("ray start")
    assert document["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in document["setup_commands"]


def test_no_secret_stands_in_the_file():
    text = CLUSTER.read_text(encoding="utf-8")
    assert "RAY_AUTH_TOKEN=" not in text
    assert "PRIVATE KEY" not in text


def test_every_placeholder_is_marked():
    for line in CLUSTER.read_text(encoding="utf-8").splitlines():
        is_marked = "CHANGE" in line or line.strip().startswith("#")
        assert is_marked or "example.org" not in line or line.strip().startswith("- gpu")


def test_files_that_commands_name_are_in_the_repository():
    joined = " ".join(commands(load()))
    assert "~/icestream/constraints.txt" in joined
    assert (ROOT / "constraints.txt").is_file()


def test_kubernetes_cluster_has_a_head_without_and_workers_with_gpus_and_a_token():
    spec = yaml.safe_load((ROOT / "ops/kuberay/raycluster.yaml").read_text(encoding="utf-8"))["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in head
    (group,) = spec["workerGroupSpecs"]
    worker = group["template"]["spec"]["containers"][0]["resources"]
    assert worker["limits"]["nvidia.com/gpu"] == worker["requests"]["nvidia.com/gpu"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
