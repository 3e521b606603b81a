"""Environments. `device.make` builds one by name, `device.Vector` runs many copies under `jit`."""
