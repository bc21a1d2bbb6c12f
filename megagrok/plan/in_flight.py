"""How many micro-batches a pipeline stage has run forward and not yet backward, at most."""


def chunks_in_flight(pipeline: int, virtual_pipeline: int, num_micro_batches: int, stage: int) -> int:
    """Forward passes of one model chunk, 1 / virtual_pipeline of the stage's layers, that wait for their backward pass.

    One forward, one backward: a stage runs ahead by the stages behind it. Interleaved: Megatron's warm-up
    (megatron-core 0.16.1 schedules.py, get_pp_rank_microbatches), and one more forward before the first backward.
    """
    if virtual_pipeline == 1:
        return min(pipeline - stage, num_micro_batches)
    all_of_them = num_micro_batches * virtual_pipeline
    return min((pipeline - stage - 1) * 2 + (virtual_pipeline - 1) * pipeline + 1, all_of_them)
