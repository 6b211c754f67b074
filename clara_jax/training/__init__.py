"""Stages, objectives, the step and the loop."""
