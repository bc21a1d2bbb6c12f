"""What a start leaves in the run's folder so that later commands need nothing else: settings and tokenizer."""

import shutil

import yaml

from megagrok.config import RunConfig, to_dict
from megagrok.data.prepare import PreparedData
from megagrok.train.files import RunFiles
from megagrok.whole_file import write_whole


def write_run_files(run: RunConfig, files: RunFiles, prepared: PreparedData) -> None:
    """Leave in the run's folder what it takes to resume it and to speak with it."""
    header = "# The resolved configuration of this run, written when it was last started.\n"
    write_whole(files.config, header + yaml.safe_dump(to_dict(run), sort_keys=False))
    if prepared.tokenizer_path is not None:
        shutil.copyfile(prepared.tokenizer_path, files.tokenizer)
