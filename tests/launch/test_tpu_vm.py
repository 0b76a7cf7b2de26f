"""Cloud TPU VM pods: every verb of tpu_vm.sh, restarts, and the worker script run for real."""

import pathlib
import subprocess
import time

import pytest
from fakes import ARGUMENTS, LAUNCH

QR = ["gcloud", "compute", "tpus", "queued-resources"]
WHERE = ["--zone=zone-a", "--project=project", "--quiet"]
ALL = ["--node=all", "--worker=all"]
LIST = [*QR, "list", "--format=value(name.basename(),state.state)", *WHERE]
CREATE = [
    *QR, "create", "pod", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5",
    "--node-id=pod", *WHERE,
]  # fmt: skip
DELETE = [*QR, "delete", "pod", "--force", *WHERE]
ACTIVE = [(0, "other\tFAILED\npod\tACTIVE\n")]
RUN = ("--config=c.py", "--workdir=gs://b/r")


def ssh(command):
    return [*QR, "ssh", "pod", *ALL, f"--command={command}", *WHERE]


def verbs(calls):
    """Return the calls in short: list, create, status, install, ...; without git and scp."""
    names = []
    for call in calls:
        if call[0] == "gcloud" and call[4] != "scp":
            command = next((word for word in call if word.startswith("--command=")), "")
            known = ("worker.sh status", "worker.sh install", "worker.sh start")
            names += [name.split()[1] for name in known if name in command] or [call[4]]
    return names


def test_create(machine):
    assert machine.check("tpu_vm.sh", "create") == [CREATE]


def test_create_several_slices_of_spot_machines(machine):
    settings = {"SLICES": "2", "TPU_CREATE_FLAGS": "--spot \n  --network=net\n"}
    [call] = machine.check("tpu_vm.sh", "create", **settings)
    assert call == [
        *CREATE[:8], "--node-count=2", "--node-prefix=pod", "--spot", "--network=net", *WHERE
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_the_type_decides_the_image(machine, kind, image):
    [call] = machine.dry_run("tpu_vm.sh", "create", TPU_TYPE=kind)
    assert f"--accelerator-type={kind}" in call and f"--runtime-version={image}" in call


def test_the_image_can_be_set(machine):
    [call] = machine.check("tpu_vm.sh", "create", RUNTIME_VERSION="mine")
    assert "--runtime-version=mine" in call


def test_a_type_without_an_image_is_referred_to_gke(machine):
    result = machine.run("tpu_vm.sh", "create", TPU_TYPE="tpu7x-128")
    assert result.returncode == 2 and "launch/gke_xpk.sh" in result.stderr


def test_wait(machine):
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"]
    machine.reply(list=[(0, f"pod\t{state}\n") for state in states])
    result = machine.run("tpu_vm.sh", "wait")
    assert result.returncode == 0 and machine.calls == [LIST] * 4
    assert [line.split()[-1] for line in result.stderr.splitlines()] == [*states[:2], "ACTIVE"]
    assert machine.dry_run("tpu_vm.sh", "wait") == [LIST]


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ((0, "pod\tFAILED\n"), "pod is FAILED and will not start"),
        ((0, "pod\tSUSPENDED\n"), "pod is SUSPENDED and will not start"),
        ((0, "pod-2\tACTIVE\n"), "there is no pod"),
        ((1, ""), "cannot list pod"),
    ],
)
@pytest.mark.parametrize("verb", ["wait", "install"])
def test_waiting_ends_when_the_pod_cannot_come(machine, verb, reply, text):
    machine.reply(list=[reply])
    result = machine.run("tpu_vm.sh", verb)
    assert result.returncode == 1 and text in result.stderr
    assert machine.calls == [LIST]


