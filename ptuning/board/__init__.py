"""The training page: what the runs in output/ say, the commands it starts, and how it shows both. Nothing official has one."""
