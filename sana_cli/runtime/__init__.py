"""What a process runs on: devices, other processes, files, the hub. It knows no model."""
