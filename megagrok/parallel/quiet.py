"""What Megatron, DeepSpeed and torch say in vain on a CPU, dropped by its first words; everything else passes.

Called before either library is imported: DeepSpeed says its part while it is. Not for a GPU, where a missing
Transformer Engine matters.
"""

import logging
import re
import warnings

_LOGGED = {
    # megagrok.platform has decided for the CPU by itself.
    "DeepSpeed": "Setting accelerator to CPU.",
}
_WARNED = (
    "Transformer Engine and Apex are not installed.",
    "Apex is not installed.",
    # About CUDA graphs, CUDA_DEVICE_MAX_CONNECTIONS, and recomputing an attention core that is not ours.
    "full scope is deprecated.",
    "When using async grad allreduce it is recommended to set",
    "When using sequence parallelism it is recommended to set",
    "If you are using transformer_engine as the transformer implementation,",
    # Megatron's calls of torch functions that have a new name.
    "`torch.distributed.all_gather_into_tensor` is deprecated.",
    "`torch.distributed.reduce_scatter_tensor` is deprecated.",
)


def drop_vain_warnings_on_cpu() -> None:
    """Install the filters, for this process and those it forks."""
    for name in _LOGGED:
        logger = logging.getLogger(name)
        logger.removeFilter(_is_worth_saying)
        logger.addFilter(_is_worth_saying)
    for beginning in _WARNED:
        warnings.filterwarnings("ignore", message=re.escape(beginning))


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED[record.name])
