"""The templates for clusters: scripts that bash reads, objects that belong together, settings that are accepted.

No scheduler and no cluster is asked here.
"""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.settings import Section, load_settings
from coordinator.config import CoordinatorConfig
from worker.config import WorkerConfig
from worker.launch import check_launch

yaml = pytest.importorskip("yaml")

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
SLURM, KUBERNETES = EXAMPLES / "slurm", EXAMPLES / "kubernetes"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
MANIFESTS = sorted(KUBERNETES.glob("*.yaml"))


def objects(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    found = [each for each in objects(path) if each["kind"] == kind]
    assert len(found) == 1, f"{path.name}: one {kind} is expected"
    return found[0]


def pods(path: Path) -> Iterator[dict[str, Any]]:
    """The pod templates."""
    for each in objects(path):
        if each["kind"] in {"Job", "StatefulSet", "Deployment"}:
            yield each["spec"]["template"]


def settings_in(text: str, role: type[Section], folder: Path) -> Any:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(role, path, environ={})


def role_of(file: str) -> type[Section]:
    return WorkerConfig if "worker" in file else CoordinatorConfig


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_batch_script_is_read_by_bash_and_stops_at_the_first_error(script: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    checked = subprocess.run([bash, "-n", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_batch_script_names_settings_that_are_there_and_sets_keys_that_exist(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    named = re.findall(r"--config (\S+)", text)
    assert named
    assert all((SLURM / file).is_file() for file in named)
    text = re.sub(r"\$\{?\w+\}?", "x", text)  # what the shell puts in
    changes = [change.replace('\\"', '"') for change in re.findall(r'--set "((?:[^"\\]|\\.)*)"', text)]
    for file in named:
        load_settings(role_of(file), SLURM / file, overrides=changes, environ={})


def test_as_many_processes_are_launched_as_gpus_are_asked_for() -> None:
    for script, file in (("worker.sbatch", "worker.toml"), ("workers.sbatch", "array-worker.toml")):
        asked = re.search(r"#SBATCH --gpus=(\d+)", (SLURM / script).read_text(encoding="utf-8"))
        config = load_settings(WorkerConfig, SLURM / file, environ={})
        check_launch(config.launch)
        assert asked is not None
        assert config.launch.processes == int(asked[1])
    federation = load_settings(CoordinatorConfig, SLURM / "federation.toml", environ={})
    assert federation.training.batch_size % config.launch.processes == 0


def test_the_federation_of_the_cluster_waits_for_as_many_workers_as_the_array_has() -> None:
    federation = load_settings(CoordinatorConfig, SLURM / "federation.toml", environ={})
    array = re.search(r"--array=0-(\d+)", (SLURM / "workers.sbatch").read_text(encoding="utf-8"))
    assert array is not None
    assert federation.rounds.min_clients == int(array[1]) + 1


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_the_settings_in_a_manifest_are_accepted(manifest: Path, tmp_path: Path) -> None:
    held = [(name, text) for each in objects(manifest) for name, text in each.get("data", {}).items()]
    assert held
    for name, text in held:
        settings_in(text, role_of(name), tmp_path)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_every_mount_has_a_volume_and_every_volume_a_mount(manifest: Path) -> None:
    for each in objects(manifest):
        if "template" not in each.get("spec", {}):
            continue
        pod = each["spec"]["template"]["spec"]
        claimed = {claim["metadata"]["name"] for claim in each["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in pod["volumes"]} | claimed
        containers = [*pod["containers"], *pod.get("initContainers", [])]
        assert {mount["name"] for container in containers for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_no_pod_runs_as_root_or_may_become_it(manifest: Path) -> None:
    for template in pods(manifest):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_the_service_reaches_the_port_on_which_the_coordinator_listens() -> None:
    path = KUBERNETES / "coordinator.yaml"
    service, stateful = of_kind(path, "Service"), of_kind(path, "StatefulSet")
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert stateful["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert stateful["spec"]["replicas"] == 1
    settings = tomllib.loads(of_kind(path, "ConfigMap")["data"]["federation.toml"])
    port = stateful["spec"]["template"]["spec"]["containers"][0]["ports"][0]
    assert settings["server"]["listen"].endswith(f":{port['containerPort']}")
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert service["metadata"]["name"] in settings["server"]["identity"]["names"]


def test_nothing_reaches_a_worker_and_its_token_is_a_secret() -> None:
    path = KUBERNETES / "worker.yaml"
    job, policy = of_kind(path, "Job"), of_kind(path, "NetworkPolicy")
    assert {each["kind"] for each in objects(path)}.isdisjoint({"Service", "Ingress"})
    assert policy["spec"]["ingress"] == []
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert "ports" not in container
    settings = tomllib.loads(of_kind(path, "ConfigMap")["data"]["worker.toml"])
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    secret = next(volume for volume in pod["volumes"] if "secret" in volume)
    assert settings["coordinator"]["join_token_file"].startswith(mounted[secret["name"]])
    assert settings["launch"]["processes"] == container["resources"]["limits"]["nvidia.com/gpu"]
