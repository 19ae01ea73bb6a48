"""Weights out of a run, in the layouts of other libraries, and into one."""
