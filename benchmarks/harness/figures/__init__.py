"""The figures of README.md and docs/, as text from the tracked results."""
