"""The files of deploy/: read by the tools that know their formats, and their options are ours."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml

from tests.sizes import PAGE, in_page, table
from weaver.cli import app
from weaver.engine.cluster.config import read_cluster_file

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
KUBERNETES = DEPLOY / "kubernetes"
CLUSTERS = ("cluster", "pool")
FILES = (
    "Dockerfile",
    "compose.yaml",
    "weaver.service",
    "weaver.sbatch",
    "kubernetes/server/server.yaml",
    "kubernetes/cluster/raycluster.yaml",
)
OLDEST_KUBERNETES = "1.29"


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    run(BIN / "hadolint", DEPLOY / "Dockerfile")


def test_the_compose_file_is_one() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    run(BIN / "check-jsonschema", *schema, DEPLOY / "compose.yaml")


def test_the_quick_start_is_of_the_image_that_the_dockerfile_makes() -> None:
    """No daemon and no base image are at hand here: what its lines name is looked up instead."""
    image = (DEPLOY / "Dockerfile").read_text()
    page = (ROOT / "docs/deployment.md").read_text()
    [lines] = re.findall(r"```bash\n(docker build .*?)```", page, re.DOTALL)
    built, started, keys, asked = lines.splitlines()
    [file, tag] = re.findall(r"-[ft] (\S+)", built)
    assert ROOT / file == DEPLOY / "Dockerfile" and started.endswith(f" {tag}")
    assert f":{re.search('EXPOSE (.+)', image)[1]} " in started  # type: ignore[index]
    assert f":{re.search('VOLUME (.+)', image)[1]} " in started  # type: ignore[index]
    assert 'ENTRYPOINT ["weaver"]' in image and 'CMD ["serve"]' in image
    assert keys.startswith("docker exec weaver weaver keys create")
    assert asked.split()[-1].endswith("/readyz") and "/readyz" in image


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_is_one_and_is_hardened(tmp_path: Path) -> None:
    text = (DEPLOY / "weaver.service").read_text()
    unit = tmp_path / "weaver.service"
    unit.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={BIN / 'weaver'}", text))
    run("systemd-analyze", "verify", unit)
    run("systemd-analyze", "security", "--offline=true", "--threshold=25", unit)


@pytest.mark.parametrize("name", FILES)
def test_its_variables_are_options_of_the_server(name: str) -> None:
    serve = typer.main.get_command(app).get_command(None, "serve")  # type: ignore[attr-defined]
    envvars = [parameter.envvar for parameter in serve.params]
    known = {name for one in envvars for name in (one if isinstance(one, list) else [one])}
    used = set(re.findall(r"\b(WEAVER_[A-Z_]+)", (DEPLOY / name).read_text()))
    assert used <= known
    assert used


@pytest.mark.parametrize("name", FILES)
def test_no_secret_is_in_it(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert not re.search(r"wv-|://\w+:[^@\s]+@", text)
    for line in re.findall(r"^.*PASSWORD.*$", text, re.MULTILINE):
        assert "${DATABASE_PASSWORD:?" in line or line.startswith("#"), line


def test_everything_that_the_image_is_built_from_reaches_the_builder() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    allowed = (ROOT / ".dockerignore").read_text().split()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed


# --- Kubernetes -------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def resources(folder: Path) -> list[dict[str, Any]]:
    """Of a kustomization and those that it is made of, patched as it says."""
    [told] = read(folder / "kustomization.yaml")
    found = []
    for name in told["resources"]:
        path = folder / name
        found += resources(path) if path.is_dir() else read(path)
    for patch in told.get("patches", []):
        [target] = [one for one in found if meant(one, patch["target"])]
        for operation in yaml.safe_load(patch["patch"]):
            change(target, **operation)
    return found


def meant(resource: dict[str, Any], target: dict[str, str]) -> bool:
    return (resource["kind"], resource["metadata"]["name"]) == (target["kind"], target["name"])


def change(resource: Any, *, op: str, path: str, value: Any = None) -> None:
    """By RFC 6902, of something that is there."""
    *places, last = [part.replace("~1", "/") for part in path.split("/")[1:]]
    for place in places:
        resource = resource[int(place) if isinstance(resource, list) else place]
    assert last in resource
    if op == "remove":
        del resource[last]
    else:
        assert op == "replace"
        resource[last] = value


def pods(resource: dict[str, Any]) -> list[dict[str, Any]]:
    spec = resource["spec"]
    if resource["kind"] == "RayCluster":
        groups = spec["headGroupSpec"], *spec["workerGroupSpecs"]
        return [group["template"] for group in groups]
    return [spec["template"]] if "template" in spec else []


def raycluster(name: str) -> dict[str, Any]:
    [one] = [one for one in resources(KUBERNETES / name) if one["kind"] == "RayCluster"]
    return one


@pytest.mark.parametrize("name", ["server", *CLUSTERS])
def test_kubernetes_takes_what_a_kustomization_has(name: str) -> None:
    found = resources(KUBERNETES / name)
    assert {one["kind"] for one in found} >= {"PersistentVolumeClaim", "Service", "NetworkPolicy"}
    for one in found:
        if one["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(one, OLDEST_KUBERNETES, strict=True)
        for pod in pods(one):
            whole = {"apiVersion": "v1", "kind": "Pod", **pod}
            kubernetes_validate.validate(whole, OLDEST_KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["server", *CLUSTERS])
def test_what_is_named_in_a_kustomization_is_there(name: str) -> None:
    found = resources(KUBERNETES / name)
    claims = {one["metadata"]["name"] for one in found if one["kind"] == "PersistentVolumeClaim"}
    [told] = read(KUBERNETES / name / "kustomization.yaml")
    maps = {one["name"] for one in told.get("configMapGenerator", [])}
    [service] = [one for one in found if one["kind"] == "Service"]
    every = [pod for one in found for pod in pods(one)]
    served = []
    for pod in every:
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001  # the image's own
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps
        [container] = pod["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert {"/tmp", "/dev/shm"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items():
            served.append({port["name"] for port in container["ports"]})
    assert len(served) == 1 and "http" in served[0]


@pytest.mark.parametrize("name", CLUSTERS)
def test_ranks_and_samplers_fit_the_gpus_that_are_asked_for(name: str) -> None:
    config = read_cluster_file(KUBERNETES / name / "cluster.toml")
    [group] = raycluster(name)["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    gpus = group["replicas"] * int(limits["nvidia.com/gpu"])
    cpus = group["replicas"] * int(limits["cpu"])
    counted = [(one.ranks, one) for one in config.trainer]
    counted += [(pool.workers, pool) for pool in config.pool]
    assert sum(count for count, one in counted if one.device == "cuda") <= gpus
    assert sum(count * one.cpus for count, one in counted) <= cpus
    home = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}["home"]
    assert config.shared is not None and config.shared.is_relative_to(home)
    head = raycluster(name)["spec"]["headGroupSpec"]
    given = head["rayStartParams"]
    assert (given["num-cpus"], given["num-gpus"]) == ("0", "0")  # the server's GPU is not Ray's
    [server] = head["template"]["spec"]["containers"]
    sampled_by_the_server = "nvidia.com/gpu" in server["resources"]["limits"]
    assert sampled_by_the_server == (not config.pools())


def test_the_pool_has_the_environment_that_the_image_makes() -> None:
    [pool] = read_cluster_file(KUBERNETES / "pool" / "cluster.toml").pool
    text = (DEPLOY / "Dockerfile").read_text()
    assert f"install-sampler --folder {pool.environment} " in text
    assert f"COPY --from=build {pool.environment} {pool.environment}\n" in text
    command = typer.main.get_command(app).get_command(None, "cluster")  # type: ignore[attr-defined]
    options = [o for p in command.commands["install-sampler"].params for o in p.opts]
    head = (KUBERNETES / "pool" / "kustomization.yaml").read_text()
    [option] = re.findall(r"SAMPLER=(\S+)", head)
    assert {option, "--folder"} <= {*options}


def test_the_clusters_ray_is_the_one_that_is_installed_with_it() -> None:
    [pin] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert raycluster("cluster")["spec"]["rayVersion"] == pin


# --- Slurm ------------------------------------------------------------------------------------

STUBS = {
    "scontrol": "printf 'node1\\nnode2\\n'",
    "srun": 'echo "$@" >>"$LOG"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1",
    "ray": "[[ $1 == health-check ]] && exit 0; exec sleep 30",
    "weaver": 'trap "echo stopped >>\\"$LOG\\"; exit 0" TERM; while :; do sleep 0.05; done',
}


def test_the_scripts_have_no_fault_that_shellcheck_knows() -> None:
    run(BIN / "shellcheck", DEPLOY / "weaver.sbatch", DEPLOY / "backup.sh")


@pytest.mark.parametrize(("pool", "rays", "kept"), [(False, 7, "7"), (True, 8, "")])
def test_the_slurm_job_starts_ray_then_the_server_which_ends_in_order(
    tmp_path: Path, pool: bool, rays: int, kept: str
) -> None:
    """With a pool Ray has all GPUs, as the server samples nothing."""
    text = (KUBERNETES / ("pool" if pool else "cluster") / "cluster.toml").read_text()
    (tmp_path / "cluster.toml").write_text(text)
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    log = tmp_path / "log"
    variables = {
        **os.environ,
        "HOME_FOLDER": str(tmp_path),
        "DATABASE": "postgresql://host/weaver",
        "LOG": str(log),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    job = subprocess.Popen(
        ["bash", DEPLOY / "weaver.sbatch"], env=variables, start_new_session=True
    )
    try:
        end = time.monotonic() + 30
        begun = ("ray start --head", "ray start --block", "weaver serve")  # in any order
        while not all(words in (log.read_text() if log.exists() else "") for words in begun):
            assert time.monotonic() < end and job.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)  # until it listens to the signal
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 0
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    told = log.read_text().splitlines()
    head = next(line for line in told if "ray start --head" in line)
    shown = ",".join(map(str, range(rays)))
    assert f"CUDA_VISIBLE_DEVICES={shown} " in head and f"--num-gpus={rays} " in head
    ranks = next(line for line in told if "ray start --block" in line)
    assert "--exclude=node1" in ranks and "--address=10.0.0.1:6379" in ranks
    server = next(line for line in told if "weaver serve" in line)
    assert "--nodelist=node1" in server and f"CUDA_VISIBLE_DEVICES={kept} " in server
    assert told[-1] == "stopped"


# --- sizes ------------------------------------------------------------------------------------


def test_the_page_has_the_sizes_that_the_engine_reckons_with() -> None:
    assert in_page(PAGE.read_text()) == table(), "python -m tests.sizes writes it anew"
