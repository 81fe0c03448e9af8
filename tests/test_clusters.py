"""What starts clusters: each file under its own schema, and the paths, names and keys in it are there."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from spa_ray.config import arm_configs
from spa_ray.config.gpus import gpus_wanted
from spa_ray.config.models import Model, Resources
from spa_ray.engine.placement import check_placement, engine_resources, executor_backend, takes_all_cores
from spa_ray.errors import InputError

TOP = Path(__file__).parents[1]
LAUNCHER = ("cluster.yaml", "deploy/gcp.yaml")
MIB = 2**20


def text_of(name: str) -> str:
    return (TOP / name).read_text(encoding="utf-8")


def locked(package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==(.+)$", text_of("requirements/gpu.lock"), re.MULTILINE)
    assert found, package
    return found[1]


# --- Ray's launcher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_own_schema_takes_the_launchers_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(text_of(name))))


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_schema_can_refuse_it(name: str) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text_of(name))
    config["available_node_types"]["gpu_spot"]["min_worker"] = 0
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHER)
def test_gpu_workers_start_at_none_and_the_head_is_no_gpu_node(name: str) -> None:
    config = yaml.safe_load(text_of(name))
    workers = dict(config["available_node_types"])
    head = workers.pop(config["head_node_type"])
    assert "GPU" not in head["resources"]
    assert all(
        worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"] for worker in workers.values()
    )


def test_aws_takes_spot_first_and_keeps_its_head() -> None:
    types = yaml.safe_load(text_of("cluster.yaml"))["available_node_types"]
    market = {name: node["node_config"].get("InstanceMarketOptions") for name, node in types.items()}
    assert market == {"head": None, "gpu_spot": {"MarketType": "spot"}, "gpu_on_demand": None}
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]
    assert types["gpu_spot"]["node_config"]["InstanceType"] == types["gpu_on_demand"]["node_config"]["InstanceType"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_node_installs_the_gpu_lock_asks_for_the_token_and_the_dashboard_stays_on_loopback(name: str) -> None:
    config = yaml.safe_load(text_of(name))
    assert "SPA_DEVICE=gpu ~/spa_ray/scripts/setup.sh" in config["setup_commands"]
    starts = [
        command
        for role in ("head", "worker")
        for command in config[f"{role}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert ["--dashboard-host=127.0.0.1" in command for command in starts] == [True, False]
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_node_gets_what_its_set_up_reads_and_no_more(name: str) -> None:
    mounts = yaml.safe_load(text_of(name))["file_mounts"]
    ours = {remote: local for remote, local in mounts.items() if not local.startswith("~")}
    assert ours == {f"/home/ubuntu/spa_ray/{local}": local for local in ours.values()}
    assert set(ours.values()) == {"LICENSE", "README.md", "pyproject.toml", "requirements", "scripts", "spa_ray"}
    assert all((TOP / local).exists() for local in ours.values())


# --- KubeRay ----------------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """The schema as the API server applies it with strict field validation: an unknown field is an error."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    mended = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        mended["additionalProperties"] = False
    return mended


@pytest.fixture(scope="module")
def crd() -> dict[str, Any]:
    packed = (TOP / "tests/data/rayjob-v1.schema.json.gz").read_bytes()
    return strict(json.loads(gzip.decompress(packed)))


@pytest.fixture
def manifests() -> dict[str, dict[str, Any]]:
    return {m["kind"]: m for m in yaml.safe_load_all(text_of("deploy/kuberay-rayjob.yaml"))}


