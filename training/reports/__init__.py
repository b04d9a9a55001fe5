"""What a run reports: logs, numbers, slow steps."""