def test_install(machine):
    machine.reply(list=ACTIVE)
    calls = machine.check("tpu_vm.sh", "install", dry_run=False)
    root, archive = str(LAUNCH.parent), next(word for word in calls[3] if word.endswith(".tar.gz"))
    scratch = pathlib.Path(archive).parent
    assert scratch.parent == machine.folder and not scratch.exists()
    assert calls == [
        LIST,
        ["git", "-C", root, "diff", "--quiet", "HEAD"],
        ["git", "-C", root, "archive", "--format=tar.gz", f"--output={archive}", "HEAD", "--", ".",
         ":(exclude)tests"],
        [*QR, "scp", archive, "pod:tokenflow.tar.gz", *ALL, *WHERE],
        ssh("test ! -e tokenflow || bash tokenflow/launch/worker.sh idle && rm -rf tokenflow "
            "&& mkdir tokenflow && tar -xzf tokenflow.tar.gz -C tokenflow "
            "&& bash tokenflow/launch/worker.sh install"),
    ]  # fmt: skip
    name = f"{machine.folder}/tokenflow.XXXXXX"
    printed = [[word.replace(str(scratch), name) for word in call] for call in calls]
    assert machine.dry_run("tpu_vm.sh", "install") == [printed[0], *printed[2:]]


@pytest.mark.parametrize("step", ["archive", "scp", "ssh"])
def test_a_failed_install_stops_there(machine, step):
    machine.reply(**{step: [(7, "")]}, list=ACTIVE)
    assert machine.run("tpu_vm.sh", "install").returncode == 7
    assert step in machine.calls[-1]


def test_run_passes_its_arguments_through_two_shells(machine):
    settings = {"TPU_SSH_FLAGS": "--tunnel-through-iap"}
    [call] = machine.check("tpu_vm.sh", "run", *ARGUMENTS, **settings)
    assert call[:8] == [*QR, "ssh", "pod", *ALL]
    assert call[8] == "--tunnel-through-iap" and call[10:] == WHERE
    command = call[9].removeprefix("--command=").replace("bash tokenflow/launch/worker.sh", "show")
    show = f"show() {{ printf '%s\\0' \"$@\"; }}; {command}"
    for shell in ("sh", "bash"):
        out = subprocess.run([shell, "-c", show], capture_output=True, text=True, check=True).stdout
        assert out.split("\0")[:-1] == ["start", *ARGUMENTS]


def test_tail_status_stop_and_delete(machine):
    tail = [*QR, "ssh", "pod", "--node=0", "--worker=0",
            "--command=tail -n 100 -F tokenflow_run/log", *WHERE]  # fmt: skip
    assert machine.check("tpu_vm.sh", "tail") == [tail]
    machine.reply(list=ACTIVE)
    look = ssh("if test -e tokenflow_run; then bash tokenflow/launch/worker.sh status ; "
               "else echo tokenflow: absent; fi")  # fmt: skip
    assert machine.check("tpu_vm.sh", "status") == [LIST, look]
    machine.reply(list=[(0, "pod\tPROVISIONING\n")])
    assert machine.run("tpu_vm.sh", "status").stdout == "pod: PROVISIONING\n"
    assert machine.calls == [LIST]
    machine.reply()
    assert machine.check("tpu_vm.sh", "stop") == [ssh("bash tokenflow/launch/worker.sh stop")]
    machine.reply()
    assert machine.check("tpu_vm.sh", "delete") == [DELETE]


@pytest.mark.parametrize("verb", ["create", "run", "tail", "status", "stop", "delete"])
def test_gcloud_exit_codes_are_passed_on(machine, verb):
    machine.reply(ssh=[(7, "")], create=[(7, "")], delete=[(7, "")], list=ACTIVE)
    arguments = RUN if verb == "run" else ()
    assert machine.run("tpu_vm.sh", verb, *arguments).returncode == 7


def states(*texts):
    return [(0, text and f"pod\t{text}\n") for text in texts]


def workers(*texts):
    """Replies of the workers, one after another; `running|exit 0` is from two workers."""
    lines = [text.split("|") for text in texts]
    return [(0, "".join(f"tokenflow: {line}\n" for line in each)) for each in lines]


