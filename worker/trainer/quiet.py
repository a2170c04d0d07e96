"""Keeps libraries from talking over us: no progress bars, no advice for authors of training scripts."""

import logging
import warnings


def silence_libraries() -> None:
    """For the whole process; real errors still come through."""
    import transformers  # noqa: PLC0415 - seconds, which only those who load a model pay
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    constants.HF_HUB_DISABLE_TELEMETRY = True  # trl would tell its makers about every trainer
    logging.captureWarnings(True)
    # Each has been read, and none is the site's business.
    for module in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
