"""Ops: against their competitors and the hardware's limit, on a CPU, on a GPU and ahead of time."""
