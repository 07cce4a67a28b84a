"""The commands, a module each: a dataclass in, dataclasses or a generator of them out.

They print nothing and do not import each other.
"""
