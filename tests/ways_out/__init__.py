"""The matrix of ways out: a table of ways to carry a file out, run against a real agent, and what it told of each.

`ways.toml` is the table (a way is a line or a few; anybody may bring another one: `python -m tests.ways_out FILE`), `table`
reads it, `lab` makes disks, media and the agent, `run` carries out, `judge` compares what was told with what was done, `page`
prints. Programs are known here, by name; in the agent none is.
"""
