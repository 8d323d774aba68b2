"""What is run around training, each a small program: `python -m ballbot_utils.<name>`."""
