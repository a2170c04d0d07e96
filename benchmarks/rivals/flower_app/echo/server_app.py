"""Plays a round of so many bytes each way for every line that comes over a socket, and answers with its seconds."""

import json
import socket
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

_LOOK_SECONDS = 0.2
_ROUND_SECONDS = 600.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Until the socket is closed."""
    wanted = int(context.run_config["nodes"])
    while len(nodes := list(grid.get_node_ids())) < wanted:
        time.sleep(_LOOK_SECONDS)
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(context.run_config["socket"]))
        with line.makefile("rw") as orders:
            print(json.dumps({"nodes": len(nodes)}), file=orders, flush=True)
            for number, order in enumerate(orders):
                print(json.dumps(_round(grid, nodes, int(order), number)), file=orders, flush=True)


def _round(grid: Grid, nodes: list[int], size_bytes: int, number: int) -> dict[str, float]:
    """One round with numbers that no round before had; everybody is sent the same, as a global model is."""
    content = RecordDict()
    if size_bytes:
        numbers = np.random.default_rng(number).standard_normal(size_bytes // 4, dtype=np.float32)
        content["arrays"] = ArrayRecord([numbers])
    messages = [Message(content=content, dst_node_id=node, message_type="train") for node in nodes]
    started = time.perf_counter()
    replies = list(grid.send_and_receive(messages, timeout=_ROUND_SECONDS))
    seconds = time.perf_counter() - started
    failed = [reply for reply in replies if reply.has_error()]
    if failed or len(replies) != len(nodes):
        raise RuntimeError(f"{len(replies)} replies from {len(nodes)} nodes, {len(failed)} of them errors")
    received = sum(array.nbytes for reply in replies for array in _arrays_of(reply))
    return {"wall_seconds": seconds, "received_bytes": received}


def _arrays_of(reply: Message) -> list[np.ndarray]:
    record = reply.content.array_records.get("arrays")
    return record.to_numpy_ndarrays() if record else []
