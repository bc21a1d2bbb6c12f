"""The `megagrok` command: one function for each subcommand, which puts the rooms together and decides nothing else.

What a subcommand needs beyond configuration and arithmetic is imported inside its function, so that `check` answers on
a login node without torch. Settings follow the file as key=value, before or after options.
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagrok.bench.choices import PEER_NAMES
from megagrok.config import Loaded, decode_config, explain, is_model_file, load_config, load_model_config, reference
from megagrok.errors import EXIT_BUG, EXIT_UNREAD, CheckpointError, ConfigError, DataError, MachineError, MegagrokError
from megagrok.plan import describe, describe_run, require_runnable, total_params, world_size
from megagrok.plan.dependencies import bad_dependencies, installed_versions
from megagrok.plan.memory_rules import GIB
from megagrok.train.files import RunFiles
from megagrok.verify.choices import BREAK_NAMES, GRID_NAMES

if TYPE_CHECKING:
    from megagrok.slurm.script import Submission


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its line of help, what adds its arguments, and what runs it and returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is that of the error it raised, if any (see errors.py)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, *rest = arguments or ["--help"]
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        return _usage(name)
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"megagrok {name}", description=command.help, allow_abbrev=False)
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_intermixed_args(rest)
    try:
        status = command.run(options)
        sys.stdout.flush()
        return status
    except MegagrokError as error:
        if options.debug:
            traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # `megagrok plan ... | head`: who reads has what it wanted. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNREAD
    except Exception:
        traceback.print_exc()
        print("This is a bug of megagrok.", file=sys.stderr)
        return EXIT_BUG


def run_check(options: argparse.Namespace) -> int:
    """Refuse the run with all its problems, or say what it is."""
    bad = bad_dependencies(installed_versions())
    loaded = decode_config(options.config, options.overrides)
    require_runnable(loaded, options.world, None if options.memory is None else int(options.memory * GIB))
    if bad and options.strict_deps:
        raise MachineError("\n".join(bad))
    for sentence in bad:
        print(f"warning: {sentence}", file=sys.stderr)
    config = loaded.config
    layout = config.parallel
    axes = f"tensor {layout.tensor} x context {layout.context} x pipeline {layout.pipeline} x data {layout.data}"
    ranks = world_size(layout)
    counted = "1 rank" if ranks == 1 else f"{ranks} ranks"
    print(f"{options.config}: ok. {config.name}, {total_params(config.model):,} parameters, {counted} = {axes}")
    return 0


def run_describe(options: argparse.Namespace) -> int:
    """Print the numbers of a model or of a run."""
    if is_model_file(options.config):
        description = describe(load_model_config(options.config, options.overrides))
    else:
        loaded = decode_config(options.config, options.overrides)
        require_runnable(loaded)
        description = describe_run(loaded.config)
    print(json.dumps(description.to_dict(), indent=2) if options.json else description)
    return 0


def run_scale(options: argparse.Namespace) -> int:
    """Print what a run would be on ever more GPUs, and draw it."""
    from megagrok.plan.estimate import Machine
    from megagrok.plan.failures import find_rate
    from megagrok.plan.gpus import find_gpu
    from megagrok.plan.scale import KINDS, Assumptions, ladder, scale
    from megagrok.plan.scale_report import Scaling, to_json, to_text

    loaded = decode_config(options.config, options.overrides)
    require_runnable(loaded)
    if options.picture is not None and options.picture.suffix != ".svg":
        raise ConfigError(f"--picture {options.picture}, needs a name that ends with .svg")
    gpu, sizes = find_gpu(options.gpu), ladder(options.gpus)
    machine = Machine(gpu, options.nodes_of, gpu.network_bandwidth)
    costs = options.restart_seconds, options.checkpoint_seconds, options.price
    assumed = Assumptions(find_rate(options.failures), *costs)
    rungs = {
        kind: scale(loaded.config, machine, sizes, kind, assumed, searches=options.best)
        for kind in ([options.kind] if options.kind else KINDS)
    }
    scaling = Scaling(loaded.config, machine, assumed, options.best, rungs)
    if options.picture is not None:
        from megagrok.plan.scale_picture import draw

        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_bytes(draw(scaling))
    name = "" if options.picture is None else options.picture.name
    print(to_json(scaling) if options.json else to_text(scaling, name))
    return 0


def run_plan(options: argparse.Namespace) -> int:
    """Print the best layouts of a run on a cluster, 1 if none fits; or hold measured runs against their prediction."""
    from megagrok.plan.calibration import write_calibration
    from megagrok.plan.measured import RunFolder, calibrate_runs
    from megagrok.plan.proposal import Request, propose
    from megagrok.plan.proposal_text import calibration_text, to_dict, to_text, write_best

    if options.calibrate is not None:
        files = [RunFiles(root) for root in options.calibrate]
        folders = [RunFolder(run.root, run.config, run.metrics) for run in files]
        calibration = calibrate_runs(folders, options.gpu, options.nodes_of)
        if options.write is not None:
            write_calibration(options.write, calibration)
        print(calibration_text(calibration))
        return 0
    if options.config is None or options.gpus is None:
        raise ConfigError("plan needs a CONFIG and --gpus N; or --calibrate RUN...")
    request = Request(
        config=options.config,
        overrides=options.overrides,
        gpus=options.gpus,
        gpu=options.gpu,
        gpus_per_node=options.nodes_of,
        network_bandwidth=None if options.network is None else 1e9 * options.network,
        seq_len=options.seq,
        precisions=options.precision,
        tokens=options.tokens,
        dollars_per_gpu_hour=options.price,
        dollars_per_kilowatt_hour=options.power_price,
        calibration=options.calibration,
        top=options.top,
    )
    proposal = propose(request)
    if options.write is not None:
        write_best(options.write, proposal)
    print(json.dumps(to_dict(proposal), indent=2) if options.json else to_text(proposal))
    return int(not proposal.found.best)


def run_explain(options: argparse.Namespace) -> int:
    """Print what a setting means, and its value and origin in a run."""
    if options.all:
        print(reference(), end="")
        return 0
    if options.key is None:
        raise ConfigError("explain needs a setting, such as parallel.tensor, or --all")
    loaded = None if options.config is None else load_config(options.config, options.overrides)
    print(explain(options.key, loaded))
    return 0


def run_train(options: argparse.Namespace) -> int:
    """Train a configuration, from its newest checkpoint if its run has one."""
    loaded = decode_config(options.config, options.overrides)
    return _train(loaded, RunFiles.of(loaded.config), options)


def run_resume(options: argparse.Namespace) -> int:
    """Go on with a run as it was last started, with some settings changed."""
    files = RunFiles(options.run)
    if not files.config.exists():
        raise CheckpointError(f"{options.run} is not the folder of a run: it has no {files.config.name}")
    if not any(files.checkpoints.glob("step-*")):
        raise CheckpointError(
            f"{files.checkpoints} has no checkpoint to go on from, and resume does not start from scratch. "
            f"Fix: bring the checkpoints back, or begin with: megagrok train {files.config}"
        )
    for override in options.overrides:
        if override.partition("=")[0] in ("name", "runs_dir"):
            raise ConfigError(f"{override}: a run is resumed in its own folder. To branch off, copy {options.run}.")
    # The folder that was given, not the one that its configuration names: it may have been moved, or we may.
    return _train(decode_config(files.config, options.overrides), files, options)


def _train(loaded: Loaded, files: RunFiles, options: argparse.Namespace) -> int:
    require_runnable(loaded)
    from megagrok.train.beginning import Request
    from megagrok.train.start import start_training

    start_training(loaded.config, files, Request(accept_data_change=options.accept_data_change))
    return 0


def run_audit_data(options: argparse.Namespace) -> int:
    """Prove from a run's ledger that every sample was used exactly once, or name what was not; 3 then."""
    from megagrok.train.account import audit_run

    found = audit_run(RunFiles(options.run))
    print(f"{options.run}\n{found.to_text()}")
    return DataError.exit_code if found.problems else 0


