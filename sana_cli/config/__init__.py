"""Configs: every key (`keys`), files that set them (`file`), YAML (`document`), former names (`renamed`)."""
