"""Measurements: the engines' curves beside one plain process, their memory, the speed of steps and checkpoints."""
