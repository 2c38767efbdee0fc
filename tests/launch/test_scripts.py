"""The launchers: what --dry-run prints, what they refuse, and a whole life of a slice whose hosts are folders."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from waiting import until

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch"])
ARGUMENTS = ["--config=configs/aesthetic.py", "--config.reward.name=my rewards:$best"]


def bash(script, *arguments, cwd=None, check=True, **environment):
    result = subprocess.run(
        ["bash", str(script), *arguments], env=os.environ | environment, cwd=cwd, capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is in the extra test"
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", f"--source-path={LAUNCH.parent}", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def commands(printed):
    return [shlex.split(line) for line in printed.splitlines()]


def test_a_dry_run_of_a_slice_prints_every_command_and_runs_none(tmp_path):
    printed = bash(
        LAUNCH / "tpu_pod.sh", "up", "--dry-run", *ARGUMENTS,
        PATH=os.environ["PATH"], TPU_NAME="mine", ZONE="here", PROJECT="p", SPOT="1", NFS="10.0.0.2:/a b",
    ).stdout  # fmt: skip
    create, describe, archive, copy, unpack, mount, install, run, follow = commands(printed)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mine"]
    assert {"--node-id=mine", "--accelerator-type=v5litepod-8", "--spot", "--zone=here", "--project=p"} <= set(create)
    assert describe[4] == "describe" and archive[0] == "git" and "scp" in copy and "--worker=all" in copy
    assert "tar -xzf" in unpack[-1] and "tpu_host.sh install" in install[-1] and "--worker=0" in follow
    assert shlex.split(mount[-1].removeprefix("--command="))[-2:] == ["mount", "10.0.0.2:/a b"]
    # What the hosts' shell makes of it are the words that were given here.
    on_host = shlex.split(run[-1].removeprefix("--command="))
    assert on_host[-4:] == ["run", "--workdir=/mnt/runs/mine", *ARGUMENTS]


def test_the_other_dry_runs():
    words = lambda command: commands(bash(LAUNCH / "tpu_pod.sh", command, "--dry-run", *ARGUMENTS).stdout)  # noqa: E731
    assert [line[4] for line in words("delete")] == ["delete"]
    assert [line[4] for line in words("resume")][:3] == ["delete", "create", "describe"]
    assert words("stop")[0][-1].endswith("tpu_host.sh stop")
    host = commands(bash(LAUNCH / "tpu_host.sh", "install", "--dry-run").stdout)
    assert host[-1] == ["bash", "-c", "bash launch/local.sh --help >/dev/null"]
    slurm = commands(bash(LAUNCH / "slurm.sbatch", "--dry-run", *ARGUMENTS).stdout)
    assert (
        slurm[0] == ["environment", "cuda"]
        and slurm[1][0] == "srun"
        and slurm[1][2:] == ["-m", "ddpo_jax.main", *ARGUMENTS]
    )
    assert slurm[2][:2] == ["scontrol", "requeue"]
    image = commands(bash(LAUNCH / "gke" / "launch.sh", "image", "gpu", "--dry-run", IMAGE="r/d:1").stdout)
    assert image[0][:2] == ["docker", "build"] and "EXTRAS=cuda" in image[0] and image[1] == ["docker", "push", "r/d:1"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod.sh", ["run", "--dry-run"], "run: received no arguments"),
        ("tpu_pod.sh", ["up", "--dry-run"], "up: received no arguments"),
        ("tpu_pod.sh", ["fly", "--dry-run"], "command: received 'fly'; it must be one of"),
        ("tpu_pod.sh", ["status"], "gcloud is not installed"),
        ("tpu_host.sh", ["fly"], "command: received 'fly'; it must be one of install, mount, run, stop"),
        ("gke/launch.sh", ["up", "--dry-run"], "up: received ''; it must be followed by tpu or gpu"),
        ("gke/launch.sh", ["up", "tpu", "--dry-run"], "IMAGE is not set"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, script, arguments, message):
    for name in ("bash", "dirname", "sed"):  # and no gcloud
        (tmp_path / name).symlink_to(shutil.which(name))
    result = bash(LAUNCH / script, *arguments, check=False, PATH=str(tmp_path), IMAGE="")
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("script", ["tpu_pod.sh", "tpu_host.sh", "gke/launch.sh"])
def test_help_is_what_stands_at_the_top(script):
    shown = bash(LAUNCH / script, "--help").stdout
    assert shown.splitlines()[0] == (LAUNCH / script).read_text().splitlines()[1].removeprefix("# ")
    assert "set -euo" not in shown and "--dry-run" in shown


GCLOUD = """#!/usr/bin/env bash
# Two hosts, which are folders: h0 and h1.
echo "$*" >>"$CLOUD/calls"
last="${@: -1}"
case "$*" in
  *describe*) cat "$CLOUD/state" || { echo "NOT_FOUND: $1" >&2; exit 1; } ;;
  *queued-resources\\ create*) echo ACTIVE >"$CLOUD/state" ;;
  *queued-resources\\ delete*) rm -rf "$CLOUD"/h? "$CLOUD/state" ;;
  *scp*) for h in h0 h1; do mkdir -p "$CLOUD/$h" && cp "$5" "$CLOUD/$h/ddpo_jax.tar.gz"; done ;;
  *worker=0*) ;;
  *ssh*) for h in h0 h1; do (cd "$CLOUD/$h" && bash -c "${last#--command=}" 2>&1); done ;;
