"""The configuration: its fields, where they come from, and how extensions are named in it. No torch."""
