"""`raflora rounds`: every finished round."""

from raflora.v1 import status_pb2, status_pb2_grpc

from cli.connection import Connection, reach
from cli.evaluation_screen import evaluations_table
from cli.output import Format, print_json, print_screen
from cli.screens import rounds_table
from common.errors import RafloraError

PAGE_SIZE = 100  # the most that the coordinator gives at once


async def rounds(*, format: Format = "table", connection: Connection = Connection()) -> None:
    """Lists the finished rounds: accuracy, energy, contributors, bytes, seconds."""
    listing = await list_rounds(connection)
    if format == "json":
        print_json(listing)
    else:
        print_screen(rounds_table(listing.rounds))
        evaluations = evaluations_table(listing.rounds)
        if evaluations is not None:
            print_screen("")
            print_screen(evaluations)


async def list_rounds(connection: Connection) -> status_pb2.ListRoundsResponse:
    """All pages as one."""
    listing = status_pb2.ListRoundsResponse(more=True)
    async with reach(connection) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        while listing.more:
            after = listing.rounds[-1].round if listing.rounds else 0
            page = await stub.ListRounds(
                status_pb2.ListRoundsRequest(page_size=PAGE_SIZE, after_round=after),
                timeout=connection.timeout_seconds,
            )
            if page.more and not (page.rounds and page.rounds[-1].round > after):
                raise RafloraError(f"coordinator {connection.address}: a page of rounds that does not advance")
            listing.rounds.extend(page.rounds)
            listing.more = page.more
    return listing
