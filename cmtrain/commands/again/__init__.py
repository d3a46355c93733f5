"""Take steps of a run again, in one process: look at one, compare two runs, verify one."""
