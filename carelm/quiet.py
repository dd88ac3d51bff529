"""Warnings that a user can do nothing about, each with the address of its cause."""

import logging
import os
import warnings

# A message (a regular expression, matched at its start) and where it comes from.
WARNINGS = {
    # TRL's SFTConfig sets the old name: https://github.com/huggingface/trl/blob/main/trl/trainer/base_config.py
    "`gradient_checkpointing` is deprecated": FutureWarning,
    # PEFT reads the old name: https://github.com/huggingface/peft/blob/main/src/peft/peft_model.py
    "`is_gradient_checkpointing` is deprecated": FutureWarning,
    # DeepSpeed calls the old name: https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/comm/torch.py
    r"`torch\.distributed\.\w+` is deprecated": FutureWarning,
}
LOG_LINES = {
    # Another micro batch is expected on other ranks, the global batch is what stays:
    # https://github.com/huggingface/transformers/blob/main/src/transformers/trainer_utils.py
    "transformers.trainer_utils": "Warning: The following arguments do not match",
    # What carelm.models.base has said in its own line:
    # https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/bitsandbytes.py
    "transformers.integrations.bitsandbytes": "The modules are dequantized in",
    # transformers calls every T5 tied and then finds that FLAN-T5 is not, which is right:
    # https://github.com/huggingface/transformers/blob/main/src/transformers/models/t5/configuration_t5.py
    "transformers.modeling_utils": "The tied weights mapping and config for this model specifies to tie shared.weight",
    # A kernel of AVX512-BF16 CPUs that a base held in 4 bits there is kept from (carelm.models.base):
    # https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/backends/cpu/ops.py
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def silence(*, has_gpu: bool, is_first_rank: bool) -> None:
    """Silences them in this process; everything else is shown. To be called before DeepSpeed and bitsandbytes are
    imported."""
    for message, category in WARNINGS.items():
        warnings.filterwarnings("ignore", message=message, category=category)
    for logger, start in LOG_LINES.items():
        logging.getLogger(logger).addFilter(lambda record, start=start: not record.getMessage().startswith(start))
    if not has_gpu:
        # DeepSpeed warns of a missing GPU unless told: https://github.com/deepspeedai/DeepSpeed/blob/master/accelerator/real_accelerator.py
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not is_first_rank:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
