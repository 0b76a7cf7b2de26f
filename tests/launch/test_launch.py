"""The launch scripts: exact calls, unchanged arguments, exit codes and error messages."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import ARGUMENTS, LAUNCH

TRAIN = ["python", "-m", "tokenflow_jax.main"]
FLAGS = "--xla_tpu_run_space_to_batch=false --xla_tpu_run_space_to_batch_on_new_platforms=false"


def test_scripts_are_shellcheck_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    program = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing; it comes with: pip install -e '.[test]'"
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) >= 6
    result = subprocess.run(
        [program, "--external-sources", *map(str, scripts)],
        capture_output=True,
        text=True,
        cwd=LAUNCH.parent,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_one_machine(machine):
    assert machine.check("local.sh", *ARGUMENTS) == [[*TRAIN, *ARGUMENTS]]
    mine = f"{machine.bin}/python"
    assert machine.dry_run("local.sh", PYTHON=mine) == [[mine, *TRAIN[1:]]]
    machine.reply(main=[(130, "")])
    assert machine.run("local.sh").returncode == 130


@pytest.mark.parametrize(
    "settings, tpu, gpu",
    [
        ({}, FLAGS, ""),  # v5p-128
        ({"TPU_TYPE": "v5litepod-16", "LIBTPU_INIT_ARGS": "--mine=1"}, f"{FLAGS} --mine=1", ""),
        ({"TPU_TYPE": "v5p-128", "TOKENFLOW_FLAGS": "off", "LIBTPU_INIT_ARGS": "--a"}, "--a", ""),
        ({"TPU_TYPE": "gpu", "XLA_FLAGS": "--mine"}, "", "--of_gpus=1 --mine"),
        ({"TPU_TYPE": "v3-8"}, "", ""),  # no file
    ],
)
def test_flags_of_the_chip_come_before_the_users(machine, settings, tpu, gpu):
    copy = machine.folder / "launch"
    shutil.copytree(LAUNCH, copy)
    (copy / "flags" / "gpu").write_text("# why\n--of_gpus=1\n")
    program = '#!/bin/sh\nprintf "%s|%s" "$LIBTPU_INIT_ARGS" "$XLA_FLAGS"\n'
    (machine.bin / "python").write_text(program)
    assert machine.run("local.sh", launch=copy, **settings).stdout == f"{tpu}|{gpu}"


def test_a_gpu_of_this_machine_and_of_a_cluster_is_noticed(machine):
    copy = machine.folder / "launch"
    shutil.copytree(LAUNCH, copy)
    (copy / "flags" / "gpu").write_text("--of_gpus=1\n")
    for program in ("python", "srun", "nvidia-smi"):
        (machine.bin / program).write_text('#!/bin/sh\nprintf "%s" "$XLA_FLAGS"\n')
        (machine.bin / program).chmod(0o755)
    assert machine.run("local.sh", launch=copy, TPU_TYPE=None).stdout == "--of_gpus=1"
    assert machine.run("slurm.sh", launch=copy, SLURM_JOB_ID="1").stdout == "--of_gpus=1"


@pytest.mark.parametrize(
    "settings, preloaded",
    [
        ({}, "/lib/libtcmalloc_minimal.so.4"),
        ({"LD_PRELOAD": ""}, "/lib/libtcmalloc_minimal.so.4"),
        ({"LD_PRELOAD": "/x/libjemalloc.so"}, "/x/libjemalloc.so"),
        ({"TOKENFLOW_TCMALLOC": "off"}, ""),
    ],
)
def test_tcmalloc_is_preloaded_where_installed(machine, settings, preloaded):
    lines = "libother.so => /lib/libother.so\nlibtcmalloc_minimal.so.4 (x) => {}\n"
    programs = {
        "python": 'printf "%s" "$LD_PRELOAD"',
        "ldconfig": f"printf '{lines}'".format("/lib/libtcmalloc_minimal.so.4"),
    }
    for name, program in programs.items():
        (machine.bin / name).write_text(f"#!/bin/sh\n{program}\n")
        (machine.bin / name).chmod(0o755)
    assert machine.run("local.sh", **settings).stdout == preloaded
    (machine.bin / "ldconfig").write_text("#!/bin/sh\nexit 127\n")
    assert machine.run("local.sh", **settings).stdout == settings.get("LD_PRELOAD", "")


def test_files_of_flags_are_comments_and_flags():
    files = sorted((LAUNCH / "flags").iterdir())
    assert {"v5e", "v5p", "v6e", "gpu"} <= {path.name for path in files}
    for path in files:
        for line in path.read_text().splitlines():
            assert not line or re.fullmatch(r"# .+|--\w+=\S+", line), (path.name, line)


@pytest.mark.parametrize("place", range(3))
def test_dry_run_may_stand_anywhere(machine, place):
    arguments = ["--config=a", "--workdir=b"]
    arguments.insert(place, "--dry-run")
    result = machine.run("local.sh", *arguments)
    assert result.stdout == "python -m tokenflow_jax.main --config=a --workdir=b\n"
    assert machine.calls == []


XPK = ["--cluster=cluster", "--zone=zone-a", "--project=project"]


def test_gke_with_an_image(machine):
    settings = {"IMAGE": "image:1", "SLICES": "4", "XPK_FLAGS": "--priority=high --quiet"}
    [call] = machine.check("gke_xpk.sh", "run", *ARGUMENTS, **settings)
    assert call[:-1] == [
        "xpk", "workload", "create", "--workload=workload", "--tpu-type=v5p-128",
        "--num-slices=4", *XPK, "--docker-image=image:1", "--max-restarts=100",
        "--termination-grace-period-seconds=120", "--priority=high", "--quiet",
    ]  # fmt: skip
    command = shlex.split(call[-1].removeprefix("--command="))
    # exec, so that the container's SIGTERM reaches Python; XPK restarts on 143.
    assert command == [
        "exec", "env", "TOKENFLOW_SIGTERM_CODE=143",
        f"LIBTPU_INIT_ARGS={FLAGS} ${{LIBTPU_INIT_ARGS:-}}", *TRAIN, "--distributed", *ARGUMENTS,
    ]  # fmt: skip
    [call] = machine.check("gke_xpk.sh", "run", *ARGUMENTS, **settings, TOKENFLOW_FLAGS="off")
    assert "LIBTPU_INIT_ARGS" not in call[-1]


def test_gke_with_this_checkout(machine, checkout):
    (machine.bin / "git").unlink()
    launch = checkout / "launch"
    (machine.bin / "real").mkdir()
    (machine.bin / "xpk").rename(machine.bin / "real" / "xpk")
    (machine.bin / "xpk").write_text(KEEP_SCRIPT_DIR)
    (machine.bin / "xpk").chmod(0o755)
    [call] = machine.check("gke_xpk.sh", "run", *ARGUMENTS, launch=launch, dry_run=False)
    assert "--base-docker-image=python:3.12" in call
    assert (machine.folder / "kept" / "launch" / "common.sh").exists()
    (folder,) = (word for word in call if word.startswith("--script-dir="))
    folder = Path(folder.removeprefix("--script-dir="))
    assert folder.parent.parent == machine.folder and not folder.parent.exists()
    assert call[-1].startswith("--command=pip install -q -e '.[tpu]' 'etils[epath-gcs]' && exec ")
    printed = machine.dry_run("gke_xpk.sh", "run", *ARGUMENTS, launch=launch)
    assert [line[0] for line in printed] == ["mkdir", "git", "tar", "xpk"]
    name = f"{machine.folder}/tokenflow.XXXXXX"
    assert printed[-1] == [word.replace(str(folder.parent), name) for word in call]


KEEP_SCRIPT_DIR = """#!/bin/sh
for word; do
  case "$word" in --script-dir=*) cp -r "${word#--script-dir=}" "$HOME/kept" ;; esac