def run_replay(options: argparse.Namespace) -> int:
    """Make one step of a run again and compare; 1 if it does not come out as recorded."""
    files = RunFiles(options.run)
    if not files.config.exists():
        raise CheckpointError(f"{options.run} is not the folder of a run: it has no {files.config.name}")
    loaded = decode_config(files.config, options.overrides)
    require_runnable(loaded)
    from megagrok.parallel.quiet import drop_vain_warnings_on_cpu

    drop_vain_warnings_on_cpu()
    from megagrok.train.replay import replay

    return int(not replay(loaded.config, files, options.step))


def run_ckpt_list(options: argparse.Namespace) -> int:
    """Print a line for each checkpoint; 4 if none looks sound."""
    from megagrok.checkpoint.catalog import checkpoints_of, list_checkpoints, table

    found = list_checkpoints(checkpoints_of(options.run))
    print(table(found))
    return 0 if any(listed.problem is None for listed in found) else CheckpointError.exit_code


def run_ckpt_verify(options: argparse.Namespace) -> int:
    """Read every byte and print what is wrong; 4 if anything is."""
    from megagrok.checkpoint.catalog import checkpoints_of, verify_steps

    is_bad = False
    for folder, problems in verify_steps(checkpoints_of(options.run), options.step):
        print(f"{folder}: {'sound' if not problems else 'DAMAGED'}", *problems, sep="\n  ", flush=True)
        is_bad |= bool(problems)
    return CheckpointError.exit_code if is_bad else 0


