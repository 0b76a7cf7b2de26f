"""A machine on which gcloud, xpk, srun and the like only record their arguments."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
FAKES = ("gcloud", "git", "python", "sbatch", "scontrol", "srun", "xpk")
# Arguments must arrive unchanged, whatever a user writes.
ARGUMENTS = (
    "--config=configs/tokenizer.py:b",
    "--workdir=gs://bucket/a run",
    '--config.name=it\'s "$HOME" `id` \\ *',
    "--config.empty=",
    "",
)
SETTINGS = {
    "TPU_NAME": "pod",
    "ZONE": "zone-a",
    "PROJECT": "project",
    "TPU_TYPE": "v5p-128",
    "CLUSTER": "cluster",
    "WORKLOAD": "workload",
    "POLL": "0",
    "SETTLE_SECONDS": "0",
}
# Appends its arguments to calls.jsonl, then plays the answers in replies.json for the first text
# that they contain: one [exit code, output] per call, the last one again and again.
FAKE = """#!{python} -SEI
import json, os, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open({folder!r} + "/calls.jsonl", "a") as file:
    file.write(json.dumps(call) + "\\n")
with open({folder!r} + "/replies.json") as file:
    replies = json.load(file)
for text, answers in replies.items():
    if text in " ".join(call):
        code, output = answers.pop(0) if len(answers) > 1 else answers[0]
        with open({folder!r} + "/replies.json", "w") as file:
            json.dump(replies, file)
        sys.stdout.write(output)
        sys.exit(code)
"""


class Machine:
    """Run the scripts of launch/ with fakes first on PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in FAKES:
            (self.bin / name).write_text(FAKE.format(python=sys.executable, folder=str(folder)))
            (self.bin / name).chmod(0o755)
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            **SETTINGS,
        }
        self.reply()

    def reply(self, **answers):
        """Set the answers of calls that contain a text (`_` is a blank): [(exit code, output)]."""
        (self.folder / "calls.jsonl").write_text("")
        texts = {text.replace("_", " "): answer for text, answer in answers.items()}
        (self.folder / "replies.json").write_text(json.dumps(texts))

    @property
    def calls(self) -> list[list[str]]:
        """The calls so far, each starting with the name of the program."""
        return [json.loads(line) for line in (self.folder / "calls.jsonl").open()]

    def run(self, script, *arguments, launch=LAUNCH, **settings):
        """Run a script; a setting of None is removed."""
        environment = {**self.environment, **settings}
        return subprocess.run(
            [str(launch / script), *arguments],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def check(self, script, *arguments, dry_run=True, **settings) -> list[list[str]]:
        """Run a script that must succeed and return its calls, which --dry-run must print too."""
        before = len(self.calls)
        result = self.run(script, *arguments, **settings)
        assert result.returncode == 0, result.stderr
        calls = self.calls[before:]
        if dry_run:
            assert self.dry_run(script, *arguments, **settings) == calls
        return calls

    def dry_run(self, script, *arguments, **settings) -> list[list[str]]:
        """Return the commands that --dry-run prints, parsed as a shell would; it calls nothing."""
        before = self.calls
        there = sorted(self.folder.iterdir())
        result = self.run(script, *arguments, "--dry-run", **settings)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        assert self.calls == before and sorted(self.folder.iterdir()) == there
        lines = [line for line in result.stdout.splitlines() if not line.startswith("# ")]
        return [shlex.split(line) for line in lines]
