"""What the commands in tools/ do: `cli` is light, everything else is imported once a command works."""