esac
"""
GIT = """#!/usr/bin/env bash
for word in "$@"; do case $word in --output=*) out=${word#--output=} ;; esac; done
tar -czf "$out" -C "$CHECKOUT" launch
"""
TRAINING = """#!/usr/bin/env bash
if [ "$1" = --help ]; then exit; fi
printf '%s\\n' "$@" >arguments
trap 'echo saved >saved; exit 143' TERM
while [ -e arguments ]; do sleep 0.05; done  # until its host is taken away
"""


@pytest.fixture
def cloud(tmp_path):
    """A checkout whose training waits for SIGTERM, and programs that stand for gcloud and git."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(LAUNCH, checkout / "launch")
    (checkout / "launch" / "local.sh").write_text(TRAINING)
    programs.mkdir()
    for name, text in {"gcloud": GCLOUD, "git": GIT}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {"CLOUD": str(tmp_path), "CHECKOUT": str(checkout), "PATH": f"{programs}:{os.environ['PATH']}"}
    environment["PYTHON"] = sys.executable
    yield tmp_path, lambda *words, **also: bash(checkout / "launch" / "tpu_pod.sh", *words, **environment, **also)
    for file in tmp_path.glob("h?/ddpo_jax/run.pid"):
        try:
            os.kill(int(file.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def wait_for(condition):
    assert until(condition, 20)


def ended(host):
    status = pathlib.Path(f"/proc/{(host / 'run.pid').read_text().strip()}/status")
    return not status.exists() or "State:\tZ" in status.read_text()  # a process that nobody waits for


def test_the_life_of_a_slice(cloud):
    folder, pod = cloud
    hosts = [folder / name / "ddpo_jax" for name in ("h0", "h1")]
    pod("up", *ARGUMENTS)
    wait_for(lambda: all((host / "arguments").exists() for host in hosts))
    for host in hosts:
        assert (host / "arguments").read_text().splitlines() == ["--workdir=runs/ddpo-jax", *ARGUMENTS]
    numbers = [(host / "run.pid").read_text() for host in hosts]
    assert "trains here already" in pod("run", *ARGUMENTS).stdout
    assert [(host / "run.pid").read_text() for host in hosts] == numbers
    pod("stop")
    wait_for(lambda: all((host / "saved").exists() and ended(host) for host in hosts))
    pod("resume", *ARGUMENTS)  # the slice is there: it is not made anew
    calls = (folder / "calls").read_text()
    assert calls.count("queued-resources create") == 1 and "delete" not in calls
    assert all((host / "run.pid").read_text() not in numbers for host in hosts)
    (folder / "state").write_text("SUSPENDED\n")  # preempted
    pod("resume", *ARGUMENTS)
    calls = (folder / "calls").read_text()
    assert calls.count("queued-resources create") == 2 and calls.count("queued-resources delete") == 1
    wait_for(lambda: all((host / "arguments").exists() for host in hosts))
    pod("delete")
    pod("resume", *ARGUMENTS)  # there is none
    calls = (folder / "calls").read_text()
    assert calls.count("queued-resources create") == 3 and calls.count("queued-resources delete") == 2
    wait_for(lambda: all((host / "arguments").exists() for host in hosts))


def test_a_slice_whose_state_is_not_known_is_left_alone(cloud):
    folder, pod = cloud
    (folder / "bin" / "gcloud").write_text(
        '#!/usr/bin/env bash\necho "$*" >>"$CLOUD/calls"; echo "no network" >&2; exit 1\n'
    )
    result = pod("resume", *ARGUMENTS, check=False)
    assert result.returncode == 1 and "the state of ddpo-jax is not known: no network" in result.stderr
    assert "delete" not in (folder / "calls").read_text()


@pytest.mark.parametrize(
    ("code", "cancelled", "again"), [(0, False, False), (143, False, True), (1, False, False), (143, True, False)]
)
def test_a_slurm_job_is_queued_again_when_it_was_saved(tmp_path, code, cancelled, again):
    """SIGTERM to the processes is the end of the job's time; to the batch script as well, somebody's wish."""
    programs = tmp_path / "bin"
    programs.mkdir()
    kill = "kill -TERM $PPID; " if cancelled else ""
    for name, text in {"srun": f"{kill}exit {code}", "scontrol": 'echo "$*"'}.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    shutil.copytree(LAUNCH, tmp_path / "launch")
    stub = "environment() { :; }; venv=.venv; source launch/common.sh\n"
    (tmp_path / "launch" / "environment.sh").write_text(stub)
    copy = tmp_path / "slurm_script"  # where Slurm puts it
    shutil.copy(LAUNCH / "slurm.sbatch", copy)
    result = bash(
        copy, *ARGUMENTS, check=False, cwd="/",
        SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7", PATH=f"{programs}:{os.environ['PATH']}",
    )  # fmt: skip
    assert result.returncode == code and result.stdout == ("requeue 7\n" if again else ""), result
