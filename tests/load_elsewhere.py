"""Runs the lines that an export printed, in a Python that has never heard of raflora: `python -I load_elsewhere.py`.

Reads {"jobs": [{"lines", "inputs", "hidden"}]} from standard input, first the jobs that hide a module from Python.
Writes what each job's `model` answered. Imports nothing of ours, and forgets where ours is: this checkout or another.
"""

import importlib.util
import json
import sys
from pathlib import Path

OURS = ("worker", "cli", "common", "coordinator", "raflora")
HELD = ("worker/peft_format.py", "raflora/v1")  # by the paths that are forgotten

asked = json.load(sys.stdin)
sys.path[:] = [path for path in sys.path if not any((Path(path) / name).exists() for name in HELD)]

import torch  # noqa: E402

answers = []
for job in asked["jobs"]:
    for name in job["hidden"]:
        assert sys.modules.setdefault(name, None) is None  # type: ignore[arg-type] # to Python: not to be found
    names: dict[str, object] = {}
    exec("\n".join(job["lines"]), names)  # noqa: S102 - the printed lines are what is tested
    model = names["model"]
    with torch.inference_mode():
        inputs = {name: torch.tensor(values) for name, values in job["inputs"].items()}
        output = model.eval()(**inputs)  # type: ignore[attr-defined]
    processor = names.get("tokenizer") or names.get("processor")
    answers.append(
        {
            "logits": output.logits.float().tolist(),
            "labels": list(model.config.id2label.values()),  # type: ignore[attr-defined]
            "processor": type(processor).__name__,
            "padding": getattr(processor, "pad_token", None),
            "chat_template": bool(getattr(processor, "chat_template", None)),
        }
    )
    for name in job["hidden"]:
        del sys.modules[name]
print(json.dumps({"answers": answers, "found": [name for name in OURS if importlib.util.find_spec(name)]}))