def run_ckpt_show(options: argparse.Namespace) -> int:
    """Print what a checkpoint holds."""
    from megagrok.checkpoint.catalog import checkpoints_of, folder_of, page

    print(page(folder_of(checkpoints_of(options.run), options.step)))
    return 0


def run_ckpt_reshard(options: argparse.Namespace) -> int:
    """Write a checkpoint's tensors into another number of files."""
    from megagrok.checkpoint.catalog import checkpoints_of, folder_of
    from megagrok.checkpoint.reshard import reshard

    source = folder_of(checkpoints_of(options.run), options.step)
    target = reshard(source, options.out, options.files)
    print(f"{target}: the tensors of {source} in {options.files} files, verified bit by bit")
    return 0


def run_ckpt_prune(options: argparse.Namespace) -> int:
    """Remove old checkpoints of a run that is not running."""
    from megagrok.checkpoint.catalog import checkpoints_of
    from megagrok.checkpoint.disk import Disk
    from megagrok.checkpoint.fence import Unfenced
    from megagrok.checkpoint.retention import is_sound, prune, steps_under
    from megagrok.train.lease import require_idle

    if options.keep < 2:
        raise ConfigError(f"--keep {options.keep}, needs at least 2: a bad newest checkpoint would end the run")
    root = checkpoints_of(options.run)
    require_idle(root.parent / "lease.json")
    before = steps_under(root)
    prune(Disk(), root, options.keep, Unfenced(), is_sound)
    after = steps_under(root)
    gone = [step for step in before if step not in after]
    print(f"{root}: removed {', '.join(map(str, gone)) or 'none'}; kept {', '.join(map(str, after)) or 'none'}")
    return 0


def run_generate(options: argparse.Namespace) -> int:
    """Print the text that follows a prompt."""
    from megagrok.train.generate import Sampling, generate_from_run

    sampling = Sampling(max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)
    text = generate_from_run(RunFiles(options.run), options.prompt, sampling, step=options.step)
    print(options.prompt + text)
    return 0


def run_verify_layout(options: argparse.Namespace) -> int:
    """Hold a grid of layouts of the run's twin against the oracle; 1 if any differs, and always with a planted bug."""
    from megagrok.parallel.quiet import drop_vain_warnings_on_cpu

    drop_vain_warnings_on_cpu()
    from megagrok.verify import report
    from megagrok.verify.run import Request, verify
    from megagrok.verify.twin import Switches

    if is_model_file(options.config):
        model, switches, own = load_model_config(options.config, options.overrides), Switches(), None
    else:
        loaded = decode_config(options.config, options.overrides)
        require_runnable(loaded)
        model, switches, own = loaded.config.model, Switches.of(loaded.config), loaded.config.parallel
    request = Request(
        model=model, switches=switches, own=own, grid=options.grid, steps=options.steps, planted=options.planted
    )
    if options.json:
        rows = verify(request)
        print(report.to_json(request, rows))
    else:
        print(report.heading(request), flush=True)
        rows = verify(request, on_row=lambda row: print(report.line(row), flush=True))
        print(report.closing(request, rows))
    return int(request.planted is not None or not all(row.matches for row in rows))


def run_slurm_render(options: argparse.Namespace) -> int:
    """Write the job script of a run, checked."""
    from megagrok.slurm.submit import show_script

    show_script(_submission(options), options.output)
    return 0


def run_slurm_submit(options: argparse.Namespace) -> int:
    """Check a run and hand it to Slurm."""
    from megagrok.slurm.submit import submit_run

    submit_run(_submission(options), is_dry=options.dry_run)
    return 0


