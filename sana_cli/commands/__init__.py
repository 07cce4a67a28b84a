"""The commands, a module each, as functions: a dataclass in, dataclasses out. They never print and do not import each other."""