def test_keep_creates_installs_runs_and_survives_a_preemption(machine):
    machine.reply(
        list=states(
            "", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED",
            "", "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE",
        ),
        status=workers(
            "absent|absent", "running|running", "exit 134|exit 1",  # lost its peers
            "absent|absent", "running|exit 0", "exit 0|exit 0",
        ),
    )  # fmt: skip
    result = machine.run("tpu_vm.sh", "keep", *RUN)
    assert result.returncode == 0, result.stderr
    assert "the run is done" in result.stderr
    assert verbs(machine.calls) == [
        "list", "create", "list", "list", "status", "install", "start", "list", "status",
        "list", "status", "start", "list", "list", "delete", "list", "create", "list",
        "list", "status", "install", "start", "list", "status", "list", "status",
    ]  # fmt: skip
    starts = [call for call in machine.calls if "worker.sh start" in " ".join(call)]
    assert starts == [ssh(f"bash tokenflow/launch/worker.sh start {' '.join(RUN)}")] * 3
    packed = [call for call in machine.calls if "archive" in call]
    assert len(packed) == 1  # the second pod gets the same code


@pytest.mark.parametrize("ended", ["none", "lost|exit 1", "exit 143", "exit 137|exit 1"])
def test_keep_restarts_a_run_that_was_killed_or_stopped(machine, ended):
    machine.reply(list=ACTIVE, status=workers(ended, "exit 0"))
    assert machine.run("tpu_vm.sh", "keep", *RUN).returncode == 0
    assert verbs(machine.calls) == ["list", "status", "start", "list", "status"]


@pytest.mark.parametrize(("ended", "code"), [("exit 1", 1), ("exit 0|exit 2", 2)])
def test_keep_exits_with_the_code_of_a_failed_run(machine, ended, code):
    machine.reply(list=ACTIVE, status=workers(ended))
    result = machine.run("tpu_vm.sh", "keep", *RUN)
    assert result.returncode == code and "the run failed" in result.stderr
    assert verbs(machine.calls) == ["list", "status"] * 2  # checks again: was the pod taken away?


def test_keep_goes_on_when_the_pod_was_taken_away_after_a_failure(machine):
    machine.reply(list=states("ACTIVE", "SUSPENDING", "ACTIVE"), status=workers("exit 1", "exit 0"))
    assert machine.run("tpu_vm.sh", "keep", *RUN).returncode == 0


def test_keep_survives_a_few_errors_and_gives_up_after_ten(machine):
    machine.reply(list=[(1, ""), *ACTIVE], status=[(255, "no route\n"), *workers("exit 0")])
    result = machine.run("tpu_vm.sh", "keep", *RUN)
    assert result.returncode == 0 and "no route" in result.stderr
    machine.reply(list=[(1, "")])
    result = machine.run("tpu_vm.sh", "keep", *RUN)
    assert result.returncode == 1 and "ten checks in a row failed" in result.stderr
    assert machine.calls == [LIST] * 10


@pytest.mark.parametrize("step", ["create", "delete", "scp"])
def test_keep_gives_up_when_a_step_keeps_failing(machine, step):
    state = {"create": "", "delete": "FAILED", "scp": "ACTIVE"}[step]
    machine.reply(**{step: [(7, "")]}, list=states(state), status=workers("absent"))
    result = machine.run("tpu_vm.sh", "keep", *RUN)
    assert result.returncode == 1 and "gave up" in result.stderr


def test_keep_gives_up_after_max_restarts(machine):
    machine.reply(list=ACTIVE, status=workers("exit 139"))
    result = machine.run("tpu_vm.sh", "keep", *RUN, MAX_RESTARTS="3")
    assert result.returncode == 1 and "MAX_RESTARTS=3" in result.stderr
    assert verbs(machine.calls).count("start") == 4


