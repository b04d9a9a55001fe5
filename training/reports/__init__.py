"""What a run tells: logs, numbers, slow steps."""