def run_slurm_supervise(options: argparse.Namespace) -> int:
    """Inside a job: start, watch, and decide what comes after."""
    from megagrok.slurm.supervise import supervise

    return supervise(_submission(options))


def run_slurm_preflight(options: argparse.Namespace) -> int:
    """Inside a step: print what this node is like."""
    from megagrok.slurm.preflight import answer, look_at_this_node

    print(answer(look_at_this_node(options.probe, options.token)))
    return 0


def run_slurm_guard(options: argparse.Namespace) -> int:
    """Inside a step on another node: requeue the job if its first node is lost."""
    from megagrok.slurm.guard import guard

    guard(options.job, options.head)
    return 0


def run_slurm_bandwidth(options: argparse.Namespace) -> int:
    """Inside a step: measure an all-reduce with the other tasks; the first of them prints it."""
    from megagrok.parallel.bandwidth import measure_bandwidth
    from megagrok.parallel.placement import Placement
    from megagrok.slurm.environment import this_task
    from megagrok.slurm.preflight import BANDWIDTH_PREFIX

    task = this_task()
    found = measure_bandwidth(Placement(task.rank, task.count, task.local_rank, task.address, task.port))
    if task.rank == 0:
        print(f"{BANDWIDTH_PREFIX}{found:.6g}")
    return 0


def run_slurm_status(options: argparse.Namespace) -> int:
    """Print how a run stands."""
    from megagrok.slurm.report import status

    print(status(options.run))
    return 0


def run_slurm_logs(options: argparse.Namespace) -> int:
    """Print the end of a log."""
    from megagrok.slurm.report import logs

    print(logs(options.run, options.rank), end="")
    return 0


def run_slurm_why(options: argparse.Namespace) -> int:
    """Print five lines about the end of a run."""
    from megagrok.slurm.report import why

    print(why(options.run))
    return 0


def run_slurm_cancel(options: argparse.Namespace) -> int:
    """End a run so that nothing brings it back."""
    from megagrok.slurm.report import cancel

    print(cancel(options.run))
    return 0


def _submission(options: argparse.Namespace) -> "Submission":
    from megagrok.slurm.environment import cluster_file
    from megagrok.slurm.script import read_submission

    return read_submission(options.config, options.overrides, cluster_file(options.cluster))


def run_bench(options: argparse.Namespace) -> int:
    """Time the step of a run on this machine, and say where it goes."""
    from megagrok.parallel.quiet import drop_vain_warnings_on_cpu

    drop_vain_warnings_on_cpu()
    from megagrok.bench.command import Subject, bench
    from megagrok.bench.measure import Request

    subject = Subject(config=options.config, overrides=options.overrides, world=options.world)
    asked = Request(steps=options.steps, warmup=options.warmup, routing=options.routing, data=options.data)
    bench(subject, asked, options.json)
    return 0


def run_bench_compare(options: argparse.Namespace) -> int:
    """Race the step of a run against its peers."""
    from megagrok.parallel.quiet import drop_vain_warnings_on_cpu

    drop_vain_warnings_on_cpu()
    from megagrok.bench.command import Subject, compare

    subject = Subject(config=options.config, overrides=options.overrides, world=options.world)
    compare(subject, options.peers, options.rounds, options.json)
    return 0


def run_rehearse(options: argparse.Namespace) -> int:
    """Walk one step of a rank of the whole job here, and hold the plan against it; 1 if the plan is off."""
    from megagrok.parallel.quiet import drop_vain_warnings_on_cpu

    loaded = decode_config(options.config, options.overrides)
    require_runnable(loaded, options.world)
    drop_vain_warnings_on_cpu()
    from megagrok.rehearse import rehearse
    from megagrok.rehearse.against_plan import against_plan
    from megagrok.rehearse.report import to_json, to_text

    found = rehearse(loaded.config, options.rank, fullest=options.load)
    rows = [] if options.load is not None else against_plan(loaded.config, found)
    print((to_json if options.json else to_text)(loaded.config.name, found, rows))
    return int(not all(row.holds for row in rows))


