"""How trained factors become the next global adapter, and what can be said about its ranks."""
