"""The 75 bad inputs that a trainer meets, each as a user types it: refused at once, with its exit status and its text.

Rows of `check`, `describe` and `slurm` run on a login node, a process that has never imported torch; rows of `train`
are forked from one that has imported everything. So the seconds of a row are those of the command without imports.
Numbers are those of the list that the house was built to; what this stack does not have is listed below with its
reason, and what needs nodes or a server is proven by the test named there.
"""

import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import datasets  # noqa: F401  # once, before anything is forked
import numpy as np
import pytest

import megagrok.telemetry.figures
import megagrok.train.finish
import megagrok.train.worker  # noqa: F401
from megagrok.checkpoint.commit import digest_of
from megagrok.config import DataConfig
from megagrok.data.prepare import prepare
from megagrok.data.tokenizer import train_tokenizer
from megagrok.data.tokens import TokenWriter
from megagrok.parallel.placement import Nodes
from megagrok.train.attempt import NodePage, write_page
from megagrok.train.files import RunFiles
from megagrok.train.lease import leased
from tests.config.conftest import TINY
from tests.config.test_refusals import BOMB
from tests.login_node import LoginNode, Outcome, run_here

ROOT = Path(__file__).parents[1]
PRETRAIN = ROOT / "configs" / "run" / "pretrain-286b.yaml"
QUICK = ROOT / "configs" / "run" / "quickstart.yaml"
LIMIT_SECONDS = 2.0
GOOD = TINY + '  held_out_fraction: 0.2\ntelemetry:\n  wandb: "off"\n'
"""A run of tokens `corpus`; only they are missing."""

NOT_HERE = {
    10: "group-limited routing: the model has one group of experts; such a key is unknown and refused as 29",
    23: "bf16 on a GPU without it: needs such a GPU; platform.check_precision refuses it there, tests/test_platform.py",
    33: "a DeepSpeed JSON beside our file: users never write one, megagrok makes it from its own settings",
    55: "a checkpoint whose state cannot be resharded: the format has no layout, every one can",
    75: "a process group's timeout below a save: nobody sets one, it is 120 s above the longest limit under watch",
}
ELSEWHERE = {
    24: "tests/slurm/test_preflight.py::test_a_node_that_differs_is_named_with_its_reason",
    66: "tests/slurm/test_submit.py::test_what_slurm_passes_over_in_silence_is_found",
    67: "tests/slurm/test_submit.py::test_what_the_cluster_does_not_have_is_refused_in_slurms_words",
    68: "tests/parallel/test_crew.py::test_an_address_without_a_name_behind_it_is_refused",
    69: "tests/slurm/test_preflight.py::test_a_clock_that_is_off_is_told",
    70: "tests/telemetry/test_tracker.py::test_a_server_that_never_answers_holds_neither_a_step_nor_the_end",
}
"""Rows that take nodes, a scheduler or a server, and the test that has them."""

Make = Callable[[Path], AbstractContextManager[object] | None]


@dataclass(frozen=True, slots=True)
class Row:
    """A bad input. `command`: its words, the first without torch unless it is train; `make` puts files into the
    folder, which has run.yaml already; `text` is searched in what is said, as a regular expression."""

    number: int
    command: str | list[str]
    status: int
    text: str
    make: Make = lambda folder: None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return self.command.split() if isinstance(self.command, str) else self.command


