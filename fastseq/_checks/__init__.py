"""Argument checks: what torch raises for bad arguments, before any kernel runs."""
