"""The learning rate as a pure function of the step. No state, no torch, no optimizer.

One idea: nothing about the schedule is saved in a checkpoint. A run that stops anywhere and resumes gets the same
rates, because they follow from the step and the settings alone.

    peak |      ______________
         |     /              \\          warm-up: linear, reaches the peak at step = warmup_steps
         |    /                `-._      decay:   1 - sqrt (wsd) or half a cosine, reaches min_lr at the last step
     min |   /                     `-.
         +--+--------------+----------+
            warmup_steps   total_steps - decay_steps
"""

import math

from megagrok.config.schema import ScheduleConfig


def learning_rate(step: int, *, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """The rate used by the update that makes step `step`.

    step: counts from 1, so the first update of a warm-up of W steps uses peak / W and never 0. Beyond `total_steps` the
    rate stays where it ended.  peak: OptimizerConfig.lr.  total_steps: TrainConfig.steps.
    A warm-up and a decay that overlap (a long schedule cut short) give the lower of the two curves.
    Same result on every rank; nothing is raised.
    Source: warm-up-stable-decay from MiniCPM (Hu et al. 2024, arXiv 2404.06395); the 1 - sqrt shape of the decay from
    Haegele et al. 2024 (arXiv 2405.18392, sec. 3), who find it better than a linear one; cosine from Loshchilov and
    Hutter 2017 (arXiv 1608.03983), without restarts.
    """
    warmup = peak * min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps > 0 else peak
    remaining = _share_remaining(min(step, total_steps), schedule, total_steps)
    # Written as a mix, not as min + share * (peak - min): the ends are then exactly peak and min_lr.
    decayed = remaining * peak + (1.0 - remaining) * schedule.min_lr
    return min(warmup, decayed)


def _share_remaining(step: int, schedule: ScheduleConfig, total_steps: int) -> float:
    """How much of the way from min_lr up to the peak is left at `step`: 1 before the decay, 0 at its end."""
    match schedule.kind:
        case "constant":
            return 1.0
        case "wsd":
            return 1.0 - math.sqrt(_progress(step, total_steps - schedule.decay_steps, total_steps))
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * _progress(step, schedule.warmup_steps, total_steps)))


def _progress(step: int, start: int, end: int) -> float:
    """Part of the way from step `start` to step `end`, 0 up to `start`; 0 too when there is no way to go."""
    if step <= start or end <= start:
        return 0.0
    return min(1.0, (step - start) / (end - start))