def run_drill(options: argparse.Namespace) -> int:
    """Hurt a small run in the ways that were asked for; 1 if it does not come out as the untouched one."""
    from megagrok.parallel.quiet import drop_vain_warnings_on_cpu

    drop_vain_warnings_on_cpu()
    from megagrok.drill.campaign import Request, drill
    from megagrok.drill.faults import FAULTS
    from megagrok.drill.report import line, to_json, to_markdown

    unknown = [name for name in options.faults if name not in (*FAULTS, "all")]
    if unknown:
        raise ConfigError(f"drill has no fault {', '.join(unknown)}; it has: {', '.join(FAULTS)}, all")
    faults = list(FAULTS) if "all" in options.faults else options.faults
    with tempfile.TemporaryDirectory(prefix="megagrok-drill-") as scratch:
        folder = Path(scratch) if options.folder is None else options.folder
        request = Request(faults=faults, rounds=options.rounds, seed=options.seed, folder=folder)
        trials = drill(request, on_trial=lambda trial: print(line(trial), flush=True))
        if options.report is not None:
            options.report.parent.mkdir(parents=True, exist_ok=True)
            options.report.with_suffix(".md").write_text(to_markdown(request, trials), encoding="utf-8")
            options.report.with_suffix(".json").write_text(to_json(request, trials), encoding="utf-8")
    return int(any(trial.problems for trial in trials))


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count}, needs at least 1")
    return count


def _gib(text: str) -> float:
    size = float(text)
    if not 0 < size < 1e6:
        raise argparse.ArgumentTypeError(f"{text}, needs a number of GiB above 0")
    return size


def _at_least_zero(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}, needs a number of 0 or more")
    return value


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}, needs a number above 0")
    return number


def _tokens(text: str) -> int:
    return int(_above_zero(text))


def _share(text: str) -> float | None:
    return None if text == "balanced" else float(text)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of a run")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the file")


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--world", type=_count, metavar="N", help="ranks that will be started")
    parser.add_argument("--memory", type=_gib, metavar="GIB", help="memory of the device of one rank")
    parser.add_argument(
        "--strict-deps", action="store_true", help="refuse libraries with known holes, do not just warn"
    )


def _add_describe(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--json", action="store_true", help="numbers as JSON instead of a table")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--gpus", default="8..131072", metavar="A..B", help="sizes: A, 2 A, 4 A ... B; 8..131072")
    parser.add_argument("--gpu", default="h100", metavar="GPU", help="kind of GPU, such as h100 or h200")
    parser.add_argument("--nodes-of", type=_count, default=8, metavar="N", help="GPUs of a node; 8")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--strong", dest="kind", action="store_const", const="strong", help="only: the batch stays")
    kinds.add_argument("--weak", dest="kind", action="store_const", const="weak", help="only: the batch grows")
    parser.add_argument("--best", action="store_true", help="the fastest layout at each size; takes minutes")
    parser.add_argument("--failures", default="llama3", metavar="NAME", help="whose: llama3, rsc1, rsc2, opt, bloom")
    parser.add_argument(
        "--checkpoint-seconds", type=_at_least_zero, metavar="S", help="that a save holds the steps; else as measured"
    )
    parser.add_argument(
        "--restart-seconds", type=_at_least_zero, default=300.0, metavar="S", help="to start again, less loading; 300"
    )
    parser.add_argument("--price", type=_at_least_zero, metavar="DOLLARS", help="of a GPU-hour")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw it as well")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file of a run or of a model")
    _add_overrides(parser)
    parser.add_argument("--gpus", type=_count, metavar="N", help="GPUs of the cluster")
    parser.add_argument("--gpu", metavar="NAME", help="which: h100, h200, b200, ...; an unknown one is refused")
    parser.add_argument("--nodes-of", type=_count, default=8, metavar="N", help="GPUs of a node")
    parser.add_argument(
        "--network", type=_above_zero, metavar="GB/S", help="of one GPU's port; as its reference server"
    )
    parser.add_argument("--seq", type=_count, metavar="N", help="another sequence length, tokens per step kept")
    parser.add_argument(
        "--precision", nargs="+", default=[], choices=("fp32", "bf16", "fp8"), help="that of CONFIG if not given"
    )
    parser.add_argument("--tokens", type=_tokens, metavar="N", help="tokens of the whole run (15e12); CONFIG's if not")
    parser.add_argument("--price", type=_above_zero, metavar="DOLLARS", help="of a GPU-hour")
    parser.add_argument("--power-price", type=_above_zero, metavar="DOLLARS", help="of a kWh")
    parser.add_argument("--top", type=_count, default=10, metavar="N", help="layouts to print")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the best as a run file, or the calibration")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="correct the times by measured runs")
    parser.add_argument("--calibrate", nargs="+", type=Path, metavar="RUN", help="compare measured runs, do not plan")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", metavar="KEY", help="setting or section, such as parallel.tensor")
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file whose value to show")
    parser.add_argument("--all", action="store_true", help="every setting, as the page docs/configuration.md")
    _add_overrides(parser)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/quickstart")
    _add_overrides(parser)
    _add_accept(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_accept(parser)


def _add_accept(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept-data-change", action="store_true", help="go on in data that are not the checkpoint's, on the record"
    )


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/quickstart")
    parser.add_argument("step", type=_count, metavar="STEP", help="the step to make again")
    _add_overrides(parser)


def _add_audit_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/quickstart")


def _add_ckpt_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of its checkpoints")


def _add_ckpt(parser: argparse.ArgumentParser) -> None:
    _add_ckpt_list(parser)
    parser.add_argument("--step", type=_count, metavar="N", help="this checkpoint only")


def _add_ckpt_reshard(parser: argparse.ArgumentParser) -> None:
    _add_ckpt(parser)
    parser.add_argument("--files", type=_count, required=True, metavar="K", help="files to write")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the new checkpoint")


def _add_ckpt_prune(parser: argparse.ArgumentParser) -> None:
    _add_ckpt_list(parser)
    parser.add_argument("--keep", type=_count, required=True, metavar="K", help="sound checkpoints to keep, at least 2")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/quickstart")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-tokens", type=_count, default=120, metavar="N", help="tokens to write at the most")
    parser.add_argument("--temperature", type=_at_least_zero, default=0.8, metavar="T", help="0 takes the likeliest")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed writes the same text")
    parser.add_argument("--step", type=_count, metavar="N", help="checkpoint to use instead of the newest")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--steps", type=_count, default=10, metavar="N", help="timed steps, and as many recorded ones")
    parser.add_argument("--warmup", type=_count, default=3, metavar="N", help="steps before that do not count")
    parser.add_argument("--routing", choices=("balanced", "natural"), default="natural", help="of tokens to experts")
    parser.add_argument("--data", choices=("synthetic", "real"), default="synthetic", help="random tokens or the run's")
    _add_bench_ends(parser)


