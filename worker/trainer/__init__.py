"""The trainer process: loads torch, trains and evaluates what its agent asks for, and never imports grpc."""

import logging

# Here, before any of its modules imports PEFT and that bitsandbytes, which warns while it is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
