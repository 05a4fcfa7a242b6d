"""The command line of all commands: flags, experiment files and their overrides."""
