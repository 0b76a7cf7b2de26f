"""Image data through Grain: sources, crops, pipelines and the command that prepares files."""
