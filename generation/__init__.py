"""From options and a prompt to videos and images; read run.py first."""
