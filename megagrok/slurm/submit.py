"""`render` and `submit`: a script is written, checked, shown, and handed to Slurm; then the command says what to type.

Not what happens in the job. Everything is refused before anything is created.
"""

import os
import sys
from pathlib import Path

from megagrok.config.problems import raise_problems
from megagrok.errors import MachineError
from megagrok.slurm.checks import Findings, check_submission
from megagrok.slurm.environment import environment
from megagrok.slurm.journal import Value, write_line
from megagrok.slurm.queue import call
from megagrok.slurm.script import Submission
from megagrok.whole_file import write_whole


def checked(submission: Submission) -> Findings:
    """The findings of a submission without problems. Raises ConfigError that lists all of them."""
    findings = check_submission(submission, environment())
    raise_problems(findings.problems, str(submission.config_path))
    return findings


def show_script(submission: Submission, output: Path | None) -> None:
    """Print the script, or write it to a file that does not exist yet. Raises ConfigError and MachineError."""
    findings = checked(submission)
    for note in findings.notes:
        print(f"note: {note}", file=sys.stderr)
    if output is None:
        print(findings.script, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(findings.script)
    except OSError as error:
        raise MachineError(f"{output} cannot be written: {error.strerror}") from error
    print(f"{output}: written. Submit it with: sbatch {output}")


def submit_run(submission: Submission, *, is_dry: bool) -> int:
    """Check and submit; the job's number, or 0 for a dry run. Raises ConfigError, and MachineError if Slurm refuses."""
    findings = checked(submission)
    for note in findings.notes:
        print(f"note: {note}")
    if is_dry:
        print(findings.script, end="")
        print(f"# {submission.run.name}: all checks passed, nothing was submitted.")
        return 0
    keep_script(submission, findings.script)
    job = hand_in(submission, by="person", exclude=[], after=None)
    facts: dict[str, Value] = {"by": "person", "command": submit_command(submission)}
    write_line(submission.files, "submitted", f"submitted as job {job}", job=job, facts=facts)
    root = os.path.relpath(submission.files.root)
    print(f"{submission.run.name}: job {job}, {submission.nodes} nodes, {submission.ranks} ranks.")
    print(f"  status  megagrok slurm status {root}")
    print(f"  log     megagrok slurm logs {root}")
    print(f"  why     megagrok slurm why {root}")
    print(f"  cancel  megagrok slurm cancel {root}")
    return job


def submit_command(submission: Submission) -> list[str]:
    """What to type to submit the run again, from anywhere."""
    cluster = ["--cluster", str(submission.cluster_path)]
    return ["megagrok", "slurm", "submit", *submission.train_arguments, *cluster]


def keep_script(submission: Submission, script: str) -> None:
    """Leave the script in the run's folder, and the folder of its logs, which Slurm does not make. Raises
    MachineError."""
    files = submission.files
    try:
        (files.root / "logs").mkdir(parents=True, exist_ok=True)
        write_whole(submission.script, script)
    except OSError as error:
        raise MachineError(f"{error.filename or files.root} cannot be written: {error.strerror}") from error


def hand_in(submission: Submission, *, by: str, exclude: list[str], after: int | None) -> int:
    """`sbatch` the kept script; the number of the job. Raises MachineError with Slurm's sentence.

    after: a job that has to end first (it has the same name and user, which is what `singleton` goes by).
    """
    command = ["sbatch", "--parsable"]
    if after is not None:
        command.append("--dependency=singleton")
    if left_out := [*([submission.cluster.exclude] if submission.cluster.exclude else []), *exclude]:
        command.append(f"--exclude={','.join(left_out)}")
    variables = {
        # What this job is must not decide what the next one asks for.
        name: value
        for name, value in environment().items()
        if not name.startswith(("SLURM_", "SBATCH_", "SRUN_")) or name == "SLURM_CONF"
    }
    answer = call([*command, str(submission.script)], environment=variables)
    number = answer.out.strip().partition(";")[0]
    if not answer.is_good or not number.isdecimal():
        raise MachineError(f"Slurm did not take the job: {answer.sentence}")
    return int(number)