def _add_bench_compare(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--peers", nargs="+", default=list(PEER_NAMES), metavar="PEER", help=", ".join(PEER_NAMES))
    parser.add_argument("--rounds", type=_count, default=15, metavar="N", help="timed rounds, after two to warm up")
    _add_bench_ends(parser)


def _add_bench_ends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=_count, metavar="N", help="ranks: as many data ranks as make that number")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, and a page beside it (.md)")


def _add_rehearse(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--world", type=_count, metavar="N", help="ranks of the job, which the layout has to ask for")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="the rank to walk; 0 if not given")
    parser.add_argument(
        "--load", type=_share, metavar="SHARE", help="balanced, or the share of all choices that one expert gets"
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def _add_drill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "faults", nargs="+", metavar="FAULT", help="kill, hang, slow, preempt, node-loss, corrupt, disk-full, nan; all"
    )
    parser.add_argument("--rounds", type=_count, default=2, metavar="N", help="how often each fault is injected")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="decides who is hit, and when")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the runs are kept; a temporary folder if not")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write FILE.md and FILE.json")


def _add_verify_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of a run or of a model")
    _add_overrides(parser)
    parser.add_argument("--grid", choices=GRID_NAMES, default="default", help="some 30 layouts, or 8")
    parser.add_argument("--steps", type=_count, default=5, metavar="N", help="optimizer steps of each layout")
    parser.add_argument("--break", dest="planted", choices=BREAK_NAMES, help="plant a bug and see it caught")
    parser.add_argument("--json", action="store_true", help="everything as JSON, at the end")


def _add_slurm_config(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help="cluster file; MEGAGROK_CLUSTER names it otherwise"
    )


