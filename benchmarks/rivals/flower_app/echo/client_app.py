"""Sends back as much as it was sent, with other numbers: Flower does not send again what it knows by content."""

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The reply."""
    content = RecordDict()
    if record := message.content.array_records.get("arrays"):
        content["arrays"] = ArrayRecord([numbers + context.node_id % 1000 for numbers in record.to_numpy_ndarrays()])
    return Message(content=content, reply_to=message)
