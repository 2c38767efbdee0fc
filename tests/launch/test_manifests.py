"""The manifests against their schemas, and what has to agree inside each."""

import os
import pathlib
import re
import subprocess

import jsonschema
import manifest_schemas as schemas
import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCHEMAS = {
    "gke/tpu.yaml": schemas.JOBSET,
    "gke/gpu.yaml": schemas.JOBSET,
    "gke/runs.yaml": schemas.CLAIM,
    "skypilot.yaml": schemas.SKYPILOT,
}
# What ``jax.distributed`` is started from. Slurm, Kubernetes, SkyPilot and a TPU's runtime set theirs by themselves.
SET_BY_US = {"JAX_COORDINATOR_IP", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK", "JOBSET_NAME", "REPLICATED_JOB_NAME"}
SET_BY_ENGINES = re.compile(
    r"SLURM_\w+|SKYPILOT_NODE_(IPS|RANK)|SKYPILOT_NUM_NODES|JOB_COMPLETION_INDEX|TPU_WORKER_(ID|HOSTNAMES)"
)
OTHERS = {"TPU_NAME", "SLURM_SUBMIT_DIR", "SLURM_JOB_ID"}  # of the launchers themselves


def load(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def pod_of(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    return job, job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def test_every_manifest_has_a_schema():
    assert {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*.yaml")} == SCHEMAS.keys()


@pytest.mark.parametrize("name", SCHEMAS)
def test_manifests_are_valid(name):
    jsonschema.validate(load(name), SCHEMAS[name])


def test_a_misspelt_field_is_noticed():
    manifest = load("gke/gpu.yaml")
    _, job, _ = pod_of(manifest)
    job["completion"] = job.pop("completions")
    with pytest.raises(jsonschema.ValidationError, match="completion"):
        jsonschema.validate(manifest, schemas.JOBSET)


@pytest.mark.parametrize("name", ["gke/tpu.yaml", "gke/gpu.yaml"])
def test_a_pod_for_each_host_and_what_it_mounts(name):
    _, job, pod = pod_of(load(name))
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume}
    assert claims == {load("gke/runs.yaml")["metadata"]["name"]}
    assert "ReadWriteMany" in load("gke/runs.yaml")["spec"]["accessModes"]


def test_the_chips_of_the_tpu_manifest_are_those_of_its_topology():
    _, job, pod = pod_of(load("gke/tpu.yaml"))
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == rows * columns


def joined(environment):
    """What ``jax.distributed`` is started with in a process that has this environment."""
    hosts = pytest.importorskip("ddpo_jax.hosts.environment", reason="this version runs in one process")
    return hosts.read(environment).arguments


def test_the_coordinator_of_the_gpu_manifest_is_its_first_pod():
    manifest = load("gke/gpu.yaml")
    name, (job, spec, pod) = manifest["metadata"]["name"], pod_of(manifest)
    (container,) = pod["containers"]
    # What Kubernetes and JobSet write into a pod and its annotations.
    annotations = {"jobset.sigs.k8s.io/jobset-name": name, "jobset.sigs.k8s.io/replicatedjob-name": job["name"]}
    environment = {"JOB_COMPLETION_INDEX": "1"}
    for entry in container["env"]:
        path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        annotation = re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)
        environment[entry["name"]] = annotations[annotation[1]] if annotation else entry["value"]
    assert environment["NNODES"] == str(spec["completions"]) and manifest["spec"]["network"]["enableDNSHostnames"]
    started = joined(environment)
    # <JobSet>-<replicated job>-<job's index>-<pod's index>.<subdomain, by default the JobSet's name>
    address, _, port = started["coordinator_address"].rpartition(":")
    assert address == f"{name}-{job['name']}-0-0.{name}"
    assert int(port) in [entry["containerPort"] for entry in container["ports"]]
    assert (started["num_processes"], started["process_id"]) == (spec["completions"], 1)


@pytest.mark.parametrize(
    "path", sorted(path for path in LAUNCH.rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_variables_that_name_the_processes_are_those_that_training_reads(path):
    """A name that looks like one of them and is none would leave every process alone."""
    start = "JAX|SLURM|SKYPILOT|TPU|JOB|JOBSET|REPLICATED|NNODES|NODE|COORDINATOR|MASTER|WORLD|RANK"
    named = set(re.findall(rf"\b(?:{start})(?:_[A-Z]+)*\b", path.read_text()))
    named = {name for name in named if "_" in name or name in SET_BY_US} - OTHERS
    assert {name for name in named if name not in SET_BY_US and not SET_BY_ENGINES.fullmatch(name)} == set()


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_the_launcher_fills_in_image_name_and_arguments(kind):
    arguments = ["--config=configs/aesthetic.py", '--config.reward.prompt="a|b & c\\d" $HOME']
    printed = subprocess.run(
        ["bash", str(LAUNCH / "gke" / "launch.sh"), "up", kind, "--dry-run", *arguments],
        env=os.environ | {"IMAGE": "registry/us-east1/ddpo_jax:1", "NAME": "second"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    first, _, rest = printed.partition("kubectl apply -f - <<'END'\n")
    assert first == f"kubectl apply -f {LAUNCH / 'gke'}/runs.yaml\n" and rest.endswith("END\n")
    manifest = yaml.safe_load(rest.removesuffix("END\n"))
    jsonschema.validate(manifest, schemas.JOBSET)
    (container,) = pod_of(manifest)[2]["containers"]
    assert manifest["metadata"]["name"] == "second" and container["image"] == "registry/us-east1/ddpo_jax:1"
    assert container["args"] == ["--workdir=/runs/second", *arguments]


def test_the_skypilot_task_goes_on_after_a_preemption():
    task = load("skypilot.yaml")
    assert task["resources"]["use_spot"] and task["resources"]["job_recovery"]["strategy"]
    (mount,) = task["file_mounts"]  # which outlives the machines
    assert f"--workdir={mount}/$RUN" in task["run"]
    assert set(re.findall(r"\$([A-Z]+)", task["setup"] + task["run"])) <= task["envs"].keys()


def test_the_image_has_what_training_needs():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    for name in copied:
        assert (LAUNCH.parent / name).exists(), name
    assert {"setup.py", "ddpo_jax", "configs"} <= set(copied)
    assert 'ENTRYPOINT ["python", "-m", "ddpo_jax.main"]' in lines  # the first process, which gets SIGTERM
