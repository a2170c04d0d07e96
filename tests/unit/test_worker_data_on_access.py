"""Examples that are prepared when they are needed, and kept while there is room for them."""

from pathlib import Path

import numpy as np

from worker.trainer.data import Example, ExamplesOnAccess, Row


def test_images_are_prepared_on_access_and_kept_while_there_is_room() -> None:
    prepared: list[int] = []

    def prepare(row: Row) -> Example:
        prepared.append(row["n"])
        return {"pixel_values": np.full(4, row["n"], dtype=np.float32)}  # 16 bytes

    rows = [Row(f"line {n}", Path(), {"n": n}) for n in range(4)]
    examples = ExamplesOnAccess(rows, check=lambda _: None, prepare=prepare, keep_bytes=40)
    assert (len(examples), prepared) == (4, [])
    for _ in range(2):
        assert [int(example["pixel_values"][0]) for example in examples] == [0, 1, 2, 3]
    assert prepared == [0, 1, 2, 3, 2, 3]
    assert examples[-1]["pixel_values"][0] == 3
    assert [int(example["pixel_values"][0]) for example in examples[1:3]] == [1, 2]
