"""Programs that measure one library each, on demand, in a process of their own."""
