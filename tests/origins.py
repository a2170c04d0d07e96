"""Where an adapter of a made-up federation comes from, for tests of what is said of it."""

from cli.export_origin import Best, Group, Level, Measured, Origin

ORIGIN = Origin(
    federation="moods",
    base_model="org/bert",
    base_model_digest="b" * 64,
    task="sequence-classification",
    labels=("sad", "happy"),
    modules=("bert.0.query", "bert.0.value"),
    modules_to_save=("classifier",),
    manifest_digest="c" * 64,
    adapter_digest="d" * 64,
    method="raflora",
    round=7,
    num_rounds=9,
    global_rank=32,
    rank=32,
    software_version="0.1.0",
    groups=(Group(8, 2, 300, 14), Group(32, 1, 50, 6)),
    measured=Measured(
        7, {"accuracy": 0.75, "eval_loss": 0.5}, {"accuracy": 0.7}, (Level(8, 2, 30, {"accuracy": 0.6}),)
    ),
    best=Best(5, "accuracy", 0.8125, "federated"),
)
