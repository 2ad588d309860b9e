"""What the recipes share: errors, command lines, checkpoints, and the Python installation as a source of text."""
