"""Measurements: the engines' curves against one plain process, their memory, the speed of steps and checkpoints."""
