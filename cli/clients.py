"""`raflora clients`: every client that ever joined."""

from raflora.v1 import status_pb2, status_pb2_grpc

from cli.connection import Connection, reach
from cli.output import Format, print_json, print_screen
from cli.rounds import PAGE_SIZE
from cli.screens import clients_table
from common.errors import RafloraError


async def clients(*, format: Format = "table", connection: Connection = Connection()) -> None:
    """Lists the clients: ranks, examples, membership, last failure."""
    listing = await list_clients(connection)
    if format == "json":
        print_json(listing)
    else:
        print_screen(clients_table(listing.clients))


async def list_clients(connection: Connection) -> status_pb2.ListClientsResponse:
    """All pages as one."""
    listing = status_pb2.ListClientsResponse(more=True)
    async with reach(connection) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        while listing.more:
            after = listing.clients[-1].client_id if listing.clients else ""
            page = await stub.ListClients(
                status_pb2.ListClientsRequest(page_size=PAGE_SIZE, after_client_id=after),
                timeout=connection.timeout_seconds,
            )
            if page.more and not (page.clients and page.clients[-1].client_id > after):
                raise RafloraError(f"coordinator {connection.address}: a page of clients that does not advance")
            listing.clients.extend(page.clients)
            listing.more = page.more
    return listing