done
exec "$(dirname "$0")/real/xpk" "$@"
"""

JOB = {"SLURM_JOB_ID": "42"}
POD, SLURM = ("tpu_vm.sh", "keep"), {"NODES": "1", "GPUS": "1"}
SETTINGS = [
    (("gke_xpk.sh", "run"), "MAX_RESTARTS", {}),
    (("gke_xpk.sh", "run"), "SAVE_SECONDS", {}),
    (("gke_xpk.sh", "run"), "SLICES", {}),
    (("gke_xpk.sh", "run"), "WORKLOAD", {}),
    (("gke_xpk.sh", "delete"), "WORKLOAD", {}),
    (("gke_xpk.sh", "run"), "IMAGE", {}),
    (("gke_xpk.sh", "run"), "BASE_IMAGE", {}),
    (("gke_xpk.sh", "status"), "CLUSTER", {}),
    (("gke_xpk.sh", "status"), "ZONE", {}),
    (("gke_xpk.sh", "status"), "PROJECT", {}),
    (POD, "MAX_RESTARTS", {}),
    (POD, "POLL", {}),
    (POD, "SLICES", {}),
    (POD, "TPU_NAME", {}),
    (POD, "TPU_TYPE", {}),
    (POD, "RUNTIME_VERSION", {}),
    (("slurm.sh",), "NODES", SLURM),
    (("slurm.sh",), "GPUS", SLURM),
    (("slurm.sh",), "CPUS_PER_TASK", SLURM),
    (("slurm.sh",), "SAVE_SECONDS", SLURM),
    (("slurm.sh",), "JOB_NAME", SLURM),
    (("slurm.sh",), "SETTLE_SECONDS", JOB),
    (("slurm.sh",), "CPUS_PER_TASK", JOB),
]


@pytest.mark.parametrize("value", ["PATH[$(touch HACKED)]", "a/../../x", "-x", "1 2", "1\n2"])
@pytest.mark.parametrize(("script", "name", "others"), SETTINGS)
def test_a_setting_of_another_form_is_refused_and_never_run(machine, script, name, others, value):
    if value == "a/../../x" and "IMAGE" in name:
        value = "a;b"  # an image's name may have slashes
    arguments = ["--workdir=gs://b/r"] if script[-1] in ("run", "keep", "slurm.sh") else []
    hacked = machine.folder / "hacked"
    settings = {**others, name: value.replace("HACKED", str(hacked))}
    result = machine.run(*script, *arguments, **settings)
    assert result.returncode == 2 and f"{name} is " in result.stderr, result.stderr
    assert not hacked.exists() and machine.calls == []


def test_the_environment_cannot_reach_what_scripts_calculate_with(machine):
    hacked = machine.folder / "hacked"
    bad = f"PATH[$(touch {hacked})]"
    names = ("QUIET", "DRY_RUN", "packed", "restarts", "failed_before", "SCRATCH", "ARGS")
    machine.reply(list=ACTIVE)
    result = machine.run("tpu_vm.sh", "install", **dict.fromkeys(names, bad))
    assert result.returncode == 0, result.stderr
    assert not hacked.exists()


ACTIVE = [(0, "pod\tACTIVE\n")]


def test_a_link_at_the_place_of_a_temporary_file_is_not_followed(machine, checkout):
    victim = machine.folder / "victim"
    victim.write_text("kept")
    for name in ("tokenflow-workload", "tokenflow-workload.tar.gz", "tokenflow-pod.tar.gz"):
        (machine.folder / name).symlink_to(victim)
    launch = checkout / "launch"
    (machine.bin / "git").unlink()
    machine.check("gke_xpk.sh", "run", *ARGUMENTS, launch=launch, dry_run=False)
    machine.reply(list=ACTIVE)
    machine.check("tpu_vm.sh", "install", launch=launch, dry_run=False)
    assert victim.read_text() == "kept" and (machine.folder / "tokenflow-workload").is_symlink()


def test_gke_status_and_delete(machine):
    assert machine.check("gke_xpk.sh", "status") == [["xpk", "workload", "list", *XPK]]
    machine.reply()
    delete = ["xpk", "workload", "delete", "--workload=workload", *XPK, "--force"]
    assert machine.check("gke_xpk.sh", "delete") == [delete]


@pytest.mark.parametrize("verb", ["run", "status", "delete"])
def test_gke_exit_codes_are_passed_on(machine, verb):
    machine.reply(workload=[(7, "")])
    arguments = ARGUMENTS if verb == "run" else ()
    assert machine.run("gke_xpk.sh", verb, *arguments, IMAGE="i").returncode == 7


SRUN = [
    "srun", "--kill-on-bad-exit=1", "--gpu-bind=none", "env", "TOKENFLOW_SIGTERM_CODE=143", *TRAIN,
    "--distributed",
]  # fmt: skip


def test_slurm_submits_a_job_that_starts_one_process_per_gpu(machine):
    settings = {"NODES": "4", "GPUS": "8"}
    [call] = machine.check("slurm.sh", *ARGUMENTS, dry_run=False, **settings)
    assert call[:-1] == [
        "sbatch", "--job-name=tokenflow", "--nodes=4", "--gpus-per-node=8",
        "--ntasks-per-node=8", "--requeue", "--signal=TERM@300", "--open-mode=append",
        "--output=%x-%j.log",
    ]  # fmt: skip
    assert machine.dry_run("slurm.sh", *ARGUMENTS, **settings) == [call, [*SRUN, *ARGUMENTS]]
    machine.reply()
    job = {**machine.environment, "SLURM_JOB_ID": "42"}
    subprocess.run(["sh", "-c", call[-1].removeprefix("--wrap=")], env=job, check=True)
    assert machine.calls == [[*SRUN, *ARGUMENTS]]


def test_slurm_cpus_reach_the_job_and_its_processes(machine):
    settings = {"NODES": "1", "GPUS": "2", "CPUS_PER_TASK": "12"}
    for call in machine.dry_run("slurm.sh", **settings):
        assert "--cpus-per-task=12" in call


@pytest.mark.parametrize(
    ("code", "batch", "requeued"),
    [(0, "1", False), (1, "1", False), (143, "1", True), (143, None, False), (134, "1", False)],
)
def test_slurm_requeues_a_saved_run(machine, code, batch, requeued):
    machine.reply(srun=[(code, "")])
    result = machine.run("slurm.sh", *ARGUMENTS, SLURM_JOB_ID="42", TOKENFLOW_BATCH=batch)
    assert result.returncode == code
    requeue = [["scontrol", "requeue", "42"]] if requeued else []
    assert machine.calls == [[*SRUN, *ARGUMENTS], *requeue]


def test_slurm_exit_codes_are_passed_on(machine):
    machine.reply(sbatch=[(7, "")], srun=[(143, "")], requeue=[(3, "")])
    assert machine.run("slurm.sh", NODES="1", GPUS="1").returncode == 7
    result = machine.run("slurm.sh", SLURM_JOB_ID="42", TOKENFLOW_BATCH="1")
    assert result.returncode == 3


@pytest.mark.parametrize(
    ("script", "arguments", "missing"),
    [
        ("tpu_vm.sh", ["create"], ["TPU_NAME", "ZONE", "PROJECT", "TPU_TYPE"]),
        ("tpu_vm.sh", ["keep"], ["--workdir", "TPU_NAME", "ZONE", "PROJECT", "TPU_TYPE"]),
        ("tpu_vm.sh", ["run", "--workdir=runs/x"], ["--workdir=runs/x", "TPU_NAME"]),
        ("tpu_vm.sh", ["run", "--workdir", "runs/x"], ["--workdir=runs/x", "ZONE"]),
        ("tpu_vm.sh", ["delete"], ["TPU_NAME", "ZONE", "PROJECT"]),
        ("gke_xpk.sh", ["run"], ["--workdir", "WORKLOAD", "TPU_TYPE", "CLUSTER", "ZONE"]),
        ("gke_xpk.sh", ["status"], ["CLUSTER", "ZONE", "PROJECT"]),
        ("slurm.sh", [], ["NODES", "GPUS"]),
    ],
)
def test_all_missing_settings_are_reported_together(machine, script, arguments, missing):
    settings = dict.fromkeys(("TPU_NAME", "ZONE", "PROJECT", "TPU_TYPE", "CLUSTER", "WORKLOAD"))
    result = machine.run(script, *arguments, **settings)
    assert result.returncode == 2 and machine.calls == []
    lines = result.stderr.splitlines()
    assert len(lines) >= len(missing)
    for name in missing:  # every line has a remedy
        assert any(line.startswith(f"{script}: {name} is ") and ": " in line for line in lines)


@pytest.mark.parametrize(
    ("script", "arguments", "program"),
    [
        ("tpu_vm.sh", ["wait"], "gcloud"),
        ("gke_xpk.sh", ["status"], "xpk"),
        ("slurm.sh", [], "sbatch"),
        ("local.sh", [], "python"),
    ],
)
def test_a_missing_program_is_named(machine, script, arguments, program):
    (machine.bin / program).unlink()
    path = f"{machine.bin}"
    for name in ("bash", "dirname"):
        (machine.bin / name).symlink_to(shutil.which(name))
    result = machine.run(script, *arguments, NODES="1", GPUS="1", PATH=path)
    assert result.returncode == 2
    assert f"{program} is not installed: " in result.stderr


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_xpk.sh", "worker.sh"])
@pytest.mark.parametrize("arguments", [[], ["--config=x"], ["delete", "stray"]])
def test_wrong_use_is_one_line(machine, script, arguments):
    result = machine.run(script, *arguments)
    assert result.returncode == 2 and machine.calls == []
    assert result.stderr.count("\n") == 1
