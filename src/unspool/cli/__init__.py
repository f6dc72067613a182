"""The command line: each module holds a frozen dataclass `Args` and `run(args) -> int`; only run imports torch."""
