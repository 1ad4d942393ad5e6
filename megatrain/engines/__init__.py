"""Who shards, schedules, clips and steps."""

import logging
import os
import warnings

from megatrain import device

# Read when deepspeed is imported: it would look for accelerators itself, and warn where it finds none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.accelerator() == "cuda" else "cpu")
# Its progress at INFO, for every rank; and names of collectives that torch 2.13 renamed and deepspeed still uses.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
