"""The commands, one file each: what `tokenpo <command>` does, callable from Python."""
