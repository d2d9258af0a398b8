"""What a JuiceFS volume is: setting, metadata URL, Secrets, clients, blocks. Pure."""
