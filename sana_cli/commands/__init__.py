"""The four commands, as functions: a dataclass in, dataclasses out. They never print and do not import each other."""