def _add_slurm_render(parser: argparse.ArgumentParser) -> None:
    _add_slurm_config(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the script, instead of here")


def _add_slurm_submit(parser: argparse.ArgumentParser) -> None:
    _add_slurm_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check, show the script, submit nothing")


def _add_slurm_preflight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("probe", type=Path, metavar="FOLDER", help="folder that the supervisor has made for it")
    parser.add_argument("token", metavar="TOKEN", help="what the file there has to hold")


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """A command without arguments."""


def _add_slurm_guard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", type=_count, metavar="JOB", help="number of the job")
    parser.add_argument("head", metavar="NODE", help="first node of the job, where its supervisor runs")


def _add_slurm_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN|JOB", help="folder of a run, or number of a job")


def _add_slurm_logs(parser: argparse.ArgumentParser) -> None:
    _add_slurm_run(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="a rank's log of its newest start, not the job's")


COMMANDS = {
    "train": Command("Train, or go on training, on this machine or as a rank.", _add_train, run_train),
    "resume": Command("Go on with a run as it was last started.", _add_resume, run_resume),
    "replay": Command("Make one step of a run again and compare it with the records.", _add_replay, run_replay),
    "audit-data": Command("Prove that every sample was used exactly once.", _add_audit_data, run_audit_data),
    "ckpt list": Command("The checkpoints of a run.", _add_ckpt_list, run_ckpt_list),
    "ckpt verify": Command("Read every byte of a run's checkpoints.", _add_ckpt, run_ckpt_verify),
    "ckpt show": Command("What a checkpoint holds.", _add_ckpt, run_ckpt_show),
    "ckpt reshard": Command("A checkpoint in another number of files.", _add_ckpt_reshard, run_ckpt_reshard),
    "ckpt prune": Command("Remove old checkpoints, never below two sound ones.", _add_ckpt_prune, run_ckpt_prune),
    "generate": Command("Text from a run's checkpoint.", _add_generate, run_generate),
    "check": Command("Check a run without starting it: every problem at once.", _add_check, run_check),
    "describe": Command("Parameters, FLOPs and bytes of a model or a run.", _add_describe, run_describe),
    "scale": Command("A run on 8 to 131,072 GPUs: step, failures, tokens a day.", _add_scale, run_scale),
    "plan": Command("Which layout, how fast, does it fit, what does it cost.", _add_plan, run_plan),
    "verify-layout": Command(
        "Prove on CPU ranks that no layout changes the maths of a run's model.", _add_verify_layout, run_verify_layout
    ),
    "bench": Command("The step of a run on this machine: speed, and where it goes.", _add_bench, run_bench),
    "bench compare": Command("The step of a run beside its peers.", _add_bench_compare, run_bench_compare),
    "rehearse": Command(
        "Walk one step of any rank of the whole job on this machine: bytes, messages, FLOPs.",
        _add_rehearse,
        run_rehearse,
    ),
    "drill": Command("Hurt a small run on purpose, and prove that it lost nothing.", _add_drill, run_drill),
    "explain": Command("What a setting means, and where its value comes from.", _add_explain, run_explain),
    "slurm render": Command("The job script of a run, checked.", _add_slurm_render, run_slurm_render),
    "slurm submit": Command("Check a run and hand it to Slurm.", _add_slurm_submit, run_slurm_submit),
    "slurm status": Command("How a run stands: queue, step, heartbeat, restarts.", _add_slurm_run, run_slurm_status),
    "slurm logs": Command("The end of a job's log, or of a rank's.", _add_slurm_logs, run_slurm_logs),
    "slurm why": Command("Five lines on what ended a run, and what to type next.", _add_slurm_run, run_slurm_why),
    "slurm cancel": Command("Save, end, and stay ended.", _add_slurm_run, run_slurm_cancel),
    "slurm supervise": Command("What a job script starts: not for typing.", _add_slurm_config, run_slurm_supervise),
    "slurm bandwidth": Command("What srun starts to measure: not for typing.", _add_nothing, run_slurm_bandwidth),
    "slurm guard": Command("What watches the supervisor: not for typing.", _add_slurm_guard, run_slurm_guard),
    "slurm preflight": Command(
        "What srun starts on each node: not for typing.", _add_slurm_preflight, run_slurm_preflight
    ),
}


def _usage(name: str) -> int:
    width = max(len(command) for command in COMMANDS)
    lines = [f"  {command:<{width}}  {COMMANDS[command].help}" for command in COMMANDS]
    text = "\n".join(["usage: megagrok COMMAND ...", "", *lines, "", "megagrok COMMAND --help says more."])
    if name in ("-h", "--help"):
        print(text)
        return 0
    print(f"megagrok: no command {name!r}\n{text}", file=sys.stderr)
    return 2