def text_file(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return make


def changed(old: str, new: str) -> Make:
    def make(folder: Path) -> None:
        text = (folder / "run.yaml").read_text()
        assert old in text
        (folder / "run.yaml").write_text(text.replace(old, new))

    return make


def tokens(folder: Path, dtype: str = "uint16", last: int = 9, num_documents: int = 60) -> None:
    """corpus.bin and corpus.idx; enough for a step of run.yaml."""
    with TokenWriter(folder / "corpus", np.dtype(dtype)) as writer:
        for number in range(num_documents):
            writer.add([(number * 7 + i) % 100 for i in range(100)] + [last])


def tokens_with(dtype: str, last: int) -> Make:
    return lambda folder: tokens(folder, dtype, last)


def damaged(name: str, change: Callable[[bytes], bytes]) -> Make:
    """Tokens, one of whose two files is not what it was."""

    def make(folder: Path) -> None:
        tokens(folder)
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return make


def at(offset: int, form: str, value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        part = struct.pack(form, value)
        return data[:offset] + part + data[offset + len(part) :]

    return change


def tokenizer(folder: Path) -> None:
    train_tokenizer(["some words, and some more words"] * 20, 280).save(folder / "tokenizer.json")


def together(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for each in makes:
            each(folder)

    return make


def without_eos(folder: Path) -> None:
    tokenizer(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|eos|>", "<|end|>"))


def made_with_another_tokenizer(folder: Path) -> None:
    """Tokens out of the cache of a run, whose page says which tokenizer made them."""
    tokens(folder)
    tokenizer(folder)
    (folder / "prepared.json").write_text(json.dumps({"sizes": {}, "tokenizer_hash": "9f3a" * 4}))


def installed(name: str, version: str) -> Make:
    """A folder for PYTHONPATH in which a library is installed, as far as metadata goes."""

    def make(folder: Path) -> None:
        info = folder / "site" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return make


def cut_short(pattern: str) -> Make:
    def make(folder: Path) -> None:
        paths = list(folder.glob(pattern))
        assert paths
        for path in paths:
            path.write_bytes(path.read_bytes()[:-1])

    return make


def stale_cache(folder: Path) -> None:
    """Prepared data that are not what they were when they were prepared."""
    tokens(folder)
    data = DataConfig(tokens=str(folder / "corpus"), cache=str(folder / "runs" / "cache"), held_out_fraction=0.2)
    prepare(data, model_vocab_size=512)
    cut_short("runs/cache/*/*.npy")(folder)


def flipped(pattern: str) -> Make:
    def make(folder: Path) -> None:
        (path,) = (folder / "runs" / "t" / "checkpoints").glob(pattern)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return make


def resigned(old: str, new: str) -> Make:
    """A commit that another build could have written: changed, with a digest that fits."""

    def make(folder: Path) -> None:
        path = folder / "runs" / "t" / "checkpoints" / "step-00000002" / "COMMIT.json"
        page = path.read_bytes()
        body = page[page.index(b'"commit":') + 9 : -2].replace(old.encode(), new.encode(), 1)
        path.write_bytes(b'{"digest":"' + digest_of(body).encode() + b'","commit":' + body + b"}\n")

    return make


def foreign(folder: Path) -> None:
    """What torch.distributed.checkpoint leaves, where ours should be."""
    checkpoints = folder / "runs" / "t" / "checkpoints"
    shutil.rmtree(checkpoints)
    (checkpoints / "iter_0000002").mkdir(parents=True)
    (checkpoints / "iter_0000002" / ".metadata").write_bytes(b"\x80\x04]\x94.")


def held(folder: Path) -> AbstractContextManager[object]:
    """The run is in the hands of a start that lives: this process."""
    return leased(RunFiles(folder / "runs" / "t"), Nodes())


def source(kind: str, path: str, *more: str) -> list[str]:
    """Words that train on text instead of tokens."""
    return ["train", "run.yaml", "data.tokens=null", "data.tokenizer_vocab_size=300",
            f"data.sources=[{{kind: {kind}, path: {path}}}]", *more]  # fmt: skip


def metrics(**line: float) -> Make:
    """Records of an earlier attempt of the run."""

    def make(folder: Path) -> None:
        files = RunFiles(folder / "runs" / "t")
        files.root.mkdir(parents=True)
        files.metrics.write_text("".join(json.dumps(line | {"kind": "step", "step": i}) + "\n" for i in range(9)))

    return make


CLUSTER = 'walltime: "00:30:00"\ngpus_per_node: 0\nranks_per_node: 2\nsignal_lead_seconds: 60\n'


def saved_in(seconds: int) -> Make:
    """What an earlier start left behind about its saves."""

    def make(folder: Path) -> None:
        page = NodePage(
            generation=1, node=0, num_nodes=1, host="node1", job=None, restart=0, pid=1, started_at=0.0, at=1.0,
            ranks=(), ending=None, slowest_save_seconds=float(seconds),
        )  # fmt: skip
        write_page(folder / "runs" / "t", page)

    return make


SLURM = ["slurm", "render", "run.yaml", "--cluster", "cluster.yaml"]
# That Slurm is not installed here is a note, not a refusal.
NO_SLURM = {"PATH": "/nowhere"}
HARMLESS_SECRET = "hunter2hunter2"

ROWS = [
    Row(1, f"check {PRETRAIN} model.num_layers=61", 2, r"num_layers = 61, needs a multiple of parallel.pipeline \(8\)"),
    Row(2, f"check {PRETRAIN} parallel.virtual_pipeline=3", 2, r"= 8, needs a multiple of parallel.virtual_pipeline"),
    Row(3, f"check {QUICK} parallel.pipeline=1 parallel.virtual_pipeline=2", 2, r"= 2, needs parallel.pipeline > 1"),
    Row(4, f"check {QUICK} model.num_heads=5 model.num_kv_heads=5", 2, r"num_heads = 5, needs .* parallel.tensor \(2"),
    Row(5, f"check {QUICK} model.num_kv_heads=1", 2, r"num_kv_heads = 1, needs a multiple of parallel.tensor \(2\)"),
    Row(6, f"check {QUICK} model.num_kv_heads=4", 2, r"num_heads = 6, needs a multiple of model.num_kv_heads \(4\)"),
    Row(6, "check run.yaml model.num_kv_heads=8", 2, r"num_heads = 4, needs a multiple of model.num_kv_heads \(8\)"),
    Row(7, "check run.yaml", 2, r"model.head_dim is missing: .*Width of one head", changed("  head_dim: 16\n", "")),
    Row(8, f"check {PRETRAIN} model.moe.num_experts=60", 2, r"num_experts = 60, needs a multiple of parallel.expert"),
    Row(9, "check run.yaml model.moe.top_k=8", 2, r"top_k = 8, needs <= model.moe.num_experts \(4\)"),
    Row(11, f"check {PRETRAIN} --world 40", 2, r"world = 40 ranks, needs a multiple of .* = 64: start 512"),
    Row(12, f"check {QUICK} parallel.expert=4", 2,
        r"parallel.expert = 4, needs a divisor of parallel.tensor \* context"),
    Row(13, "slurm render run.yaml --cluster cluster.yaml parallel.data=3 train.global_batch=9",
        
        2, r"the layout has 3 ranks, needs a multiple of 2, .* Fix: a layout of 2 or 4 ranks",
        text_file("cluster.yaml", CLUSTER), NO_SLURM),
    Row(13, "train run.yaml", 5, r"srun started 4 tasks on 2 nodes; .* Start one task per node",
        environment={"SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "4",
                     "SLURM_JOB_ID": "7"}),
    Row(13, "train run.yaml", 2, r"world = 3 ranks, .* = 1: start 1",
        environment={"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}),
    Row(14, f"check {PRETRAIN} train.global_batch=8190", 2,
        r"global_batch = 8190, needs a multiple of .* \{8192, 8128"),
    Row(15, f"check {QUICK} train.global_batch=2 train.micro_batch=2", 2,
        r"= 1 micro-batches, needs >= parallel.pipeli"),
    Row(15, f"check {QUICK} parallel.virtual_pipeline=2 train.global_batch=6 train.micro_batch=2", 2,
        r"= 3 micro-batches, needs a multiple of parallel.pipeline \(2\)"),
    Row(16, ["check", str(PRETRAIN), "train.batch_ramp=[{until_samples: 9000, global_batch: 4100}]"], 2,
        r"batch_ramp.0.global_batch = 4100, needs a multiple of .* \(8\). Fix: .* in \{4096, 4160\}"),
    Row(17, f"check {QUICK} parallel.context=2 train.seq_len=254", 2,
        r"seq_len = 254, needs a multiple of 2 \* paralle"),
    Row(17, f"check {QUICK} train.seq_len=255", 2, r"seq_len = 255, needs a multiple of parallel.tensor"),
    Row(18, "check run.yaml train.seq_len=256", 2, r"seq_len = 256, needs <= model.max_positions \(128\)"),
    Row(19, "check run.yaml parallel.sequence=true", 2, r"parallel.sequence = true, needs parallel.tensor > 1"),
    Row(19, f"check {QUICK} parallel.sequence=false", 2,
        r"false with parallel.expert = 2 and parallel.tensor = 2, needs"),
    Row(20, "train run.yaml train.precision=fp8", 5, r"fp8, needs an NVIDIA GPU .* this machine computes on the CPU"),
    Row(21, f"check {PRETRAIN} train.precision=fp8 model.moe.ffn_hidden=21848", 2, r"= 21848, needs a multiple of 16"),
    Row(22, "check run.yaml train.precision=mxfp8", 2, r"precision = 'mxfp8', needs one of fp32, bf16, fp8"),
    Row(22, "check run.yaml train.precision=[fp16,bf16]", 2,
        r"train.precision is a list, needs one of fp32, bf16, fp8"),
    Row(25, f"check {PRETRAIN} --memory 16", 2,
        r"holds 59.9 GiB before its first backward pass, its device has 16.0. Largest: act"),
    Row(26, "check run.yaml optimizer.lr=-3.0e-4", 2, r"optimizer.lr = -0.0003, needs > 0"),
    Row(26, "check run.yaml optimizer.lr=.nan", 2, r"optimizer.lr = nan, needs a finite number"),
    Row(26, "check run.yaml schedule.min_lr=1.0", 2, r"schedule.min_lr = 1.0, needs <= optimizer.lr \(0.01\)"),
    Row(26, "check run.yaml optimizer.beta2=1.0 optimizer.eps=0 optimizer.weight_decay=-1 optimizer.clip_norm=-1", 2,
        r"(?s)4 problems.*beta2 = 1.0.*eps = 0.0.*weight_decay = -1.0.*clip_norm = -1.0"),
    Row(26, "check run.yaml schedule.warmup_steps=11", 2,
        r"warmup_steps \+ schedule.decay_steps = 11 \+ 0, needs <= tra"),
    Row(27, "check run.yaml", 2, r"lr = '3e-4' \(text\), needs a number. .* write 3.0e-4 \(run.yaml:22\)",
        changed("1.0e-2", "3e-4")),
    Row(28, "check run.yaml", 2,
        r"train.steps given twice \(lines 15, 16\)", changed("  steps: 10\n", "  steps: 10\n" * 2)),
    Row(28, "check run.yaml train.deterministic=no", 2, r"YAML 1.1 reads it as false: write true or false"),
    Row(28, "check run.yaml train.steps=010", 2, r"train.steps = 010: YAML 1.1 reads it as octal"),
    Row(28, "check run.yaml train.steps=1:30", 2, r"train.steps = 1:30: YAML 1.1 reads it in base 60"),
    Row(29, "check run.yaml optimizer.learning_rte=1", 2, r"unknown key 'learning_rte' in optimizer"),
    Row(29, "check run.yaml optimizer.weight_decey=0.1", 2, r"Did you mean 'weight_decay'\?"),
    Row(30, "check run.yaml model.lr=0.1", 2, r"'lr' belongs under optimizer, found under model"),
    Row(31, ["check", "run.yaml", "parallel.tensor='8'"], 2, r"parallel.tensor = '8' \(text\), needs an integer"),
    Row(31, "check run.yaml train.steps=true train.seed=1.5 optimizer.lr=null model.hidden=[64]", 2,
        r"(?s)4 problems.*model.hidden is a list.*steps = true.*lr is null"),
    Row(32, f"check {QUICK} parallel.zero=2", 2, r"parallel.zero = 2 with parallel.pipeline = 2, needs 0 or 1"),
    Row(32, f"check {PRETRAIN} parallel.zero=0", 2, r"parallel.zero = 0 with train.precision = bf16, needs 1"),
    Row(34, "check run.yaml", 2, r"run.yaml: empty, needs at least one setting", text_file("run.yaml", "")),
    Row(34, "check run.yaml", 2,
        r"needs sections like 'model:' at its top, has a list", text_file("run.yaml", "- a\n")),
    Row(34, "check run.yaml", 2, r"not UTF-8, byte 0 is 0xff \(UTF-16", text_file("run.yaml", TINY.encode("utf-16"))),
    Row(34, "check run.yaml", 2, r"has at most 1,048,576 \(1 MiB\)", text_file("run.yaml", "#" * (1 << 20) + "\n")),
    Row(34, "check run.yaml", 2, r"run.yaml: alias expansion over 10,000 values", text_file("run.yaml", BOMB)),
    Row(35, "train run.yaml", 3, r"corpus: neither corpus.idx nor corpus.bin exists"),
    Row(35, source("text", "gone.txt"), 3, r"data.sources\[0\].path = gone.txt: no such file or folder"),
    Row(35, source("jsonl", "x_*.jsonl"), 3, r"data.sources\[0\].path = x_\*.jsonl matches no file"),
    Row(35, source("parquet", "."), 3, r"the folder holds no .parquet file"),
    Row(36, "train run.yaml", 3, r"corpus.idx has no corpus.bin beside it",
        together(tokens, lambda folder: (folder / "corpus.bin").unlink())),
    Row(36, "train run.yaml", 3, r"corpus.bin has no corpus.idx beside it",
        together(tokens, lambda folder: (folder / "corpus.idx").unlink())),
    Row(37, "train run.yaml", 3, r"corpus.idx: bytes 0-8 are b'PK.*, needs MMIDIDX. Is this zip\?",
        damaged("corpus.idx", lambda data: b"PK\3\4" + data[4:])),
    Row(37, "train run.yaml", 3, r"corpus.idx: version 2, needs 1", damaged("corpus.idx", at(9, "<Q", 2))),
    Row(37, "train run.yaml", 3, r"dtype code 7 \(float32\)", damaged("corpus.idx", at(17, "<B", 7))),
    Row(38, "train run.yaml", 3, r"header says 60 sequences = 1,242 bytes, file has 1,000. Truncated copy\?",
        damaged("corpus.idx", lambda data: data[:1000])),
    Row(39, "train run.yaml", 3, r"corpus.bin: index ends at byte 12,120, file has 12,000. Truncated",
        damaged("corpus.bin", lambda data: data[:12_000])),
    Row(40, "train run.yaml", 3, r"pointer 2 \(12\) is before pointer 1 \(202\)",
        damaged("corpus.idx", at(34 + 4 * 60 + 16, "<q", 12))),
    Row(40, "train run.yaml", 3, r"sequence 3 has length -5, needs 0 or more", damaged("corpus.idx", at(46, "<i", -5))),
    Row(40, "train run.yaml", 3, r"document index runs from 0 to 61, needs 0 to 60",
        damaged("corpus.idx", at(1242 - 8, "<q", 61))),
    Row(41, "train run.yaml", 3,
        r"token 512 at document 0, needs < model.vocab_size = 512", tokens_with("uint16", 512)),
    Row(41, "train run.yaml", 3, r"token -7 at document 0, needs >= 0", tokens_with("int32", -7)),
    Row(42, "train run.yaml data.tokenizer=tokenizer.json", 3, r"uint8 holds 256 ids, the tokenizer has 27\d",
        together(tokens_with("uint8", 9), tokenizer)),
    Row(43, "train run.yaml data.tokenizer=tokenizer.json model.vocab_size=270", 3,
        r"the tokenizer has 27\d tokens, needs <= model.vocab_size = 270", together(tokens, tokenizer)),
    Row(43, "train run.yaml data.tokenizer=tokenizer.json", 3, r"no token ends a document, needs one of <\|eos\|>",
        together(tokens, without_eos)),
    Row(44, "train run.yaml data.tokenizer=tokenizer.json", 3, r"was made with tokenizer 9f3a.*, data.tokenizer is",
        made_with_another_tokenizer),
    Row(45, source("jsonl", "x.jsonl"), 3, r"x.jsonl: no documents", text_file("x.jsonl", "")),
    Row(45, source("jsonl", "x.jsonl"), 3, r"x.jsonl: no documents, only blank ones", text_file("x.jsonl", "\n \n")),
    Row(46, source("jsonl", "x.jsonl"), 3, r"x.jsonl line 2: not JSON", text_file("x.jsonl", '{"text": "a"}\n{"tex\n')),
    Row(46, source("jsonl", "x.jsonl"), 3, r"line 1: no 'text' key \(keys: 'txt', 'id'\)",
        text_file("x.jsonl", '{"txt": "a", "id": 1}\n')),
    Row(46, source("jsonl", "x.jsonl"), 3,
        r"line 1: 'text' is null, needs text", text_file("x.jsonl", '{"text": null}\n')),
    Row(46, source("jsonl", "x.jsonl"), 3, r"NUL at character 1", text_file("x.jsonl", '{"text": "a\\u0000"}\n')),
    Row(46, source("jsonl", "x.jsonl"), 3, r"lone surrogate U\+D800", text_file("x.jsonl", '{"text": "\\ud800"}\n')),
    Row(47, source("jsonl", "x.jsonl"), 3, r"byte 0: not UTF-8 \(0xff 0xfe = UTF-16; convert",
        text_file("x.jsonl", '{"text": "a"}\n'.encode("utf-16"))),
    Row(47, source("jsonl", "x.jsonl"), 3,
        r"not UTF-8 \(0x1f 0x8b = gzip", text_file("x.jsonl", b"\x1f\x8b\x08" + b"\xff" * 9)),
    Row(48, "train run.yaml train.seq_len=128", 3, r"a sample takes 129 tokens, the training documents have",
        lambda folder: tokens(folder, num_documents=2)),
    Row(49, ["train", "run.yaml", "data.tokens=null", "data.tokenizer_vocab_size=300",
             "data.sources=[{kind: jsonl, path: x.jsonl}, {kind: jsonl, path: ./x.jsonl}]"], 3,
        r"data.sources\[1\]: x.jsonl is already read by data.sources\[0\]", text_file("x.jsonl", '{"text": "a"}\n')),
    Row(50, "check run.yaml data.held_out_fraction=0", 2, r"held_out_fraction = 0.0, needs > 0 and < 1"),
    Row(50, "train run.yaml train.evaluate_samples=4000", 3,
        r"evaluate_samples = 4,000: the \d+ held-out documents make",
        tokens),
    Row(52, "train run.yaml", 3, r"hashes.npy has \d+ bytes, was written with \d+. Delete the folder", stale_cache),
    Row(61, "train run.yaml", 5, r"MachineError: runs/t.* cannot be written: .* set runs_dir to a folder that can",
        together(tokens, lambda folder: (folder / "runs").mkdir(), text_file("runs/t", "a file stands here"))),
    Row(61, "train run.yaml", 5, r"data.cache = runs/cache: cannot be written",
        together(tokens, text_file("runs", ""))),
    Row(63, "check run.yaml checkpoint.keep=1", 2, r"keep = 1, needs >= 2: a bad newest checkpoint would end the run"),
    Row(64, SLURM, 2, r"walltime = 00:30:00 less 60 s of warning, a job's first checkpoint takes 50 min",
        together(text_file("cluster.yaml", CLUSTER), metrics(step_seconds=600.0)), NO_SLURM),
    Row(65, SLURM, 2,
        r"signal_lead_seconds = 60, the slowest save of this run took 140 s .* Fix: signal_lead_seconds: 300",
        together(text_file("cluster.yaml", CLUSTER), saved_in(140)), NO_SLURM),
    Row(71, "train run.yaml data.tokenizer=xai-org/grok-2", 3, r"xai-org/grok-2: no such file", tokens,
        {"HF_HUB_OFFLINE": "1"}),
    Row(72, ["check", "run.yaml", "runs_dir=/scratch/$UNSET/run"], 2, r"\$UNSET/run: UNSET is not set"),
    Row(72, ["check", "run.yaml", "data.cache=~/cache"], 2, r"~ is not expanded: write the path out"),
    Row(72, ["check", "run.yaml", 'data.cache="a\\nb"'], 2, r"a path has no control character such as '\\n'"),
    Row(72, ["check", "run.yaml", 'data.tokens="a\\0b"'], 2, r"a path has no control character such as '\\x00'"),
    Row(72, ["check", "run.yaml", "name=../other"], 2, r"name = '../other', needs letters, digits"),
    Row(72, ["check", "run.yaml", "name=" + "a" * 129], 2, r"at most 128: it becomes a folder"),
    Row(72, ["check", "run.yaml", "data.cache=" + "a" * 300], 2,
        r"300 bytes, the longest part 300; a path has at most"),
    Row(72, ["check", "$NOWHERE/run.yaml"], 2, r"NOWHERE is not set"),
    Row(72, [*SLURM, 'name=a";touch pwned'], 2, r"needs letters, digits", text_file("cluster.yaml", CLUSTER), NO_SLURM),
    Row(73, f"check run.yaml telemetry.wandb_api_key={HARMLESS_SECRET}", 2,
        r"'wandb_api_key' .* looks like the key of a s"),
    Row(73, "check run.yaml data.cache=https://me:" + HARMLESS_SECRET + "@host/x", 2,
        r"data.cache looks like a secret"),
    Row(73, "check run.yaml telemetry.wandb_project=" + "0123456789abcdef" * 2 + "01234567", 2, r"looks like a secret"),
    Row(74, "check run.yaml --strict-deps", 5,
        r"MachineError: torch 2.9.1 < 2.10.0 \(CVE-2026-24747", installed("torch", "2.9.1"),
        {"PYTHONPATH": "site"}),
    Row(74, "check run.yaml", 0,
        r"warning: deepspeed 0.14.4 < 0.15.1 \(CVE-2024-43497", installed("deepspeed", "0.14.4"),
        {"PYTHONPATH": "site"}),
]  # fmt: skip

# Each begins with the folder of a run that has trained two steps and saved both.
RESUMED = [
    Row(51, "train run.yaml", 3, r"the data changed under the run: fingerprint .* --accept-data-change \(it is record",
        tokens_with("uint16", 8)),
    Row(53, "train run.yaml model.rope_theta=5000.0 model.norm_eps=1.0e-6 model.moe.balance_coefficient=0.5", 4,
        r"(?s)belongs to another run:.*balance_coefficient: the .*norm_eps: the .*rope_theta: the checkpoint has 1"),
    Row(54, "train run.yaml train.seed=9 train.seq_len=16", 4,
        r"(?s)train.seed: the checkpoint has 1234, the configuration 9.*train.seq_len: the checkpoint has 32"),
    Row(54, "train run.yaml train.steps=1", 4, r"has more steps behind it than train.steps = 1. Fix: train.steps=2"),
    Row(56, "generate runs/t --step 2", 4,
        r"step-00000002.*rank-00000.safetensors.* digest", flipped("step-*2/*.safetensors")),
    Row(56, "ckpt verify runs/t", 4, r"step-00000002.*rank-00000.safetensors", flipped("step-*2/*.safetensors")),
    Row(56, "train run.yaml", 4,
        r"none of 2 checkpoints is sound", cut_short("runs/t/checkpoints/step-*/*.safetensors")),
    Row(57, "resume runs/t", 4, r"has no checkpoint to go on from, and resume does not start from scratch",
        lambda folder: shutil.rmtree(folder / "runs" / "t" / "checkpoints")),
    Row(57, "resume runs/other", 4, r"runs/other is not the folder of a run: it has no config.yaml"),
    Row(58, "train run.yaml model.hidden=32 model.head_dim=8", 4, r"(?s)belongs to another run:.*Fix: .* another name"),
    Row(59, "train run.yaml", 4, r"runs/t is in use by process \d+ on ", held),
    Row(60, "train run.yaml", 4, r"COMMIT.json: format 7, this build reads 1", resigned('"format":1', '"format":7')),
    Row(60, "train run.yaml", 4, r"pickle checkpoints are not loaded", foreign),
    Row(62, "train run.yaml model.moe.ffn_hidden=1000000000000", 5, r"No space left on runs/t.* needs [\d,.]+ GB, has",
        lambda folder: shutil.rmtree(folder / "runs")),
]  # fmt: skip


def refused(row: Row, folder: Path, login: LoginNode) -> Outcome:
    """What became of a row, after all that holds for every row."""
    run = run_here if row.words[0] in ("train", "generate", "ckpt") else login.run
    environment = {"TMPDIR": str(folder), **row.environment}
    with row.make(folder) or nullcontext():
        ended = run(row.words, folder, environment)
    said = ended.out + ended.err
    assert ended.status == row.status, said
    assert re.search(row.text, said), said
    assert "Traceback" not in said
    assert HARMLESS_SECRET not in said
    assert ended.seconds < LIMIT_SECONDS
    assert ended.outside == ()
    assert not ended.met
    if run is login.run:
        assert ended.heavy == ()
    assert not (folder / "pwned").exists()
    return ended


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the user types: run.yaml is there and good but for the data that it names."""
    place = tmp_path / "here"
    place.mkdir()
    (place / "run.yaml").write_text(GOOD)
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user whose run has made its two steps."""
    place = tmp_path_factory.mktemp("trained") / "here"
    place.mkdir()
    text = GOOD.replace("steps: 10", "steps: 2").replace("every_steps: 5", "every_steps: 1")
    (place / "run.yaml").write_text(text)
    tokens(place)
    ended = run_here(["train", "run.yaml"], place, {"TMPDIR": str(place)})
    assert ended.status == 0, ended.err
    return place


def named(rows: list[Row]) -> list[object]:
    return [pytest.param(row, id=f"{row.number}: {' '.join(row.words)[:60]}") for row in rows]


@pytest.mark.parametrize("row", named(ROWS))
@pytest.mark.fault("F40")
def test_a_bad_input_is_refused_at_once(row: Row, folder: Path, login: LoginNode) -> None:
    refused(row, folder, login)


@pytest.mark.parametrize("row", named(RESUMED))
@pytest.mark.fault("F40")
def test_a_run_that_cannot_go_on_is_refused_at_once(row: Row, trained: Path, folder: Path, login: LoginNode) -> None:
    shutil.rmtree(folder)
    shutil.copytree(trained, folder)
    refused(row, folder, login)


def test_the_good_input_beside_the_bad_ones_is_accepted(folder: Path, login: LoginNode) -> None:
    """Else the rows would prove nothing."""
    ended = login.run(["check", "run.yaml"], folder)
    assert (ended.status, ended.heavy, ended.outside) == (0, (), ())
    assert "run.yaml: ok. t, " in ended.out


def test_the_watch_sees_what_it_is_there_to_see(folder: Path, trained: Path, login: LoginNode) -> None:
    target = folder.parent / "elsewhere.sbatch"
    (folder / "cluster.yaml").write_text(CLUSTER)
    ended = login.run([*SLURM, "--output", str(target)], folder, NO_SLURM | {"TMPDIR": str(folder)})
    assert ended.outside == (f"open {target}",), ended.err
    shutil.rmtree(folder)
    shutil.copytree(trained, folder)
    ended = run_here(["train", "run.yaml", "train.steps=3"], folder, {"TMPDIR": str(folder)})
    assert (ended.status, ended.met) == (0, True), ended.err


def test_all_75_are_refused_or_listed_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    here = {row.number for row in (*ROWS, *RESUMED)}
    assert sorted([*here, *NOT_HERE, *ELSEWHERE]) == list(range(1, 76)), "each number stands in one list"
    for number, place in ELSEWHERE.items():
        path, _, test = place.partition("::")
        assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8"), (number, place)
    with capsys.disabled():
        print(f"\n{len(here)} bad inputs refused here, {len(ELSEWHERE)} where there are nodes or servers, "
              f"{len(NOT_HERE)} have nothing to act on:")  # fmt: skip
        for number, why in sorted(NOT_HERE.items()):
            print(f"  {number}: {why}")
