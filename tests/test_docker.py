"""docker/: what its files say to each other, to constraints.txt, and to a Slurm where this machine has one."""

from __future__ import annotations

import re
import shlex
import stat
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_packaging import pins

from dinoreg.config import load
from launch.recipe import LaunchedRun

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(word, the rest on one line) of the Dockerfile."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")


def stages() -> dict[str, str]:
    """What each stage begins from, by name, in order."""
    froms = [rest.split(" AS ") for word, rest in instructions() if word == "FROM"]
    return {name: base for base, name in froms}


def copied() -> list[str]:
    """Sources in the checkout."""
    return [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]


@pytest.mark.parametrize(("argument", "package"), [("TORCH", "torch"), ("XFORMERS", "xformers")])
def test_versions_are_those_of_the_constraints(argument: str, package: str) -> None:
    assert f"=={arguments()[argument]}" == pins("3.12")[package]


def test_bases_are_pinned_and_cuda_is_that_of_torch() -> None:
    bases = [arguments()["BASE"], COMPOSE["services"]["controller"]["build"]["args"]["BASE"]]
    for base in bases:
        assert re.fullmatch(r"[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", base)
    release = re.search(r"cuda:(\d+)\.(\d+)\.", bases[0])
    index = re.search(r"/cu(\d\d)(\d)$", arguments()["TORCH_INDEX"])
    assert release is not None and index is not None and release.groups() == index.groups()
    assert (int(index[1]), int(index[2])) >= (12, 8)


def test_torch_is_installed_before_anything_of_ours_is_there() -> None:
    words = instructions()
    torch = next(number for number, (_, rest) in enumerate(words) if "torch==$TORCH" in rest)
    assert torch < min(number for number, (word, _) in enumerate(words) if word == "COPY")


def test_the_last_stage_is_the_image_and_its_user_is_not_root() -> None:
    *others, last = stages()
    assert last == "dinoreg" and stages()[last] == "installed" and "slurm" in others
    final = instructions()[-4:]
    assert [word for word, _ in final] == ["FROM", "USER", "ENTRYPOINT", "CMD"]
    assert int(final[1][1]) > 0 and f"--uid {final[1][1]} dinoreg" in DOCKERFILE
    assert final[2][1] == "[]" and yaml.safe_load(final[3][1])[0] == "dinoreg"  # no shell between


def test_everything_that_is_copied_exists_and_is_sent_to_the_engine() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    for source in copied():
        assert (ROOT / source).exists() and source in kept
    assert sorted(kept) == sorted(set(copied()))
    assert any(fnmatch("dinoreg/train/__pycache__", rule.replace("**", "*")) for rule in rules)
    assert {"dinoreg", "eval", "launch", "configs"} <= set(copied())


def test_apt_and_pip_leave_nothing_behind() -> None:
    for word, rest in instructions():
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest
    assert "PIP_NO_CACHE_DIR=1" in DOCKERFILE


def test_the_services_use_files_and_stages_that_exist() -> None:
    for service in COMPOSE["services"].values():
        build = service["build"]
        context = (DOCKER / build["context"]).resolve()
        assert context == ROOT and (context / build["dockerfile"]).is_file() and build["target"] in stages()
        assert set(build["args"]) <= set(arguments()) and service["image"] == COMPOSE["services"]["login"]["image"]
        assert {volume.split(":")[0] for volume in service["volumes"]} == set(COMPOSE["volumes"])
        assert set(service.get("depends_on", {})) <= {"controller"}
    start = DOCKER / "controller.sh"
    assert start.stat().st_mode & stat.S_IXUSR and start.read_text().splitlines()[-1] == "exec slurmctld -D"
    assert "COPY docker/controller.sh /usr/local/bin/controller" in DOCKERFILE
    assert COMPOSE["services"]["controller"]["command"] == ["controller"]


def slurm_conf() -> dict[str, str]:
    """Each line, by its first key, which only partitions may share."""
    lines = [line for line in (DOCKER / "slurm.conf").read_text().splitlines() if line and not line.startswith("#")]
    keys = [line.split("=")[0] for line in lines if not line.startswith("PartitionName")]
    assert len(keys) == len(set(keys))
    return {line.split("=")[0]: line.split("=", 1)[1] for line in lines}


def test_slurm_knows_the_containers() -> None:
    conf, services = slurm_conf(), COMPOSE["services"]
    assert conf["NodeName"].split()[0] == "node[1-2]"
    for name in ("controller", "login", "node1", "node2"):
        assert services[name]["hostname"] == name
    assert services["node1"]["command"][0] == "slurmd" and conf["SlurmctldHost"] == "controller"
    assert (
        "user" not in services["node1"] and services["login"]["user"] == "dinoreg"
    )  # slurmd changes to the job's user


def test_slurm_needs_no_cgroups_and_preempts_as_the_launcher_expects() -> None:
    conf = slurm_conf()
    expected = {
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SlurmdParameters": "config_overrides",
        "PreemptMode": "REQUEUE",
        "JobRequeue": "1",
        "SlurmctldParameters": "preempt_send_user_signal",
    }
    assert {key: conf[key] for key in expected} == expected
    assert "defer" not in conf["SchedulerParameters"]
    text = (DOCKER / "slurm.conf").read_text()
    assert re.search(r"^PartitionName=main .*Default=YES .*PriorityTier=1 .*GraceTime=[1-9]", text, re.M)
    assert re.search(r"^PartitionName=high .*PriorityTier=10 PreemptMode=OFF$", text, re.M)
    assert "\nCgroupPlugin=cgroup/v1\n" in (DOCKER / "cgroup.conf").read_text()


def test_the_recipe_of_the_cluster_is_one_and_fits_its_nodes() -> None:
    recipe = load(LaunchedRun, DOCKER / "photos.yaml", [])
    node = dict(word.split("=") for word in slurm_conf()["NodeName"].split()[1:])
    assert recipe.launch.nodes == 2 and (recipe.launch.cpus_a_task or 0) <= int(node["CPUs"])
    assert all(str(source).startswith("/photos/") for source in recipe.data.sources) and "/photos" in DOCKERFILE


def test_the_readme_names_options_and_files_that_exist() -> None:
    text = (DOCKER / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (DOCKER / link).exists(), link
    assert set(re.findall(r"--build-arg (\w+)=", text)) <= set(arguments())
    for name in re.findall(r"dinoreg(?:-launch)? train (\w+)\s", text):
        assert (ROOT / "configs" / f"{name}.yaml").is_file() or name.isupper(), name
    keys = set(re.findall(r"launch\.(\w+)", text))
    assert keys and all(hasattr(load(LaunchedRun, DOCKER / "photos.yaml", []).launch, key) for key in keys)
    for line in re.findall(r"^    (docker .*[^\\])$", text, re.M):
        shlex.split(line)
