"""What agent and collector agree on, and all that the collector may import from here. Pure: no files, sockets, clock."""
