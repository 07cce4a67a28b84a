"""The pre-embedded dataset on disk: its layout, its writer, its reader, and the order of its rows in a run."""
