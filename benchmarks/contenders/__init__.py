"""The loops that are raced: a file for each, with `run(task)`, as its users would write it from its documentation."""
