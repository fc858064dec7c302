"""Facts and a clock in, events out. Pure: no files, sockets, SQL, clock, environment or globals."""