def test_keep_prints_one_round_in_a_dry_run(machine):
    assert verbs(machine.dry_run("tpu_vm.sh", "keep", *RUN)) == [
        "create", "list", "install", "start", "list", "status", "delete",
    ]  # fmt: skip


# A gcloud whose only worker is this machine, with the test's folder as its home.
GCLOUD = """#!/bin/sh
cd "$HOME" || exit
case "$4" in
  scp) cp "$5" tokenflow.tar.gz ;;
  list) echo "pod ACTIVE" ;;
  ssh) for word in "$@"; do
      case "$word" in --command=*) exec sh -c "${word#--command=}" ;; esac
    done ;;
esac
"""
# The interpreter on the worker: records its arguments and trains until SIGTERM.
PYTHON = """#!/bin/bash
printf '%s' "$LIBTPU_INIT_ARGS" >"$HOME/flags"
printf '%s\\0' "$@" >"$HOME/arguments"
trap 'exit "$TOKENFLOW_SIGTERM_CODE"' TERM
[[ $* != *quick* ]] || exit 0
echo training
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


@pytest.fixture
def pod(machine, checkout):
    """A worker on this machine, and the scripts of a checkout to install there."""
    (machine.bin / "git").unlink()
    (machine.bin / "gcloud").write_text(GCLOUD)
    (machine.bin / "curl").write_text("#!/bin/sh\necho true\n")
    (machine.bin / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
    uv = machine.folder / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text('#!/bin/sh\necho "$@" >>"$HOME/uv"\n')
    python = machine.folder / "tokenflow_env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    for path in (machine.bin / "curl", machine.bin / "sleep", uv, python):
        path.chmod(0o755)

    def run(*arguments):
        return machine.run("tpu_vm.sh", *arguments, launch=checkout / "launch")

    yield machine.folder, run
    run("stop")


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it took more than a minute"
        time.sleep(0.02)


def test_a_worker_installs_runs_stops_and_continues(pod):
    home, run = pod
    assert run("status").stdout == "pod: ACTIVE\ntokenflow: absent\n"
    result = run("install")
    assert result.returncode == 0, result.stderr
    assert (home / "tokenflow" / "launch" / "worker.sh").exists()
    assert f"--editable {home}/tokenflow[tpu] etils[epath-gcs]" in (home / "uv").read_text()
    assert run("status").stdout.endswith("tokenflow: none\n")
    assert run("run", *ARGUMENTS).returncode == 0
    log = home / "tokenflow_run" / "log"
    wait_until(lambda: log.exists() and "training" in log.read_text())
    words = (home / "arguments").read_text().split("\0")[:-1]
    assert words == ["-m", "tokenflow_jax.main", "--distributed", *ARGUMENTS]
    assert "--xla_tpu_run_space_to_batch=false" in (home / "flags").read_text()
    assert run("status").stdout.endswith("tokenflow: running\n")
    for arguments in (("run", *ARGUMENTS), ("install",)):
        result = run(*arguments)
        assert result.returncode == 1 and "stop it first" in result.stderr
    assert run("stop").returncode == 0
    assert run("status").stdout.endswith("tokenflow: exit 143\n")
    assert run("run", *RUN, "--quick").returncode == 0
    wait_until(lambda: run("status").stdout.endswith("tokenflow: exit 0\n"))


def test_a_worker_reports_a_lost_run_and_one_with_other_arguments(pod):
    home, run = pod
    assert run("install").returncode == 0
    assert run("run", *RUN, "--quick").returncode == 0
    worker = ["bash", str(home / "tokenflow" / "launch" / "worker.sh"), "status"]

    def status(*arguments):
        environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
        command = [*worker, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    wait_until(lambda: status() == "tokenflow: exit 0\n")
    assert status(*RUN, "--quick") == "tokenflow: exit 0\n"
    assert status(*RUN) == "tokenflow: none\n"
    (home / "tokenflow_run" / "code").unlink()  # as after a reboot
    assert status() == "tokenflow: lost\n"
    assert run("keep", *RUN, "--quick").returncode == 0
