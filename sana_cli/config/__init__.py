"""Configs: every knob (`keys`), files that set them (`file`), and YAML itself (`document`). It knows no torch."""
