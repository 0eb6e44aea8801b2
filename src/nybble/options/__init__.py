"""Options of every command: one frozen dataclass per concern, composed by commands. TOML in and out."""
