"""Places a run on devices: the current device and its memory, the mesh, and how arrays are sharded over it."""