def test_kuberays_schema_takes_the_job(crd: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> None:
    import jsonschema

    jsonschema.Draft202012Validator(crd).validate(manifests["RayJob"])


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("spec", "rayClusterSpec", "enableInTreeAutoscaling"), "yes"),
        (("spec", "entryPoint"), "python"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "images"), "x"),
        (("spec", "rayClusterSpec", "autoscalerOptions", "idleTimeoutSeconds"), "600"),
    ],
)
def test_kuberays_schema_can_refuse_it(
    crd: dict[str, Any], manifests: dict[str, dict[str, Any]], path: tuple[str | int, ...], wrong: Any
) -> None:
    import jsonschema

    inner: Any = manifests["RayJob"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(crd).validate(manifests["RayJob"])


def test_the_kubernetes_job_starts_the_pipeline_with_a_config_that_fits_its_pods(
    manifests: dict[str, dict[str, Any]],
) -> None:
    spec = manifests["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    _, script, flag, path = spec["entrypoint"].split()
    assert (TOP / script.removeprefix("/home/ray/spa_ray/")).is_file()
    assert flag == "--config"
    files = manifests["ConfigMap"]["data"]
    (run,) = arm_configs(yaml.safe_load(files[Path(path).name]), [], where="run.yaml", stem="run").values()
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted["config"] == str(Path(path).parent)
        assert run.run_dir.startswith(mounted["shared"] + "/")
        (config_map,) = [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v]
        assert config_map == manifests["ConfigMap"]["metadata"]["name"]
    check_placement(run.model, run.resources)
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert run.resources.gpus_per_engine == gpus
    assert run.resources.engines.max == run.resources.train_workers == workers["maxReplicas"]
    assert workers["minReplicas"] == 0
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == locked("ray") == importlib.metadata.version("ray")


# --- Docker -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dockerfile(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from dockerfile_parse import DockerfileParser

    parser = DockerfileParser(path=str(tmp_path_factory.mktemp("docker")))
    parser.content = text_of("deploy/Dockerfile")
    return [step for step in parser.structure if step["instruction"] != "COMMENT"]


def steps(dockerfile: list[dict[str, Any]], instruction: str) -> list[str]:
    return [step["value"] for step in dockerfile if step["instruction"] == instruction]


def test_the_image_installs_the_gpu_lock_and_copies_what_is_there(dockerfile: list[dict[str, Any]]) -> None:
    assert dockerfile[0]["instruction"] == "FROM"
    sources = [
        part for copy in steps(dockerfile, "COPY") for part in copy.split()[:-1] if not part.startswith("--chown=")
    ]
    assert {"requirements/", "scripts/setup.sh", "pyproject.toml", "."} <= set(sources)
    assert all((TOP / source).exists() for source in sources)
    assert any("SPA_DEVICE=gpu scripts/setup.sh" in run for run in steps(dockerfile, "RUN"))


def test_the_image_does_not_run_as_root_and_its_user_is_the_pods(
    dockerfile: list[dict[str, Any]], manifests: dict[str, dict[str, Any]]
) -> None:
    (user,) = steps(dockerfile, "USER")
    (uid,) = [m[1] for run in steps(dockerfile, "RUN") if (m := re.search(rf"useradd .*--uid (\d+) .*\b{user}$", run))]
    assert user != "root"
    cluster = manifests["RayJob"]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsUser"] == int(uid)
    assert steps(dockerfile, "WORKDIR") == ["/home/ray/spa_ray"]  # what the job's entrypoint begins with


def test_the_images_toolkit_is_the_cuda_that_the_lock_is_built_for(dockerfile: list[dict[str, Any]]) -> None:
    (base,) = steps(dockerfile, "FROM")
    toolkit = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-devel-ubuntu24\.04", base)
    assert toolkit
    assert (toolkit[1], toolkit[2]) == tuple(locked("nvidia-cuda-runtime").split(".")[:2])


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say_of_the_slurm_script() -> None:
    command = [str(Path(sys.executable).parent / "shellcheck"), "deploy/slurm.sbatch"]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_slurm_script_without_a_config_says_how_to_call_it() -> None:
    done = subprocess.run(["bash", "deploy/slurm.sbatch"], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")


# --- the working directory --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> dict[str, int]:
    """What `ray job submit --working-dir .` packs: sizes in bytes by path."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(TOP).as_posix()] = path.stat().st_size

    excludes = [_get_excludes(TOP, get_runtime_env_default_excludes())]
    _dir_travel(TOP, excludes, note, include_gitignore=True, logger=logging.getLogger(__name__))
    return files


def test_a_jobs_package_holds_what_runs_and_not_what_builds_or_tests_it(package: dict[str, int]) -> None:
    assert {"jobs/spa_pipeline.py", "spa_ray/cli/main.py", "configs/demo.yaml"} <= set(package)
    assert "spa_ray/microworld/model/model.safetensors" in package
    sources = {path.relative_to(TOP).as_posix() for path in TOP.glob("spa_ray/**/*.py")}
    assert not sources - set(package)
    left_behind = {
        ".git",
        ".venv",
        ".cache",
        "benchmarks",
        "deploy",
        "docs",
        "requirements",
        "runs",
        "scripts",
        "tests",
    }
    assert left_behind.isdisjoint(Path(name).parts[0] for name in package)
    assert not [name for name in package if "__pycache__" in name or name.startswith(".ray-token")]


def test_a_jobs_package_is_far_below_what_the_jobs_api_takes(package: dict[str, int]) -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    ours = sum(size for name, size in package.items() if Path(name).parts[0] in ("jobs", "spa_ray", "configs"))
    assert MIB < ours < 20 * MIB < DASHBOARD_CLIENT_MAX_SIZE


# --- one engine's GPUs ------------------------------------------------------------------------------------------------


def model(tensor_parallel: int = 1, **engine_kwargs: Any) -> Model:
    return Model(path="m", tensor_parallel_size=tensor_parallel, engine_kwargs=engine_kwargs)


@pytest.mark.parametrize(
    ("engine", "asked", "cluster_gpus", "gpus"),
    [
        (model(), None, 0, None),
        (model(4), None, 0, None),  # on CPUs: four worker processes, no GPU
        (model(), None, 8, 1),
        (model(4), None, 8, 4),
        (model(2, pipeline_parallel_size=2), None, 8, 4),
        (model(4), 4, 0, 4),  # a cluster that starts at none: the key says it
        (model(), 0, 8, None),
        (model(gpu_memory_utilization=0.45), 0.5, 8, 0.5),
        (Model(path="m", engine="here:there", tensor_parallel_size=4), 1, 8, 1),  # another engine knows what it does
    ],
)
def test_an_engines_actor_owns_all_its_gpus(
    engine: Model, asked: float | None, cluster_gpus: float, gpus: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spa_ray.config.gpus.version", lambda package: "2.13.0+cpu")
    wanted = engine_resources(engine, Resources(gpus_per_engine=asked, cpus_per_engine=2), cluster_gpus=cluster_gpus)
    assert wanted == {"num_cpus": 2} | ({} if gpus is None else {"num_gpus": gpus})


@pytest.mark.parametrize(
    ("engine", "asked", "says"),
    [
        (model(4), 1, "gpus_per_engine is 1, but an engine uses 4"),
        (model(), 2, "gpus_per_engine is 2, but an engine uses 1"),
        (model(2), 0.5, "gpus_per_engine is 0.5, but an engine uses 2"),
        (model(), 0.5, "gpu_memory_utilization to 0.5 or less"),
        (model(gpu_memory_utilization=0.9), 0.5, "gpu_memory_utilization to 0.5 or less"),
        (model(4, distributed_executor_backend="ray"), 4, "distributed_executor_backend: not here"),
        (model(tensor_parallel_size=4), None, "set model.tensor_parallel_size"),
        (model(data_parallel_size=2), None, "set resources.engines"),
    ],
)
def test_what_cannot_be_placed_is_refused_before_anything_starts(engine: Model, asked: float | None, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        check_placement(engine, Resources(gpus_per_engine=asked))


def test_no_gpu_yet_and_packages_for_gpus_is_asked_about_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa_ray.config.gpus.version", lambda package: "2.13.0")
    with pytest.raises(InputError, match=r"resources\.gpus_per_worker=1 where the cluster starts GPU nodes on demand"):
        gpus_wanted(None, 1, cluster_gpus=0, key="resources.gpus_per_worker")
    assert gpus_wanted(0, 1, cluster_gpus=0, key="k") == 0
    assert gpus_wanted(None, 1, cluster_gpus=8, key="k") == 1


def test_vllm_places_several_gpus_by_processes_of_its_own() -> None:
    assert executor_backend(model(2)) == executor_backend(model(pipeline_parallel_size=2)) == "mp"
    assert executor_backend(model()) is None


@pytest.mark.parametrize(
    ("resources", "gpus", "environment", "expected"),
    [
        ({}, 0, {}, True),
        ({}, 1, {}, False),
        ({"cpus_per_engine": 1}, 0, {}, False),
        ({"engines": {"min": 1, "max": 2}}, 0, {}, False),
        ({}, 0, {"OMP_NUM_THREADS": "3"}, False),
    ],
)
def test_one_engine_alone_on_a_cpu_machine_takes_its_cores(
    resources: dict[str, Any], gpus: float, environment: dict[str, str], expected: bool
) -> None:
    given = Resources.model_validate(resources)
    assert takes_all_cores(given, gpus=gpus, environment=environment) == expected
    if "cpus_per_engine" not in resources:
        assert engine_resources(Model(path="m"), given, cluster_gpus=0)["num_cpus"] == 1
