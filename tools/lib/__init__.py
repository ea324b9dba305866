"""Implementation of the commands in tools/. All modules except `cli` are imported only when a command runs."""
