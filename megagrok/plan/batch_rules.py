"""Which batches, lengths and schedules go together: samples over replicas and stages, steps over phases."""

from collections.abc import Iterator

from megagrok.config.near import divisors, multiples
from megagrok.config.problems import Fix, Problem
from megagrok.config.schema import RunConfig
from megagrok.plan.batch import num_micro_batches, samples_per_micro_step
from megagrok.plan.rules import Rule, fixes, not_a_multiple

_SAMPLES = "train.micro_batch * parallel.data"


def _global_batches(config: RunConfig) -> Iterator[tuple[str, int]]:
    for i, stage in enumerate(config.train.batch_ramp):
        yield f"train.batch_ramp.{i}.global_batch", stage.global_batch
    yield "train.global_batch", config.train.global_batch


def _batches_over_replicas(config: RunConfig) -> Iterator[Problem]:
    step, pipeline = samples_per_micro_step(config), config.parallel.pipeline
    for key, batch in _global_batches(config):
        advice = fixes(key, multiples(step, batch) + multiples(step * pipeline, batch))
        smaller = fixes("train.micro_batch", divisors(batch, config.train.micro_batch))
        yield from not_a_multiple(key, batch, _SAMPLES, step, "", advice, smaller)


def _evaluation_over_replicas(config: RunConfig) -> Iterator[Problem]:
    step, key = samples_per_micro_step(config), "train.evaluate_samples"
    samples = config.train.evaluate_samples
    yield from not_a_multiple(key, samples, _SAMPLES, step, "", fixes(key, multiples(step, samples)))


def _evaluation_over_stages(config: RunConfig) -> Iterator[Problem]:
    step, key = samples_per_micro_step(config), "train.evaluate_samples"
    pipeline, samples = config.parallel.pipeline, config.train.evaluate_samples
    count = num_micro_batches(config, samples)
    if config.parallel.virtual_pipeline > 1 and samples % step == 0 and count % pipeline:
        text = (
            f"{key} / ({_SAMPLES}) = {count} micro-batches, needs a multiple of parallel.pipeline ({pipeline}): "
            "interleaved chunks take turns in rounds of that many."
        )
        advice = fixes(key, multiples(pipeline * step, max(samples, pipeline * step)))
        yield Problem(key, text, (*advice, Fix("parallel.virtual_pipeline", 1)))


def _micro_batches_over_stages(config: RunConfig) -> Iterator[Problem]:
    pipeline, is_interleaved = config.parallel.pipeline, config.parallel.virtual_pipeline > 1
    step = samples_per_micro_step(config)
    for key, batch in _global_batches(config):
        count = num_micro_batches(config, batch)
        if pipeline == 1 or batch % step:
            continue
        advice = fixes(key, multiples(pipeline * step, max(batch, pipeline * step)))
        advice += fixes("train.micro_batch", divisors(batch, config.train.micro_batch))
        if count < pipeline:
            text = f"{key} / ({_SAMPLES}) = {count} micro-batches, needs >= parallel.pipeline ({pipeline})."
            yield Problem(key, text, tuple(advice))
        elif is_interleaved and count % pipeline:
            text = (
                f"{key} / ({_SAMPLES}) = {count} micro-batches, needs a multiple of parallel.pipeline ({pipeline}): "
                "interleaved chunks take turns in rounds of that many."
            )
            yield Problem(key, text, (*advice, Fix("parallel.virtual_pipeline", 1)))


def _sequence_fits_model(config: RunConfig) -> Iterator[Problem]:
    seq_len, longest = config.train.seq_len, config.model.max_positions
    if seq_len > longest:
        text = f"train.seq_len = {seq_len}, needs <= model.max_positions ({longest})."
        yield Problem("train.seq_len", text, (Fix("train.seq_len", longest), Fix("model.max_positions", seq_len)))


def _tokenizer_fits_model(config: RunConfig) -> Iterator[Problem]:
    size, rows, key = config.data.tokenizer_vocab_size, config.model.vocab_size, "data.tokenizer_vocab_size"
    if size is not None and size > rows:
        grown = multiples(config.parallel.tensor, size + config.parallel.tensor - 1)[0]
        text = f"{key} = {size}, needs <= model.vocab_size ({rows})."
        yield Problem(key, text, (Fix(key, rows), Fix("model.vocab_size", grown)))


def _schedule_fits_run(config: RunConfig) -> Iterator[Problem]:
    schedule, steps = config.schedule, config.train.steps
    if schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        spent = f"{schedule.warmup_steps} + {schedule.decay_steps}"
        text = f"schedule.warmup_steps + schedule.decay_steps = {spent}, needs <= train.steps ({steps})."
        candidates = []
        if schedule.warmup_steps <= steps:
            candidates.append(Fix("schedule.decay_steps", steps - schedule.warmup_steps))
        if schedule.decay_steps <= steps:
            candidates.append(Fix("schedule.warmup_steps", steps - schedule.decay_steps))
        candidates.append(Fix("train.steps", schedule.warmup_steps + schedule.decay_steps))
        yield Problem("schedule.warmup_steps", text, tuple(candidates))
    elif schedule.warmup_steps > steps:
        text = f"schedule.warmup_steps = {schedule.warmup_steps}, needs <= train.steps ({steps})."
        yield Problem("schedule.warmup_steps", text, (Fix("schedule.warmup_steps", steps),))


def _rates_descend(config: RunConfig) -> Iterator[Problem]:
    lowest, peak = config.schedule.min_lr, config.optimizer.lr
    if lowest > peak:
        text = f"schedule.min_lr = {lowest}, needs <= optimizer.lr ({peak})."
        yield Problem("schedule.min_lr", text, (Fix("schedule.min_lr", peak), Fix("optimizer.lr", lowest)))


_BATCH = ("train.global_batch", "train.micro_batch", "train.batch_ramp", "parallel.data")
_EVALUATION = ("train.evaluate_samples", "train.micro_batch", "parallel.data")

BATCH_RULES = (
    Rule((*_BATCH, "parallel.pipeline"), _batches_over_replicas),
    Rule(_EVALUATION, _evaluation_over_replicas),
    Rule((*_BATCH, "parallel.pipeline", "parallel.virtual_pipeline"), _micro_batches_over_stages),
    Rule((*_EVALUATION, "parallel.pipeline", "parallel.virtual_pipeline"), _evaluation_over_stages),
    Rule(("train.seq_len", "model.max_positions"), _sequence_fits_model),
    Rule(("data.tokenizer_vocab_size", "model.vocab_size", "parallel.tensor"), _tokenizer_fits_model),
    Rule(("train.steps", "schedule.kind", "schedule.warmup_steps", "schedule.decay_steps"), _schedule_fits_run),
    Rule(("optimizer.lr", "schedule.min_lr"), _rates_descend),
)
