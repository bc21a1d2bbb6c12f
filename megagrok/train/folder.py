"""What a start leaves in the run's folder so that later commands need nothing else: settings and tokenizer."""

import os
import shutil

import yaml

from megagrok.config import RunConfig, to_dict
from megagrok.data.prepare import PreparedData
from megagrok.train.files import RunFiles


def write_run_files(run: RunConfig, files: RunFiles, prepared: PreparedData) -> None:
    """Leave in the run's folder what it takes to resume it and to speak with it."""
    header = "# The resolved configuration of this run, written when it was last started.\n"
    whole = files.config.with_name(files.config.name + ".new")
    # A link of that name, whoever put it there, is not followed.
    whole.unlink(missing_ok=True)
    with whole.open("x", encoding="utf-8") as file:
        file.write(header + yaml.safe_dump(to_dict(run), sort_keys=False))
    # In one move, so that a death here leaves the old one to resume from.
    os.replace(whole, files.config)
    if prepared.tokenizer_path is not None:
        shutil.copyfile(prepared.tokenizer_path, files.tokenizer)
